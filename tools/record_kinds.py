"""Record what the same machines teach as standards, handbook or web pages in nbs/results/kinds.json.

    python tools/record_kinds.py [--seeds 5] [--plan] [--runs FOLDER]

The pre-trained demo model reads about twelve machines in documents of one kind, for equal tokens. How well it knows
their values then is asked in a telling of each kind that no arm has read, and so is what it thinks of twelve machines
that it never read of. Every arm and seed is kept in a folder, so a cut recording goes on where it was. `--plan` runs
two seeds and says what all would resolve.
"""

import argparse
import math
import random

from domain_llm.core import cache_dir
from domain_llm.data.mix import mixture, tokenize
from domain_llm.demo.documents import make_documents
from domain_llm.demo.facts import deal_values, demo_strings, make_facts, make_machines, make_mcq, split_taught
from domain_llm.judge.ablate import compare_arms, design, run_arms, verdict
from domain_llm.judge.choice import multiple_choice
from domain_llm.models import load
from domain_llm.results import save_result
from domain_llm.train.fit import fitted

MACHINES = 12  # of each part: read about, never read about
TELLINGS = 12  # of each machine in each kind, in other words; one more is asked
SETTINGS = dict(tokens=40_000, learning_rate=4e-4, tokens_per_step=256)
KINDS = ("standard", "book", "web")
COUNTS = dict(machines=MACHINES, tellings=TELLINGS)
ARMS = {"before": dict(kind=None, **COUNTS)}
ARMS |= {kind: dict(kind=kind, **COUNTS, **SETTINGS) for kind in KINDS}


def claim(text, arm, base, metric, more=False, **rest):
    "A claim on the bits of the right value; `metric` names machines and the telling in which they are asked for."
    return dict(text=text, metric=metric, arm=arm, base=base, more=more, matters=0.3, **rest)


CLAIMS = [
    claim("standards teach more than web pages, asked in the handbook's words", "standard", "web", "read in book"),
    claim("the handbook teaches more than web pages, asked in a standard's words", "book", "web", "read in standard"),
    claim(
        "standards teach their facts, asked in the handbook's words", "standard", "before", "read in book", control=True
    ),
    claim("standards teach facts that they do not state", "standard", "before", "unread in book"),
]


def retold(seed, telling):
    "The facts of a world and its documents in other words, without the planted copies and exam questions."
    strings = demo_strings("en")
    rng = {part: random.Random(f"{seed}/{part}") for part in ("machines", "values", "taught", "mcq")}
    machines = make_machines(strings, 2 * MACHINES, rng["machines"])
    deal_values(strings, machines, rng["values"])
    facts = make_facts(strings, machines)
    split_taught(machines, rng["taught"])
    mcq = make_mcq(strings, machines, rng["mcq"])
    documents, planted = make_documents(strings, machines, mcq, random.Random(f"{seed}/documents/{telling}"))
    left_out = {copy for _, copy in planted["duplicates"]} | {leak["id"] for leak in planted["leaks"]}
    return facts, [row for row in documents if row["id"] not in left_out]


def about(documents, kind, names, others):
    "The documents of a kind that are about some machines and name no other."
    found = []
    for row in documents:
        named = any(name in row["text"] for name in names)
        if row["kind"] == kind and named and not any(name in row["text"] for name in others):
            found.append(row)
    return found


def make_parts(seed):
    "By kind the documents to read, and by part and kind the questions on read and unread machines."
    facts, last = retold(seed, TELLINGS)
    names = list(dict.fromkeys(fact["entity"] for fact in facts))
    read, unread = set(names[::2]), set(names[1::2])
    told = [row for telling in range(TELLINGS) for row in retold(seed, telling)[1]]
    documents = {kind: about(told, kind, read, unread) for kind in KINDS}
    stated = [fact for fact in facts if fact["entity"] in unread or all(states(d, fact) for d in documents.values())]
    questions = {}
    for part, own, others in (("read", read, unread), ("unread", unread, read)):
        for kind in KINDS:
            asked = [fact for fact in stated if fact["entity"] in own]
            questions[f"{part} in {kind}"] = in_tellings(asked, about(last, kind, own, others), facts)
    return documents, questions


def states(documents, fact):
    "Whether a document states a fact."
    return any(fact["entity"] in row["text"] and fact["value"] in row["text"] for row in documents)


def in_tellings(asked, documents, facts):
    "A question for each fact: a document up to its value, and all values of its attribute to choose from."
    rows = []
    for fact in asked:
        values = sorted({other["value"] for other in facts if other["attribute"] == fact["attribute"]})
        for row in documents:
            before, found, _ = row["text"].partition(f" {fact['value']}")
            if found and fact["entity"] in before:
                place = dict(question=before, choices=values, answer=values.index(fact["value"]))
                rows.append(place | dict(group=fact["entity"]))
                break
    return rows


def trained(model, tok, documents, seed, arm):
    "The model after an arm's tokens of documents."
    rows = dict(documents=tokenize(documents, tok, arm["kind"], length=512))
    passes = arm["tokens"] / sum(len(row["input_ids"]) for row in rows["documents"])
    read, _ = mixture(rows, dict(documents=1), seed=seed, epochs=passes, max_epochs=1000)
    settings = {name: arm[name] for name in ("learning_rate", "tokens_per_step")}
    return fitted(model, read, seed, length=512, probes=1, **settings)


def measured(model, tok, questions):
    "For each part the bits of the right value among the values of its attribute, one mean a machine."
    found = {}
    for part, rows in questions.items():
        result, machines = multiple_choice(model, tok, rows, template="{question}"), {}
        for name, share in zip(result["groups"], result["prob"]):
            machines.setdefault(name, []).append(-math.log2(max(share, 1e-9)))
        means = [sum(bits) / len(bits) for bits in machines.values()]
        found[part] = dict(values=means, groups=list(range(len(means))))
    return found


def measure(arm, seed):
    "What the demo model knows after an arm's training."
    documents, questions = make_parts(seed)
    model, tok = load(device="cpu")
    if arm["kind"]:
        model = trained(model, tok, documents[arm["kind"]], seed, arm)
    return measured(model, tok, questions)


def plan(runs, seeds):
    "What so many seeds would resolve, from those at hand."
    for row in CLAIMS[:2]:
        parts = compare_arms(runs, row["metric"], row["arm"], row["base"])["parts"]
        said = design(parts, seeds, MACHINES, matters=row["matters"], unit="bits", scale=1)["said"]
        print(f"{row['arm']} against {row['base']}: {said}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, default=5, help="runs of each arm, each with another world (default: 5)")
    p.add_argument("--plan", action="store_true", help="run two seeds and say what all of them would resolve")
    p.add_argument("--runs", default=cache_dir() / "kinds", help="folder of the finished runs (default: the cache)")
    args = p.parse_args()
    runs = run_arms(measure, ARMS, range(2 if args.plan else args.seeds), args.runs)
    if args.plan:
        return plan(runs, args.seeds)
    result = dict(experiment="kinds", arms=ARMS, seeds=list(range(args.seeds)), runs=runs)
    print(save_result("kinds", result | dict(claims=verdict(runs, CLAIMS))))


if __name__ == "__main__":
    main()
