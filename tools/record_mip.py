"""Record questions among the documents, or after them, with the pre-trained demo model in nbs/results/mip_demo.json.

    python tools/record_mip.py [--seeds 5] [--plan] [--runs FOLDER]

The model reads standards about a few machines in several wordings, and conversations about half of these machines: in
one run (mixed), or the documents first and the conversations afterwards at half the rate (then). Both read the same
rows equally often. Multiple-choice questions ask about the taught half, and about the held-out half, on which no
conversation was. Every arm and seed is kept in a folder, so a cut recording goes on where it was. `--plan` runs two
seeds and says what all would resolve.
"""

import random

from tellings import by_machine, make_told, record, telling

from domain_llm.core import cache_dir, fingerprint
from domain_llm.data.mix import mixture, tokenize
from domain_llm.demo.facts import make_instructions
from domain_llm.judge.choice import multiple_choice
from domain_llm.models import load
from domain_llm.train.fit import fitted, kept_model
from domain_llm.train.sft import encode_all

SIZE = dict(machines=12, tellings=12, passes=2)
SETTINGS = dict(SIZE, learning_rate=4e-4, tokens_per_step=256)
ARMS = {
    "before": dict(SIZE, way="before"),
    "mixed": dict(SETTINGS, way="mixed"),
    "documents alone": dict(SETTINGS, way="alone"),
    "then": dict(SETTINGS, way="then"),
}
PARTS = ("taught", "held-out")


def claim(text, arm, base, metric="held-out", **rest):
    "A claim on the probability of the right option."
    return dict(text=text, metric=metric, arm=arm, base=base, matters=0.05, **rest)


CLAIMS = [
    claim("questions among the documents teach more about other machines than questions afterwards", "mixed", "then"),
    claim("questions among the documents teach more about other machines than none", "mixed", "documents alone"),
    claim("questions afterwards teach less about other machines than none", "then", "documents alone", more=False),
    claim("questions teach the machines that they ask about", "mixed", "before", "taught", control=True),
]


def make_parts(seed, size):
    "The standards in all wordings, the conversations on taught machines, and the questions by part."
    world = make_told(seed, size["machines"])
    names = [machine["e"] for machine in world["machines"]]
    rows = [row for n in range(size["tellings"]) for row in telling(world, seed, n) if row["kind"] == "standard"]
    documents = [row for row in rows if any(name in row["text"] for name in names)]
    drawn = random.Random(f"{seed}/instructions")
    conversations = make_instructions(world["strings"], world["machines"], drawn)
    questions = {part: [row for row in world["mcq"] if row["part"] == part] for part in PARTS}
    return documents, conversations, questions


def read_by(tok, documents, conversations, seed, arm):
    "The rows of one run: all documents so many times, and half as many tokens of conversations."
    said, _ = encode_all(conversations, tok, length=512, source="instructions")
    sources = dict(domain=tokenize(documents, tok, "domain", length=512), instructions=said)
    rows, _ = mixture(sources, dict(domain=2, instructions=1), seed=seed, epochs=arm["passes"], max_epochs=1000)
    return rows


def trained(arm, seed, documents, conversations):
    "Model and tokenizer after an arm's training; `then` goes on from the model that read the documents alone."
    model, tok = load(device="cpu")
    if arm["way"] == "before":
        return model, tok
    rows = read_by(tok, documents, conversations, seed, arm)
    part = {source: [row for row in rows if row["source"] == source] for source in ("domain", "instructions")}
    rate, fixed = arm["learning_rate"], dict(tokens_per_step=arm["tokens_per_step"], length=512, probes=1)
    if arm["way"] == "mixed":
        return fitted(model, rows, seed, learning_rate=rate, **fixed), tok
    kept = cache_dir() / "mip_demo" / fingerprint({**arm, "way": "alone"}, seed)
    alone = kept_model(kept, lambda: fitted(model, part["domain"], seed, learning_rate=rate, **fixed), tok)
    if arm["way"] == "alone":
        return alone, tok
    return fitted(alone, part["instructions"], seed, learning_rate=rate / 2, **fixed), tok


def measure(arm, seed):
    "For both halves the probability of the right option, one mean a machine, and the share of right answers."
    documents, conversations, questions = make_parts(seed, arm)
    model, tok = trained(arm, seed, documents, conversations)
    found = {}
    for part, rows in questions.items():
        result = multiple_choice(model, tok, rows)
        for metric, values in ((part, result["prob"]), (f"{part}, right", result["correct"])):
            found[metric] = by_machine(values, result["groups"])
    return found


if __name__ == "__main__":
    record("mip_demo", __doc__, measure, ARMS, CLAIMS)
