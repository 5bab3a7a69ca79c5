"""Record what LoRA and full tuning of the pre-trained demo model forget for the same learning, as lora_demo.json.

    python tools/record_lora.py [--seeds 5] [--plan] [--runs FOLDER]

The model is tuned once on conversations about a few machines, by LoRA or in full, at three rates each; a third way goes
a part of the way from the model to its strongest full tuning. Learning is the probability of the right option in
questions about these machines, forgetting the bits per byte of general text. The ways are compared where they have
learnt equally much, and once more after each model has read ten general conversations. Every arm and seed is kept in a
folder, so a cut recording goes on where it was. `--plan` runs two seeds and says what all would resolve.
"""

import copy
import math
import random

from tellings import by_machine, make_told, record

from domain_llm.core import cache_dir, fingerprint
from domain_llm.demo.facts import make_instructions
from domain_llm.demo.general import general_instructions, general_text
from domain_llm.judge.ablate import at_level
from domain_llm.judge.choice import multiple_choice
from domain_llm.judge.score import bits_per_byte
from domain_llm.models import load
from domain_llm.train.fit import fitted, kept_model
from domain_llm.train.sft import encode_all

SIZE = dict(machines=12)
RATES = (5e-5, 1e-4, 2e-4)
LORA = dict(method="lora", rank=64, alpha=64)
SHARES = (0.25, 0.5, 0.75)
STEP = dict(tokens_per_step=256, length=512, probes=1)
REALIGN = dict(learning_rate=5e-5)
LEVEL = 0.38  # of the probability of the right option, a quarter by guessing
TEXTS = 20  # documents of general text

ARMS = {"before": dict(SIZE)}
ARMS |= {f"full {rate:g}": SIZE | dict(learning_rate=rate) for rate in RATES}
ARMS |= {f"LoRA {10 * rate:g}": SIZE | LORA | dict(learning_rate=10 * rate) for rate in RATES}
ARMS |= {f"between {share:g}": SIZE | dict(learning_rate=RATES[-1], share=share) for share in SHARES}


def claim(text, arm, base, metric="text_bpb", **rest):
    "A claim on the bits per byte of general text."
    return dict(text=text, metric=metric, arm=arm, base=base, matters=0.05, **rest)


CLAIMS = [
    claim("LoRA forgets less than full tuning", "LoRA", "full", more=False),
    claim("weights in between forget less than a lower rate", "between", "full", more=False),
    claim("LoRA forgets less, after ten general conversations", "LoRA", "full", "realigned_bpb", more=False),
    claim("a higher rate forgets more", f"full {RATES[-1]:g}", f"full {RATES[0]:g}", control=True),
]


def make_parts(seed, tok, size):
    "Token rows of the conversations about half of the machines, of ten general ones, and the questions on that half."
    world = make_told(seed, size["machines"])
    drawn = random.Random(f"{seed}/instructions")
    own = make_instructions(world["strings"], world["machines"], drawn)
    general = drawn.sample(general_instructions(), 10)
    rows = {}
    for name, conversations in (("own", own), ("general", general)):
        rows[name], _ = encode_all(conversations, tok, length=STEP["length"], source=name)
    read = drawn.sample(rows["own"], len(rows["own"]))
    questions = [row for row in world["mcq"] if row["part"] == "taught"]
    return read, rows["general"], questions[::2]


def between(model, tuned, share):
    "The weights part of the way from a model to a tuned one."
    mixed = copy.deepcopy(model)
    for own, other in zip(mixed.parameters(), tuned.parameters()):
        own.data.lerp_(other.data, share)
    return mixed


def trained(model, tok, rows, arm, seed):
    "The model after an arm's training, as plain weights."
    settings = {name: value for name, value in arm.items() if name not in (*SIZE, "share")}
    if not settings:
        return model
    if arm.get("method") == "lora":
        return fitted(model, rows, seed, **STEP, **settings).merge_and_unload()
    kept = cache_dir() / "lora_models" / fingerprint({**arm, "share": 1}, seed)
    tuned = kept_model(kept, lambda: fitted(model, rows, seed, **STEP, **settings), tok)
    return between(model, tuned, arm["share"]) if "share" in arm else tuned


def text_bits(model, tok):
    "Bits per byte of each document of general text."
    found = bits_per_byte(model, tok, general_text("probe")[:TEXTS], per_doc=True)
    values = [nats / math.log(2) / size for nats, size in found["docs"]]
    return dict(values=values, groups=list(range(len(values))))


def measure(arm, seed):
    "What an arm has learnt and forgotten, and what general text takes after ten general conversations."
    model, tok = load(device="cpu")
    rows, general, questions = make_parts(seed, tok, arm)
    model = trained(model, tok, rows, arm, seed)
    asked = multiple_choice(model, tok, questions)
    model.requires_grad_(True)  # a merged model has frozen weights
    realigned = fitted(model, general, seed, **STEP, **REALIGN)
    return dict(
        learnt=by_machine(asked["prob"], asked["groups"]),
        text_bpb=text_bits(model, tok),
        realigned_bpb=text_bits(realigned, tok),
    )


def at_equal_learning(runs):
    "The runs, and each way where it has learnt as much as `LEVEL` says."
    found = dict(runs)
    for way in ("full", "LoRA", "between"):
        arms = ["before", *(arm for arm in runs if arm.split()[0] == way)]
        if way == "between":
            arms.append(f"full {RATES[-1]:g}")
        found[way] = {}
        for seed in runs["before"]:
            points = [runs[arm][seed] for arm in arms]
            at = {metric: at_level(points, LEVEL, "learnt", metric) for metric in ("text_bpb", "realigned_bpb")}
            if None in at.values():
                raise SystemExit(f"{way}, seed {seed}: no run learns as much as {LEVEL:.0%}; take higher rates.")
            found[way][seed] = at
    return found


if __name__ == "__main__":
    record("lora_demo", __doc__, measure, ARMS, CLAIMS, at_equal_learning, unit="bits per byte", scale=1)
