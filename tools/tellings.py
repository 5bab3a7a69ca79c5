"""A demo world whose facts are told many times in other words, for recordings with more text about few machines."""

import random

from domain_llm.demo.documents import make_documents
from domain_llm.demo.facts import deal_values, demo_strings, make_facts, make_machines, make_mcq, split_taught


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
