"""Record what the same machines teach as standards, handbook or web pages in nbs/results/kinds.json.

    python tools/record_kinds.py [--seeds 5] [--plan] [--runs FOLDER]

The pre-trained demo model reads about twelve machines in documents of one kind, for equal tokens, among conversations
about six of them. It is asked about the other six, and about six that it never read of. Every arm and seed is kept in a
folder, so a cut recording goes on where it was. `--plan` runs two seeds and says what all would resolve:
so far, that five seeds cannot tell 5 points, so there is no record yet. The runs are in nbs/results/kinds_runs.
"""

import argparse
import random

from domain_llm.core import cache_dir
from domain_llm.data.mix import mixture, tokenize
from domain_llm.demo.documents import make_documents
from domain_llm.demo.facts import deal_values, demo_strings, make_facts, make_machines, make_mcq, split_taught
from domain_llm.demo.world import make_world
from domain_llm.judge.ablate import compare_arms, design, run_arms, verdict
from domain_llm.judge.choice import multiple_choice
from domain_llm.models import load
from domain_llm.results import save_result
from domain_llm.train.fit import fitted
from domain_llm.train.sft import encode_all

MACHINES = 6  # of each part: read about, read about and talked about, never read about
QUESTIONS = 4  # on each fact
TELLINGS = 12  # of each machine in each kind, in other words
SETTINGS = dict(tokens=150_000, documents=3, conversations=1, learning_rate=4e-4, tokens_per_step=256)
KINDS = ("standard", "book", "web")
COUNTS = dict(machines=MACHINES, questions=QUESTIONS, tellings=TELLINGS)
ARMS = {"before": dict(kind=None, **COUNTS)}
ARMS |= {kind: dict(kind=kind, **COUNTS, **SETTINGS) for kind in KINDS}


def claim(text, arm, base, metric="read", **more):
    "A claim on the share of the right option."
    return dict(text=text, metric=metric, arm=arm, base=base, more=True, matters=0.05, **more)


CLAIMS = [
    claim("standards teach more than web pages about the same machines, token for token", "standard", "web"),
    claim("the handbook teaches more than web pages about the same machines, token for token", "book", "web"),
    claim("standards teach their facts", "standard", "before", control=True),
    claim("standards teach facts that they do not state", "standard", "before", metric="unread"),
]


def make_parts(seed):
    "The documents by kind, the conversations, and the questions on machines that are read about and that are not."
    world = make_world(seed, entities=4 * MACHINES)
    taught = set(world["taught"][:MACHINES])
    held = [name for name in dict.fromkeys(fact["entity"] for fact in world["facts"]) if name not in world["taught"]]
    parts = dict(read=held[:MACHINES], unread=held[MACHINES : 2 * MACHINES])
    known = {*parts["read"], *taught}
    others = {fact["entity"] for fact in world["facts"]} - known
    told = [row for telling in range(TELLINGS) for row in retold(seed, telling)]
    documents = {kind: about(told, kind, known, others) for kind in KINDS}
    conversations = [row for row in world["instructions"] if any(name in str(row["messages"]) for name in taught)]
    questions = {part: asked(world, names, seed) for part, names in parts.items()}
    everywhere = {f["id"] for f in world["facts"] if all(states(rows, f) for rows in documents.values())}
    questions["read"] = [row for row in questions["read"] if row["fact"] in everywhere]
    return documents, conversations, questions


def retold(seed, telling):
    "The documents of the same world in other words, without the planted copies and exam questions."
    t, rng = (
        demo_strings("en"),
        {part: random.Random(f"{seed}/{part}") for part in ("machines", "values", "taught", "mcq")},
    )
    machines = make_machines(t, 4 * MACHINES, rng["machines"])
    deal_values(t, machines, rng["values"])
    make_facts(t, machines)
    split_taught(machines, rng["taught"])
    mcq = make_mcq(t, machines, rng["mcq"])
    documents, planted = make_documents(t, machines, mcq, random.Random(f"{seed}/documents/{telling}"))
    left_out = {copy for _, copy in planted["duplicates"]} | {leak["id"] for leak in planted["leaks"]}
    return [row for row in documents if row["id"] not in left_out]


def about(documents, kind, names, others):
    "The documents of a kind that are about some machines and name no other."
    found = []
    for row in documents:
        named = any(name in row["text"] for name in names)
        if row["kind"] == kind and named and not any(name in row["text"] for name in others):
            found.append(row)
    return found


def asked(world, names, seed):
    "So many questions on each fact of the machines."
    rng, rows = random.Random(seed), []
    for fact in world["facts"]:
        if fact["entity"] in names:
            rows += rng.sample([row for row in world["mcq"] if row["fact"] == fact["id"]], QUESTIONS)
    return rows


def states(documents, fact):
    "Whether a document states a fact."
    return any(fact["entity"] in row["text"] and fact["value"] in row["text"] for row in documents)


def trained(model, tok, documents, conversations, seed, arm):
    "The model after an arm's tokens of documents and conversations."
    sources = dict(documents=tokenize(documents, tok, arm["kind"], length=512))
    sources["conversations"] = [dict(row, source="conversations") for row in encode_all(conversations, tok, 512)[0]]
    shares = dict(documents=arm["documents"], conversations=arm["conversations"])
    wanted = arm["tokens"] * arm["documents"] / sum(shares.values())
    passes = wanted / sum(len(row["input_ids"]) for row in sources["documents"])
    read, _ = mixture(sources, shares, seed=seed, epochs=passes, max_epochs=1000)
    settings = {name: arm[name] for name in ("learning_rate", "tokens_per_step")}
    return fitted(model, read, seed, length=512, probes=1, **settings)


def measured(model, tok, questions):
    "The share of the right option of each question, grouped by the machine's place."
    found = {}
    for part, rows in questions.items():
        result = multiple_choice(model, tok, rows)
        place = {name: n for n, name in enumerate(dict.fromkeys(result["groups"]))}
        groups = [place[name] for name in result["groups"]]
        found[part] = dict(values=list(result["prob"]), groups=groups)
        found[f"{part}_mcq"] = dict(values=[float(x) for x in result["correct"]], groups=groups)
    return found


def measure(arm, seed):
    "What the demo model knows after an arm's training."
    documents, conversations, questions = make_parts(seed)
    model, tok = load(device="cpu")
    if arm["kind"]:
        model = trained(model, tok, documents[arm["kind"]], conversations, seed, arm)
    return measured(model, tok, questions)


def plan(runs, seeds):
    "What so many seeds would resolve, from those at hand."
    for row in CLAIMS[:2]:
        parts = compare_arms(runs, row["metric"], row["arm"], row["base"])["parts"]
        said = design(parts, seeds, MACHINES, matters=row["matters"])["said"]
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
