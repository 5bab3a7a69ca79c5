"""Text-to-SQL by rules: values, patterns, what may be turned round, and when to decline."""

import math
import sqlite3
from pathlib import Path

import pytest
from record_geoquery import best_way, split_rows
from record_rules import figures, geoquery_rows

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables
from domain_llm.demo.world import make_world
from domain_llm.results import load_result
from domain_llm.ship.ask import shape_of
from domain_llm.ship.guard import guarded
from domain_llm.ship.rules import (
    ask_rules,
    choose_threshold,
    find_values,
    learn_rules,
    make_pattern,
    risk_coverage,
    value_index,
)
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sql import tried, tried_on_unknown_shapes

ROOT = Path(__file__).resolve().parent.parent
SHARED = next((p / "shared/data" for p in ROOT.parents if (p / "shared/data").is_dir()), Path("/nowhere"))
GEOQUERY = SHARED / "text2sql" / "geoquery"
ROWS = [
    dict(question="Which pumps hold more than 20 litres?", sql="SELECT name FROM pumps WHERE litres > 20"),
    dict(question="Which pumps stand in Oslo?", sql="SELECT name FROM pumps WHERE town = 'Oslo'"),
    dict(question="How many people live in Oslo?", sql="SELECT COUNT(*) FROM people WHERE town = 'Oslo'"),
    dict(question="How many people are called Ada?", sql="SELECT COUNT(*) FROM people WHERE name = 'Ada'"),
    dict(question="有多少人住在东京？", sql="SELECT COUNT(*) FROM people WHERE town = '东京'"),
    dict(question="Which pump is the largest?", sql="SELECT name FROM pumps ORDER BY litres DESC LIMIT 1"),
]


@pytest.fixture(scope="module")
def con():
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE pumps (name TEXT, town TEXT, colour TEXT, litres INT)")
    con.execute("CREATE TABLE people (name TEXT, town TEXT)")
    pumps = [("P 7", "Oslo", "red", 10), ("P 75", "New Oslo", "dark red", 30), ("Q 1", "东京", "blue", 50)]
    con.executemany("INSERT INTO pumps VALUES (?, ?, ?, ?)", pumps)
    con.executemany("INSERT INTO people VALUES (?, ?)", [("Ada", "Oslo"), ("O'Hara", "Oslo"), ("惠子", "东京")])
    return con


@pytest.fixture(scope="module")
def rules(con):
    return learn_rules(ROWS, con, read_schema(con))


@pytest.mark.parametrize(
    ("question", "values"),
    [
        ("Where is P 7?", ["p 7"]),
        ("Where is P 75?", ["p 75"]),
        ("Is P 756 there?", ["756"]),
        ("Is it in New Oslo or Oslo?", ["new oslo", "oslo"]),
        ("Ｐ ７５在东京吗？", ["p 75", "东京"]),
        ("Coslovia and Adam", []),
        ("before 2024-05-01, more than 3.5", ["2024-05-01", "3.5"]),
        ("above 120bar and below 3.5kg", ["120", "3.5"]),
        ("超过120bar的泵", ["120"]),
        ("the 3rd of V120, 12ab3 and 7-day", []),
        ("Is it dark rad?", ["dark red"]),
        ("", []),
    ],
)
def test_values_are_found(question, values, con):
    assert [value for _, _, value, _ in find_values(question, value_index(con, read_schema(con)))] == values


def test_a_value_has_the_columns_that_hold_it(con):
    index = value_index(con, read_schema(con))
    assert index["oslo"] == ({("pumps", "town"), ("people", "town")}, "Oslo")
    assert set(index) == {
        "p 7",
        "p 75",
        "q 1",
        "oslo",
        "new oslo",
        "东京",
        "red",
        "dark red",
        "blue",
        "ada",
        "o'hara",
        "惠子",
    }


def test_a_pattern_has_slots_where_question_and_sql_agree(con):
    index = value_index(con, read_schema(con))
    row = dict(
        question="Is P 7 red in Oslo?", sql="SELECT 1 FROM pumps AS p WHERE p.town = \"Oslo\" AND p.name = 'P 7'"
    )
    pattern = make_pattern(row["question"], row["sql"], index)
    assert pattern["columns"] == [("pumps", "name"), ("pumps", "town")]
    assert pattern["text"].count("\ufffc") == 2 and "red" in pattern["text"]


@pytest.mark.parametrize(
    ("question", "rows"),
    [
        ("Which pumps stand in New Oslo?", [("P 75",)]),
        ("which pumps stand in new osl?", [("P 75",)]),
        ("Which pumps hold less than 20 litres?", [("P 7",)]),
        ("Which pumps hold more than 40 litres?", [("Q 1",)]),
        ("How many people live in 东京?", [(1,)]),
        ("有多少人住在Oslo？", [(2,)]),
        ("How many people are called O'Hara?", [(1,)]),
        ("Which pump is the smallest?", [("P 7",)]),
        ("Which pumps stand in blue?", [("Q 1",)]),
    ],
)
def test_questions_are_answered(question, rows, rules, con):
    "With other values, with an error, turned round, and with a slot that moves to another column."
    sql = ask_rules(question, rules)["sql"]
    assert con.execute(sql).fetchall() == rows
    guarded(sql, read_schema(con))


def test_the_confidence_tells_known_questions_from_others(rules):
    known = ask_rules(ROWS[1]["question"], rules)
    other = ask_rules("When was the last storm near the pumps?", rules)
    assert known["confidence"] == pytest.approx(1) and other["confidence"] < 0.5
    assert ask_rules("When was the last storm near the pumps?", rules, threshold=0.5)["sql"] is None
    for question in ("", "?", "xyzzy", "\ufffc\ufffc"):
        assert ask_rules(question, rules)["confidence"] < 0.5


def test_a_harmful_question_stays_a_value(rules, con):
    found = ask_rules("Which pumps stand in Oslo'; DROP TABLE pumps; --?", rules)
    assert con.execute(found["sql"]).fetchall() == [("P 7",)]


def test_no_rows_are_an_error(con):
    with pytest.raises(InputError, match="no training rows"):
        learn_rules([], con, read_schema(con))


def test_curve_and_threshold_by_hand():
    confidences, correct = [0.2, 0.9, 0.5, 0.5], [False, True, True, False]
    curve = risk_coverage(confidences, correct)
    assert curve["threshold"] == [0.9, 0.5, 0.2]
    assert curve["coverage"] == [0.25, 0.75, 1.0]
    assert curve["accuracy"] == pytest.approx([1, 2 / 3, 1 / 2])
    assert choose_threshold(confidences, correct, 0.6) == 0.5
    assert choose_threshold(confidences, correct, 0.9) == 0.9
    assert choose_threshold([0.5], [False], 0.9) == math.inf
    with pytest.raises(InputError):
        risk_coverage([], [])


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_demo_in_both_languages(lang):
    "Known shapes are answered; rules that have not seen a shape know it less well and are less confident."
    world, con = make_world(seed=1, lang=lang), sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    schema = read_schema(con)
    train = [row for row in world["sql"] if row["split"] == "train"]
    known = {row["shape"] for row in train}
    test = [row for row in world["sql"] if row["split"] == "test" and row["shape"] in known]
    found = tried(test, learn_rules(train, con, schema), con)
    assert sum(found["correct"]) >= 0.95 * len(test)
    unknown = tried_on_unknown_shapes(train, con, schema, folds=2, step=10)
    assert sum(unknown["correct"]) < 0.6 * len(unknown["correct"])
    assert sum(unknown["confidence"]) / len(unknown["confidence"]) < sum(found["confidence"]) / len(test) - 0.2


@pytest.mark.skipif(not GEOQUERY.is_dir(), reason="GeoQuery is not here")
def test_geoquery_is_as_recorded():
    rows = [row for row in geoquery_rows(GEOQUERY) if row["sql"]]
    database = GEOQUERY / "geography.sqlite"
    split = {s: [row for row in rows if row["split"] == s] for s in ("train", "dev", "test")}
    assert [len(part) for part in split.values()] == [547, 48, 277]
    recorded = load_result("rules_geoquery")
    rules = learn_rules(split["train"], database, read_schema(database))
    dev = figures(tried(split["dev"], rules, database), recorded["threshold"])
    assert dev["right"] == recorded["dev"]["right"] and dev["answered"] == recorded["dev"]["answered"]


@pytest.mark.skipif(not GEOQUERY.is_dir(), reason="GeoQuery is not here")
@pytest.mark.parametrize("split, known", [("question", 214), ("query", 0)])
def test_only_the_question_split_asks_trained_shapes(split, known):
    train, _, test = split_rows(GEOQUERY, split, read_schema(GEOQUERY / "geography.sqlite"))
    shapes = {shape_of(row["sql"]) for row in train}
    assert sum(shape_of(row["sql"]) in shapes for row in test) == known


def test_the_simplest_of_the_best_ways_is_chosen():
    found = {"first answer": dict(correct=[1, 0]), "vote": dict(correct=[1, 1]), "grammar, vote": dict(correct=[1, 1])}
    assert best_way(found) == "vote"
