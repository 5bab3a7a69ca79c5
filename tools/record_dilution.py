"""Record what web pages about other machines cost the pre-trained demo model in nbs/results/dilution_demo.json.

    python tools/record_dilution.py [--seeds 5] [--plan] [--runs FOLDER]

The model reads standards about a few machines, alone or among web pages that tell of others, for equal tokens. How well
it knows the values of the few is asked in a telling of the handbook, which no arm has read; machines that it never read
of are asked for as well. Every arm and seed is kept in a folder, so a cut recording goes on where it was. `--plan` runs
two seeds and says what all would resolve.
"""

import math

from tellings import by_machine, make_told, record, telling

from domain_llm.data.mix import mixture, tokenize
from domain_llm.judge.choice import multiple_choice
from domain_llm.models import load
from domain_llm.train.fit import fitted

MACHINES = 6  # that are read about, and as many that never are
OTHERS = 120  # machines that web pages tell of
TELLINGS = 12  # of each machine in other words; one more is asked
SETTINGS = dict(tokens=32_000, learning_rate=4e-4, tokens_per_step=256)
SIZE = dict(machines=MACHINES, tellings=TELLINGS)
ARMS = {
    "before": dict(SIZE, tokens=0),
    "standards": dict(SIZE, **SETTINGS, others=0),
    "standards, 1:3": dict(SIZE, **SETTINGS, others=3),
}


def claim(text, arm, base, metric="bits", **rest):
    "A claim on the bits of the right value."
    return dict(text=text, metric=metric, arm=arm, base=base, more=False, matters=0.3, **rest)


CLAIMS = [
    claim(
        "token for token, standards alone teach more than among three parts of web pages about other machines",
        "standards",
        "standards, 1:3",
    ),
    claim("standards teach their facts", "standards", "before", control=True),
    claim("standards teach facts that they do not state", "standards", "before", metric="bits_unread"),
]


def about(documents, kind, names, others):
    "The documents of a kind that are about some machines and name none of the others."
    found = []
    for row in documents:
        named = any(name in row["text"] for name in names)
        if row["kind"] == kind and named and not any(name in row["text"] for name in others):
            found.append(row)
    return found


def make_parts(seed):
    "The standards and the web pages to read, and the questions on machines that are read about and that are not."
    world = make_told(seed, 2 * MACHINES + OTHERS)
    facts, last = world["facts"], telling(world, seed, TELLINGS)
    names = list(dict.fromkeys(fact["entity"] for fact in facts))
    read, unread, others = names[:MACHINES], names[MACHINES : 2 * MACHINES], names[2 * MACHINES :]
    tellings = [row for n in range(TELLINGS) for row in telling(world, seed, n)]
    documents = dict(
        standards=about(tellings, "standard", read, [*unread, *others]),
        others=about(last, "web", others, [*read, *unread]),
    )
    questions = dict(bits=in_handbook(read, last, facts), bits_unread=in_handbook(unread, last, facts))
    return documents, questions


def in_handbook(names, documents, facts):
    "A question for each fact of the machines: the handbook up to its value, and all values of its attribute."
    pages = [row["text"] for row in documents if row["kind"] == "book"]
    rows = []
    for fact in facts:
        values = sorted({other["value"] for other in facts if other["attribute"] == fact["attribute"]})
        cut = [page.partition(f" {fact['value']}") for page in pages if fact["entity"] in page]
        before = next((before for before, found, _ in cut if found and fact["entity"] in before), None)
        if fact["entity"] in names and before:
            place = dict(question=before, choices=values, answer=values.index(fact["value"]))
            rows.append(place | dict(group=fact["entity"]))
    return rows


def trained(model, tok, documents, seed, arm):
    "The model after an arm's tokens."
    shares = dict(standards=1, others=arm["others"]) if arm["others"] else dict(standards=1)
    rows = {kind: tokenize(documents[kind], tok, kind, length=512) for kind in shares}
    wanted = arm["tokens"] / sum(shares.values())
    passes = wanted / sum(len(row["input_ids"]) for row in rows["standards"])
    read, _ = mixture(rows, shares, seed=seed, epochs=passes, max_epochs=1000)
    settings = {name: arm[name] for name in ("learning_rate", "tokens_per_step")}
    return fitted(model, read, seed, length=512, probes=1, **settings)


def measured(model, tok, questions):
    "For each part the bits of the right value among the values of its attribute, one mean a machine."
    found = {}
    for part, rows in questions.items():
        result = multiple_choice(model, tok, rows, template="{question}")
        bits = [-math.log2(max(share, 1e-9)) for share in result["prob"]]
        found[part] = by_machine(bits, result["groups"])
    return found


def measure(arm, seed):
    "What the demo model knows after an arm's training."
    documents, questions = make_parts(seed)
    model, tok = load(device="cpu")
    if arm["tokens"]:
        model = trained(model, tok, documents, seed, arm)
    return measured(model, tok, questions)


if __name__ == "__main__":
    record("dilution_demo", __doc__, measure, ARMS, CLAIMS, unit="bits", scale=1)
