"""Record what LoRA's rank and alpha do at one learning rate in nbs/results/alpha.json.

    python tools/record_alpha.py [--seeds 3] [--plan] [--runs FOLDER]

A small model that was trained from nothing on twenty machines reads about twenty others twice, through adapters of
three ranks and several scales, alpha over rank. The exam is the surprise at the facts of the new machines, and of the
old ones, in one more telling. Each seed has another world and another model. Every arm and seed is kept in a folder: a
cut recording goes on where it was.
"""

import random

from tellings import by_machine, record

from domain_llm.core import cache_dir
from domain_llm.data.mix import passes, tokenize
from domain_llm.demo.lab import make_lab, stated_facts
from domain_llm.judge.score import value_bits
from domain_llm.small_world import small_model, small_tokenizer
from domain_llm.train.fit import fitted, kept_model

WORLD = dict(entities=40, renderings=61, wordings=1)
PHASE = dict(tokens_per_step=512, length=512, probes=1)
BASE, RATE, EPOCHS = dict(learning_rate=2e-3, epochs=3), 4e-3, 2
SCALES = {4: (0.25, 1, 2, 4), 16: (0.25, 1, 4), 64: (0.25, 0.5, 1, 4)}  # alpha over rank, for each rank


def named(rank, scale):
    "The name of an arm."
    return f"rank {rank}, scale {scale:g}"


ARMS = {
    named(rank, scale): dict(rank=rank, alpha=round(rank * scale), learning_rate=RATE, epochs=EPOCHS)
    for rank, scales in SCALES.items()
    for scale in scales
}
ARMS["rank 16, scale 1, twice the rate"] = dict(rank=16, alpha=16, learning_rate=2 * RATE, epochs=EPOCHS)


def claim(text, arm, base, **rest):
    "A claim that an arm has learnt more: a fact costs it fewer bits."
    return dict(text=text, metric="new", arm=arm, base=base, more=False, matters=0.3, **rest)


CLAIMS = [
    claim("alpha = rank: rank 64 learns more than rank 4", named(64, 1), named(4, 1)),
    claim("alpha = 16: rank 64 learns less than rank 4", named(4, 4), named(64, 0.25)),
    claim("scale 4/sqrt(rank): rank 64 learns more than rank 4", named(64, 0.5), named(4, 2)),
    claim("a larger alpha learns more", named(16, 4), named(16, 0.25), control=True),
]


def world(seed):
    "Token rows of the old and the new machines' documents, and the facts of one more telling of each for the exam."
    lab, tok = make_lab(seed, **WORLD), small_tokenizer()
    last = {row["source"]: row for row in lab["documents"]}
    names, rows, exam = list(last), {}, {}
    for part, own in (("old", names[:20]), ("new", names[20:])):
        read = [row for row in lab["documents"] if row["source"] in own and row is not last[row["source"]]]
        rows[part] = tokenize(read, tok, part, length=256)
        exam[part] = stated_facts([last[name] for name in own], lab["questions"])
    return rows, exam


def read_often(rows, epochs, seed):
    "Some passes over the rows, each in another order."
    tokens = epochs * sum(len(row["input_ids"]) for row in rows)
    return list(passes(rows, tokens, random.Random(seed)))


def measure(arm, seed):
    "Bits per fact of each new and each old machine after an arm's training."
    (rows, exam), tok, arm = world(seed), small_tokenizer(), dict(arm)

    def make():
        read = read_often(rows["old"], BASE["epochs"], seed)
        return fitted(small_model(tok, seed), read, seed, learning_rate=BASE["learning_rate"], **PHASE)

    base = kept_model(cache_dir() / "alpha_models" / str(seed), make, tok)
    read = read_often(rows["new"], arm.pop("epochs"), seed)
    tuned = fitted(base, read, seed, method="lora", **PHASE, **arm)
    found = {part: value_bits(tuned, tok, facts) for part, facts in exam.items()}
    return {part: by_machine(r["values"], r["groups"]) for part, r in found.items()}


if __name__ == "__main__":
    record("alpha", __doc__, measure, ARMS, CLAIMS, seeds=3, unit="bits", scale=1)
