"""Record a review of real models in nbs/results/review_models.json: base, tuned and quantized.

    python tools/record_review_models.py [--folder runs/review_models] [--judged 138]

The base is the demo model, the tuned one a run of its own on the demo's instructions, the quantized one that run's Q4_0
file. They answer the demo's open questions greedily, and every pair of answers is judged by the rule that knows the
demo's facts, by the base model itself as a judge (its Q8_0 file behind llama.cpp's server), and by three simulated
reviewers. Nobody is asked. With --judged N the model judges the pairs of N drawn questions only. Run, answers and
replies are kept in the folder as they come, so that calling it again resumes.
"""

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import yaml

from domain_llm.demo.world import make_world
from domain_llm.judge.answers import value_in_answer, with_interval
from domain_llm.judge.packet import CALIBRATION, build_packet, said_size
from domain_llm.judge.review import questions_needed, review_power, win_rates
from domain_llm.judge.reviewers import simulate_marks
from domain_llm.models import DEMO_MODEL
from domain_llm.results import save_result
from domain_llm.run.pipeline import run_recipe
from domain_llm.run.review_result import reviewed
from domain_llm.run.review_start import answers_of
from domain_llm.ship.gguf import export_gguf
from domain_llm.ship.llm_judge import beside_people, judge_items, judge_marks
from domain_llm.ship.serve import gguf_of, server

PREFERENCE = 0.6  # win rate that the review must tell from one half
PEOPLE = dict(R1=dict(sharp=1.5), R2=dict(sharp=1.5, left=1.0), R3=dict(careless=0.2))  # simulated
SIZE = dict(reviewers=len(PEOPLE), comparisons=3)  # three pairs of models share the 5%
OPEN = 5  # open questions on a machine of the demo
SHARP = 3.0  # quality, in log odds, of an answer that states all that was asked
ANSWER, REPLY = 48, 24  # longest answer and longest reply of the judge, in tokens
PORT = 8391  # a fixed one: replies are kept under the judge's address
SEED = 0


def size():
    "How many questions a preference takes, and how many machines have so many, those of the calibration on top."
    questions = questions_needed(PREFERENCE, **SIZE)
    machines = math.ceil((questions + CALIBRATION) / OPEN)
    power = {name: review_power(n, rate=PREFERENCE, **SIZE) for name, n in dict(q=questions, m=machines).items()}
    return dict(preference=PREFERENCE, **SIZE, questions=questions, machines=machines, power=power)


def recipe(machines):
    "The run of the tuned model: full fine-tuning on the conversations about half of the machines."
    sft = dict(method="full", learning_rate=6e-4, tokens_per_step=256, length=256, epochs=2, probes=1)
    return dict(
        name="review-models",
        demo=machines,
        seed=SEED,
        mix=dict(parts=dict(domain=1)),
        pretrain=False,
        sft=sft | dict(forgetting_budget=1),
        evaluate=dict(questions=60, probe_tokens=1000),
        quantize=dict(types=["q4_0"]),
    )


def tuned(folder, machines):
    "The folder of the finished run."
    path, out = folder / "tuned.yaml", folder / "tuned"
    path.write_text(yaml.safe_dump(recipe(machines), sort_keys=False), encoding="utf-8")
    run_recipe(path, out)
    return out


def shares(questions, facts, answers):
    "What share of the values that a question asks for each answer states."
    values = {}
    for fact in facts:
        values.setdefault(fact["entity"], []).append(fact["value"])
    found = []
    for row, answer in zip(questions, answers):
        asked = [value for value in values[row["group"]] if value in row["reference"]]
        found.append(value_in_answer([answer] * len(asked), asked)["mean"])
    return found


def ruled(key, share):
    "The marks of the rule: of two answers the one that states more of what was asked is better."
    rows = [row for row in key["items"] if row["reviewer"] == "R1" and row["role"] == "compare"]
    rows += [dict(row, item=f"same {i}") for i, row in enumerate(key["same"])]
    marks = []
    for row in rows:
        left, right = (share[row[side]][int(row["question"][1:])] for side in ("left", "right"))
        equal = "tie" if left else "both bad"
        mark = "left" if left > right else "right" if right > left else equal
        marks.append(dict(row, reviewer="rule", mark=mark))
    return marks


def simulated(key, share):
    "The review of the simulated reviewers, who see the quality that the rule computes."
    quality = {name: {f"q{i}": SHARP * value for i, value in enumerate(mine)} for name, mine in share.items()}
    shown = {row["question"] for row in key["items"]}
    quality |= dict(good=dict.fromkeys(shown, SHARP), bad=dict.fromkeys(shown, 0.0))
    return reviewed(simulate_marks(key["items"], quality, PEOPLE, SEED), key)


def judged(folder, packet, key, questions):
    "The marks of the local model as a judge on so many drawn questions, and the number of replies without a mark."
    rows = judge_items(packet, key)
    names = sorted({row["question"] for row in rows})
    random.Random(SEED).shuffle(names)
    mine = set(names[:questions])
    file = export_gguf(DEMO_MODEL, folder / "judge", "q8_0")["q8_0"]
    with server(file, port=PORT) as url:
        asked = [row for row in rows if row["question"] in mine]
        return judge_marks(asked, url, folder / "replies.jsonl", max_tokens=REPLY)


def by_part(questions, share):
    "The mean share of each model on taught and held-out machines, with 95% intervals over machines."
    found = {}
    for name, values in share.items():
        for part in ("taught", "held-out"):
            mine = [(value, row["group"]) for value, row in zip(values, questions) if row["part"] == part]
            told = with_interval(*zip(*mine))
            found.setdefault(name, {})[part] = {key: told[key] for key in ("mean", "low", "high", "n")}
    return found


def record(folder, planned, questions, facts, answers, asked):
    "What is recorded of the review."
    packet, key = build_packet(questions, answers, reviewers=len(PEOPLE), seed=SEED)
    share = {name: shares(questions, facts, texts) for name, texts in answers.items()}
    rule, (model, unclear) = ruled(key, share), judged(folder, packet, key, asked)
    examples = [i for i, row in enumerate(questions) if row["part"] == "taught"][:4]
    people = simulated(key, share)
    kept = ("reviewers", "calibration", "failed", "rates", "agreement", "self_agreement", "position", "rule")
    compared = [row for row in rule if not row["item"].startswith("same")]
    return dict(
        planned=planned,
        people=PEOPLE,
        said=said_size(key),
        equal=len(key["same"]),
        share=share,
        groups=[row["group"] for row in questions],
        parts=by_part(questions, share),
        examples=[dict(questions[i], **{name: texts[i] for name, texts in answers.items()}) for i in examples],
        rule=dict(rates=win_rates(rule), marks=Counter(row["mark"] for row in rule)),
        simulated={name: people[name] for name in kept},
        judge=dict(
            rates=win_rates(model) if model else [],
            marks=Counter(row["mark"] for row in model),
            unclear=unclear,
            asked=asked or len({row["question"] for row in compared}),
            beside_rule=beside_people(compared, model),
        ),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/review_models"))
    parser.add_argument("--judged", type=int, help="questions on which the model judges; all when not given")
    given, started = parser.parse_args(), time.time()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    planned = size()
    run = tuned(folder, planned["machines"])
    world = make_world(seed=SEED, entities=planned["machines"])
    sources = dict(base=DEMO_MODEL, tuned=str(run), quantized=str(gguf_of(run)))
    answers = {name: answers_of(source, world["open"], folder, ANSWER) for name, source in sources.items()}
    found = record(folder, planned, world["open"], world["facts"], answers, given.judged)
    print(save_result("review_models", found, started))


if __name__ == "__main__":
    main()
