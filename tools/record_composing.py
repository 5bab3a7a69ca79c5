"""Record what questions composed by a grammar do for kinds that training lacks in nbs/results/composing.json.

    python tools/record_composing.py [--seeds 3] [--plan] [--runs FOLDER]

Small models read the demo's training questions with other values in them, or also questions that are composed from the
words for its things; one arm reads its own questions, with more values, for as long as the arm with 4,000 composed. No
composed question asks what a new or composed kind asks, whatever its wording, values or joins. Right is an answer with
the reference's rows on the database and on copies of it with other contents. Each seed has another demo, other
questions and another model. Every arm and seed is kept in a folder: a cut recording goes on where it was.
"""

import random
import sqlite3
from statistics import fmean

import sqlglot
from record_text2sql import make_parts
from sqlglot import exp
from tellings import record

from domain_llm.demo.database import insert_tables
from domain_llm.demo.world import make_world
from domain_llm.judge.answers import execution_accuracy
from domain_llm.ship.composing import composed
from domain_llm.ship.linking import key_columns
from domain_llm.ship.schema import read_schema
from domain_llm.ship.spelling import canonical
from domain_llm.ship.sqlrows import column_values, exchanged, sql_messages
from domain_llm.ship.text2sql import answers_to, in_torch, judged, sql_setting
from domain_llm.ship.things import demo_things, read_things
from domain_llm.small_world import small_model, train_tokenizer
from domain_llm.train.fit import fitted
from domain_llm.train.sft import encode_all

SETTINGS = dict(learning_rate=4e-3, tokens_per_step=512, length=512, probes=1)
ASKED = dict(known=3, new=3, composed=1)  # of each part every so many questions
COPIES = 5  # with other contents, on which an answer has to be right as well
ARMS = {
    "own": dict(values=2, composed=0, passes=2),
    "own, longer": dict(values=12, composed=0, passes=5),
    "and 1,000 composed": dict(values=2, composed=1000, passes=2),
    "and 4,000 composed": dict(values=2, composed=4000, passes=2),
    "and 12,000 composed": dict(values=2, composed=12000, passes=2),
}


def claim(text, metric, base, arm="and 4,000 composed", **rest):
    "A claim on the share of right answers."
    return dict(text=text, metric=metric, arm=arm, base=base, more=True, matters=0.1, **rest)


CLAIMS = [
    claim("composed questions help on kinds composed of known parts", "composed", "own, longer"),
    claim("they help on new kinds", "new", "own, longer"),
    claim("they help on known kinds", "known", "own, longer"),
    claim("four thousand help more than one on composed kinds", "composed", "and 1,000 composed"),
    claim("twelve help more than four", "composed", "and 4,000 composed", "and 12,000 composed"),
    claim("more of the same questions helps on known kinds", "known", "own", "own, longer", control=True),
]


def same_rows_as(schema):
    "For each table that has one row for each of another the other."
    return {
        table: other
        for table, found in schema["tables"].items()
        for column, other, _ in found["foreign"]
        if found["key"] == [column]
    }


def place_of(column):
    "What is done to a column: the parts of the query around it, from inside out."
    out = []
    while column.parent is not None:
        column = column.parent
        if isinstance(column, exp.Ordered):
            out.append(f"ordered {'down' if column.args.get('desc') else 'up'}")
        elif isinstance(column, exp.In):
            out.append("EQ")  # equal to one of several, as to the only one
        elif not isinstance(column, (exp.And, exp.Paren, exp.Distinct, exp.Subquery)):
            out.append(type(column).__name__)
    return tuple(out)


def compared_with_query(column):
    "Whether a column is compared with a query, or is what that query gives."
    compared = column.find_ancestor(exp.In, exp.EQ)
    return compared is not None and compared.find(exp.Select) is not None


def asked_by(sql, schema):
    "What a query asks, without its values, its joins and the order of equals: two wordings of one question agree."
    tree, keys, single = sqlglot.parse_one(sql, read=schema["dialect"]), key_columns(schema), same_rows_as(schema)
    pointed = {(t, c): other for t, found in schema["tables"].items() for c, other, _ in found["foreign"]}
    shown = {result.sql() for result in tree.expressions}
    out = set()
    for column in tree.find_all(exp.Column):
        place = place_of(column)
        table = column.table.removesuffix("_2")
        only_names = (table, column.name) in keys and not compared_with_query(column)
        only_orders = "Order" in place and column.sql() in shown
        if not (only_names or only_orders or "Join" in place):
            other = pointed.get((table, column.name))
            out.add((f"{other}.name" if other else f"{table}.{column.name}", place))
    for count in tree.find_all(exp.Count):
        out.add(("count", place_of(count)))
        out |= {("of", single.get(table.name, table.name)) for table in tree.find_all(exp.Table)}
    if tree.args.get("limit"):
        out.add(("one" if tree.args["limit"].expression.name == "1" else "several",))
    return frozenset(out)


def made_rows(arm, seed, world, con, schema):
    "The rows of an arm, and the parts that are asked."
    train, parts = make_parts(world, schema, "en")
    values = column_values(con, schema)
    index = sql_setting(train, con, schema)["index"]
    apart = {asked_by(canonical(row["sql"], schema), schema) for part in parts.values() for row in part}
    apart -= {asked_by(row["sql"], schema) for row in train}
    rows = exchanged(train, values, index, schema, arm["values"], seed=seed)
    if arm["composed"]:
        things = read_things(demo_things(), schema)
        unwanted = lambda sql: asked_by(sql, schema) in apart  # noqa: E731
        rows += composed(things, values, schema, arm["composed"], seed, unwanted)
    return train, rows, parts


def measure(arm, seed):
    "Which answers of a small model are right after an arm's training, for each part: also on copies, and without them."
    world, con = make_world(seed=seed), sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    schema = read_schema(con)
    train, rows, parts = made_rows(arm, seed, world, con, schema)
    setting = sql_setting(rows, con, schema) | dict(constants=sql_setting(train, con, schema)["constants"])
    messages = sql_messages(rows, schema, setting["index"], setting["links"])
    tok = train_tokenizer([turn["content"] for row in messages for turn in row["messages"]])
    coded, _ = encode_all(messages, tok, SETTINGS["length"])
    rng = random.Random(seed)
    order = [row for _ in range(arm["passes"]) for row in rng.sample(coded, len(coded))]
    model = fitted(small_model(tok, seed), order, seed, **SETTINGS)
    found = {}
    for part, step in ASKED.items():
        asked = parts[part][::step]
        answered = answers_to([row["question"] for row in asked], in_torch(model, tok, samples=0), setting)
        told = judged(asked, answered, setting, voting=False)
        on_copies = execution_accuracy(told["sql"], [row["sql"] for row in asked], con, copies=COPIES)["values"]
        groups = [row["shape"] for row in asked]
        found[part] = dict(values=[int(right) for right in on_copies], groups=groups)
        found[f"{part}, no copies"] = dict(values=[int(right) for right in told["correct"]], groups=groups)
    return found


def by_kind(runs):
    "The runs with one mean for each kind of question that all of them were asked, since demos have other questions."
    found = {}
    for part in ASKED:
        kinds = [set(run[part]["groups"]) for seeds in runs.values() for run in seeds.values()]
        shared = sorted(set.intersection(*kinds))
        for arm, seeds in runs.items():
            for seed, run in seeds.items():
                right = {kind: [] for kind in shared}
                for kind, value in zip(run[part]["groups"], run[part]["values"]):
                    right.get(kind, []).append(value)
                means = [fmean(values) for values in right.values()]
                found.setdefault(arm, {}).setdefault(seed, {})[part] = dict(values=means, groups=shared)
    return found


if __name__ == "__main__":
    record("composing", __doc__, measure, ARMS, CLAIMS, by_kind, seeds=3)
