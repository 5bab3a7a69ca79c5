"""Record the Text-to-SQL comparison with the pre-trained demo model in nbs/results/text2sql.json.

    python tools/record_text2sql.py [--lang zh] [--passes 2]
    python tools/record_text2sql.py --untuned       (the same model without training: nbs/results/text2sql_untuned.json)

Two models are trained on the demo's questions, one with the question alone and one with what it names; each is asked
all questions of dev and of the test, without and with the grammar. Models and answers are kept in the cache folder,
so a cut recording goes on where it was.
"""

import argparse
import random
import sqlite3
import time

from domain_llm.core import cache_dir, fingerprint, read_json, write_json
from domain_llm.demo.database import insert_tables, make_composed
from domain_llm.demo.world import make_world
from domain_llm.judge.answers import with_interval
from domain_llm.models import load
from domain_llm.results import save_result
from domain_llm.ship.rules import choose_threshold, learn_rules
from domain_llm.ship.schema import read_schema
from domain_llm.ship.spelling import canonical
from domain_llm.ship.sql import tried
from domain_llm.ship.sqlrows import column_values, exchanged, sql_messages
from domain_llm.ship.text2sql import answers_to, confidence, fit_confidence, in_torch, judged, sql_setting
from domain_llm.train.fit import fitted, kept_model
from domain_llm.train.sft import encode_all

WANTED = 0.95  # accuracy among the answered of dev
SAMPLES = 4
ARMS = {
    "plain": (False, False),
    "plain, grammar": (False, True),
    "linked": (True, False),
    "linked, grammar": (True, True),
}
OURS = "linked, grammar, choice"


def make_parts(world, schema, lang):
    "The training questions and the parts that are asked, with the queries in one spelling."
    rows = [dict(row, sql=canonical(row["sql"], schema)) for row in world["sql"]]
    shapes = list(dict.fromkeys(row["shape"] for row in rows if row["split"] == "train"))
    held = set(shapes[3::8])
    train = [row for row in rows if row["split"] == "train" and row["shape"] not in held]
    known = {row["shape"] for row in train}
    test = [row for row in rows if row["split"] == "test"]
    return train, dict(
        dev=[row for row in rows if row["split"] == "dev" or row["shape"] in held],
        known=[row for row in test if row["shape"] in known],
        new=[row for row in test if row["shape"] not in known | held],
        composed=make_composed(world["tables"], lang),
    )


def trained(train, con, setting, linking, passes, folder):
    "The demo model, trained on the questions with other values too, and its tokenizer."
    base, tok = load(device="cpu")
    many = exchanged(train, column_values(con, setting["schema"]), setting["index"], setting["schema"], times=2)
    index, links = (setting["index"], setting["links"]) if linking else (None, None)
    coded, _ = encode_all(sql_messages(many, setting["schema"], index, links), tok, 512)
    order = [row for seed in range(passes) for row in random.Random(seed).sample(coded, len(coded))]

    def make():
        return fitted(base, order, tokens_per_step=512, length=512, probes=1)

    return kept_model(folder / f"model_{'linked' if linking else 'plain'}", make, tok), tok


def kept_write(path, write):
    "As `write`, with the answers kept in a file and read from there the next time."

    def kept(texts, grammars):
        if not path.exists():
            write_json(path, write(texts, grammars))
        return read_json(path)

    return kept


def all_results(train, parts, con, schema, passes, folder):
    "For each arm and part the lists of `judged` or, for the rules, of `tried`."
    rules = learn_rules(train, con, schema)
    results = {("rules", part): tried(rows, rules, con) for part, rows in parts.items()}
    for name, (linking, grammar) in ARMS.items():
        setting = sql_setting(train, con, schema, linking, grammar)
        model, tok = trained(train, con, setting, linking, passes, folder)
        last = name == "linked, grammar"
        for part, rows in parts.items():
            write = in_torch(model, tok, SAMPLES if last else 0)
            path = folder / f"{name}_{part}.json".replace(", ", "_")
            answered = answers_to([row["question"] for row in rows], kept_write(path, write), setting)
            results[name, part] = judged(rows, answered, setting, voting=False)
            if last:
                results[OURS, part] = judged(rows, answered, setting)
    return results


def untuned(train, parts, con, schema, folder):
    "For each part of the test the number that the model answers rightly without training, kept to the grammar."
    setting, write = sql_setting(train, con, schema), in_torch(*load(device="cpu"), 0)
    found = {}
    for part in ("known", "new", "composed"):
        rows, path = parts[part], folder / f"untuned_linked_grammar_{part}.json"
        answered = answers_to([row["question"] for row in rows], kept_write(path, write), setting)
        correct = judged(rows, answered, setting, voting=False)["correct"]
        right = with_interval(correct, [row["shape"] for row in rows])
        found[part] = dict(right=sum(correct), n=len(correct), low=right["low"], high=right["high"])
    return found


def figures(results, parts):
    "For each arm and part the number right with an interval over shapes; for rules and choice what is answered."
    on_dev = results[OURS, "dev"]
    weights = fit_confidence(on_dev["evidence"], on_dev["correct"])
    for part in parts:
        results[OURS, part]["confidence"] = [confidence(some, weights) for some in results[OURS, part]["evidence"]]
    out, thresholds = {}, {}
    for name in ("rules", OURS):
        dev = results[name, "dev"]
        thresholds[name] = choose_threshold(dev["confidence"], dev["correct"], WANTED)
    for (name, part), found in results.items():
        right = with_interval(found["correct"], [row["shape"] for row in parts[part]])
        told = dict(right=sum(found["correct"]), n=len(found["correct"]), low=right["low"], high=right["high"])
        if name in ("rules", OURS):
            kept = [good for good, c in zip(found["correct"], found["confidence"]) if c >= thresholds[name]]
            told |= dict(threshold=thresholds[name], answered=len(kept), right_answered=sum(kept))
        out.setdefault(name, {})[part] = told
    return dict(arms=out, weights=weights, together={part: together(results, part, thresholds) for part in parts})


def together(results, part, thresholds):
    "Questions that are answered, and answered rightly, where the rules come first and then the model."
    kept = []
    both = [zip(results[name, part]["confidence"], results[name, part]["correct"]) for name in ("rules", OURS)]
    for (by_rules, rules_right), (by_model, model_right) in zip(*both):
        if by_rules >= thresholds["rules"]:
            kept.append(rules_right)
        elif by_model >= thresholds[OURS]:
            kept.append(model_right)
    return dict(answered=len(kept), right_answered=sum(kept), n=len(results["rules", part]["correct"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", default="en", choices=("en", "zh"))
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--untuned", action="store_true", help="ask the model without training it, and record that")
    given, started = parser.parse_args(), time.time()
    world, con = make_world(seed=0, lang=given.lang), sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    schema = read_schema(con)
    train, parts = make_parts(world, schema, given.lang)
    folder = cache_dir() / "text2sql" / fingerprint(given.lang, given.passes, SAMPLES, train, parts)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if given.lang == "en" else f"_{given.lang}"
    if given.untuned:
        found = dict(lang=given.lang, parts=untuned(train, parts, con, schema, folder))
        return print(save_result(f"text2sql_untuned{suffix}", found, started))
    results = all_results(train, parts, con, schema, given.passes, folder)
    result = dict(lang=given.lang, passes=given.passes, samples=SAMPLES, wanted=WANTED, train=len(train))
    result |= figures(results, parts)
    print(result)
    print(save_result(f"text2sql{suffix}", result, started))


if __name__ == "__main__":
    main()
