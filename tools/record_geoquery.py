"""Record a model tuned on GeoQuery beside the rules in nbs/results/geoquery.json.

    python tools/record_geoquery.py PATH/TO/GEOQUERY [--split query] [--passes 4]

The pre-trained demo model is tuned on the training part of the question split, or of the query split, in which no query
of the test was trained. How it answers (freely or within the grammar, the first answer or a vote) and from which
confidence on is chosen on dev; the test is asked once, in that way. Model and answers are kept in the cache folder,
so a cut recording goes on where it was. Each split has its entry in the record.
"""

import argparse
import sqlite3
import time
from pathlib import Path

from record_rules import WANTED, figures, geoquery_rows
from record_text2sql import SAMPLES, kept_write, trained

from domain_llm.core import cache_dir, fingerprint
from domain_llm.results import load_result, results_dir, save_result
from domain_llm.ship.ask import shape_of
from domain_llm.ship.rules import choose_threshold, learn_rules
from domain_llm.ship.schema import read_schema
from domain_llm.ship.spelling import canonical
from domain_llm.ship.sql import tried
from domain_llm.ship.text2sql import answers_to, confidence, fit_confidence, in_torch, judged, sql_setting

WAYS = {
    "first answer": (False, False),
    "vote": (False, True),
    "grammar, first answer": (True, False),
    "grammar, vote": (True, True),
}


def split_rows(folder, split, schema):
    "The rows of train, dev and test whose query runs, in one spelling."
    rows = [row for row in geoquery_rows(folder, split) if row["sql"]]
    rows = [dict(row, sql=canonical(row["sql"], schema)) for row in rows]
    return [[row for row in rows if row["split"] == part] for part in ("train", "dev", "test")]


def asked(rows, part, way, writer, settings, folder):
    "What a way of answering gives for rows, as from `judged`."
    grammar, voting = WAYS[way]
    path = folder / f"{part}_{'grammar' if grammar else 'free'}.json"
    answered = answers_to([row["question"] for row in rows], kept_write(path, writer), settings[grammar])
    return judged(rows, answered, settings[grammar], voting)


def best_way(found):
    "The way with most right answers; the simplest of equals."
    return max(found, key=lambda way: sum(found[way]["correct"]))


def compared(folder, split, passes):
    "The figures of rules and model on dev and test."
    schema, con = read_schema(folder / "geography.sqlite"), sqlite3.connect(folder / "geography.sqlite")
    train, dev, test = split_rows(folder, split, schema)
    kept = cache_dir() / "geoquery" / fingerprint(split, passes, SAMPLES, train, dev, test)
    kept.mkdir(parents=True, exist_ok=True)
    settings = {grammar: sql_setting(train, con, schema, grammar=grammar) for grammar in (False, True)}
    model, tok = trained(train, con, settings[True], True, passes, kept)
    writer = in_torch(model, tok, SAMPLES)
    on_dev = {way: asked(dev, "dev", way, writer, settings, kept) for way in WAYS}
    way = best_way(on_dev)
    on_test = asked(test, "test", way, writer, settings, kept)
    weights = fit_confidence(on_dev[way]["evidence"], on_dev[way]["correct"])
    for found in (on_dev[way], on_test):
        found["confidence"] = [confidence(some, weights) for some in found["evidence"]]
    rules = learn_rules(train, con, schema)
    by_rules = told_part(tried(dev, rules, con), tried(test, rules, con))
    by_model = told_part(on_dev[way], on_test)
    known = {shape_of(row["sql"]) for row in train}
    new = [good for row, good in zip(test, on_test["correct"]) if shape_of(row["sql"]) not in known]
    by_model |= dict(new_shapes=len(new), new_right=sum(new))
    ways = {name: sum(found["correct"]) for name, found in on_dev.items()}
    return dict(
        passes=passes, train=len(train), way=way, ways_on_dev=ways, wanted=WANTED, rules=by_rules, model=by_model
    )


def told_part(dev, test):
    "The threshold that dev gives, and the figures of both parts."
    threshold = choose_threshold(dev["confidence"], dev["correct"], WANTED)
    return dict(threshold=threshold, dev=figures(dev, threshold), test=figures(test, threshold))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="question", choices=("question", "query"))
    parser.add_argument("--passes", type=int, default=4)
    given, started = parser.parse_args(), time.time()
    found = compared(given.folder, given.split, given.passes)
    print(found)
    before = load_result("geoquery")["splits"] if (results_dir() / "geoquery.json").exists() else {}
    print(save_result("geoquery", dict(splits={**before, given.split: found}), started))


if __name__ == "__main__":
    main()
