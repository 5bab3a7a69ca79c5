"""Experiments on a demo world whose facts are told many times in other words: more text about few machines."""

import argparse
import random
from statistics import fmean

from domain_llm.core import cache_dir
from domain_llm.demo.documents import make_documents
from domain_llm.demo.facts import deal_values, demo_strings, make_facts, make_machines, make_mcq, split_taught
from domain_llm.judge.ablate import compare_arms, design, run_arms, verdict
from domain_llm.results import save_result


def make_told(seed, entities):
    "A world without its documents: dict of strings, machines, facts and mcq (the exam)."
    strings = demo_strings("en")
    rng = {part: random.Random(f"{seed}/{part}") for part in ("machines", "values", "taught", "mcq")}
    machines = make_machines(strings, entities, rng["machines"])
    deal_values(strings, machines, rng["values"])
    facts = make_facts(strings, machines)
    split_taught(machines, rng["taught"])
    return dict(strings=strings, machines=machines, facts=facts, mcq=make_mcq(strings, machines, rng["mcq"]))


def telling(world, seed, n):
    "The documents of a world in the words of its n-th telling, without the planted copies and exam questions."
    drawn = random.Random(f"{seed}/documents/{n}")
    documents, planted = make_documents(world["strings"], world["machines"], world["mcq"], drawn)
    left_out = {copy for _, copy in planted["duplicates"]} | {leak["id"] for leak in planted["leaks"]}
    return [row for row in documents if row["id"] not in left_out]


def by_machine(values, machines):
    "A metric with one mean a machine; machines are groups by their place, since each seed has its own."
    own = {}
    for value, name in zip(values, machines):
        own.setdefault(name, []).append(value)
    means = [fmean(some) for some in own.values()]
    return dict(values=means, groups=list(range(len(means))))


def designs(runs, claims, seeds, **said):
    "For each claim, what so many seeds will resolve, by the scatter of the runs of a pilot."
    found = {}
    for row in claims:
        compared = compare_arms(runs, row["metric"], row["arm"], row["base"])
        planned = design(compared["parts"], seeds, compared["groups"], row["matters"], **said)
        found[row["text"]] = planned["said"]
    return found


def record(name, about, measure, arms, claims, derive=dict, seeds=5, **said):
    """The command of a recording: says by two seeds what all will resolve, runs the arms and saves the verdicts.

    The claims are about what `derive` makes of the runs.
    """
    p = argparse.ArgumentParser(description=about.split("\n")[0])
    p.add_argument(
        "--seeds", type=int, default=seeds, help="runs of each arm, each with another world (default: %(default)s)"
    )
    p.add_argument("--plan", action="store_true", help="run two seeds and say what all of them would resolve")
    p.add_argument("--runs", default=cache_dir() / name, help="folder of the finished runs (default: the cache)")
    args = p.parse_args()
    pilot = run_arms(measure, arms, range(2), args.runs)
    planned = designs(derive(pilot), claims, args.seeds, **said)
    print("\n".join(f"{text}: {resolves}" for text, resolves in planned.items()))
    if args.plan:
        return
    runs = run_arms(measure, arms, range(args.seeds), args.runs)
    result = dict(experiment=name, arms=arms, seeds=list(range(args.seeds)), runs=runs, design=planned)
    print(save_result(name, result | dict(claims=verdict(derive(runs), claims))))
