"""Text-to-SQL by a model: one spelling, linking, training rows, the choice among answers and its confidence."""

import math
import sqlite3

import numpy as np
import pytest
import statsmodels.api as sm

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables, make_composed
from domain_llm.demo.world import make_world
from domain_llm.judge.answers import execution_accuracy
from domain_llm.ship.guard import Refusal
from domain_llm.ship.linking import learn_links, linked, prompt, unnamed_literals
from domain_llm.ship.rules import value_index
from domain_llm.ship.schema import read_schema
from domain_llm.ship.spelling import canonical, join_order
from domain_llm.ship.sqlrows import column_values, exchanged, from_templates, sql_messages
from domain_llm.ship.text2sql import (
    choose_answer,
    confidence,
    evidence,
    fit_confidence,
    reliability,
    sql_model,
    sql_setting,
)


@pytest.fixture(scope="module")
def con():
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE sites (site_id INTEGER PRIMARY KEY, town TEXT, region TEXT)")
    con.execute(
        "CREATE TABLE pumps (name TEXT, litres INTEGER, hours INTEGER, site_id INTEGER REFERENCES sites(site_id))"
    )
    con.executemany(
        "INSERT INTO sites VALUES (?, ?, ?)", [(1, "Oslo", "north"), (2, "东京", "east"), (3, "Rome", None)]
    )
    pumps = [("P 7", 10, 3, 1), ("Q 1", 50, 8, 2), ("O'Hara", 70, 5, 2), ("R 4", 70, 5, 1)]
    con.executemany("INSERT INTO pumps VALUES (?, ?, ?, ?)", pumps)
    return con


@pytest.fixture(scope="module")
def schema(con):
    return read_schema(con)


@pytest.fixture(scope="module")
def setting(con, schema):
    rows = [dict(question="How many pumps are there?", sql="SELECT COUNT(*) FROM pumps")]
    return sql_setting(rows, con, schema)


@pytest.mark.parametrize(
    ("sql", "wanted"),
    [
        ("select NAME as n from pumps", "SELECT pumps.name FROM pumps"),
        (
            'SELECT p.name FROM pumps p, sites s WHERE s.town = "Oslo" AND p.site_id = s.site_id',
            "SELECT pumps.name FROM sites JOIN pumps ON pumps.site_id = sites.site_id WHERE sites.town = 'Oslo'",
        ),
        (
            "SELECT litres, COUNT(1) AS n FROM pumps GROUP BY (litres) ORDER BY n DESC",
            "SELECT pumps.litres, COUNT(*) FROM pumps GROUP BY pumps.litres ORDER BY COUNT(*) DESC",
        ),
        (
            "SELECT a.name FROM pumps a "
            "WHERE a.litres > (SELECT AVG(b.litres) FROM pumps b WHERE b.site_id = a.site_id)",
            "SELECT pumps.name FROM pumps WHERE pumps.litres > "
            "(SELECT AVG(pumps_2.litres) FROM pumps AS pumps_2 WHERE pumps_2.site_id = pumps.site_id)",
        ),
        (
            "SELECT a.name FROM pumps a JOIN pumps b ON a.litres = b.litres AND a.name <> b.name",
            "SELECT pumps.name FROM pumps JOIN pumps AS pumps_2 ON pumps.litres = pumps_2.litres "
            "AND pumps.name <> pumps_2.name",
        ),
        (
            "SELECT s.town FROM sites s LEFT JOIN pumps p ON p.site_id = s.site_id WHERE p.name IS NULL",
            "SELECT sites.town FROM sites LEFT JOIN pumps ON pumps.site_id = sites.site_id WHERE pumps.name IS NULL",
        ),
    ],
)
def test_a_query_gets_one_spelling_and_keeps_its_rows(sql, wanted, con, schema):
    assert canonical(sql, schema) == wanted
    assert canonical(wanted, schema) == wanted
    assert sorted(con.execute(sql)) == sorted(con.execute(wanted))


def test_a_condition_with_or_stays_together(con, schema):
    sql = "SELECT p.name FROM pumps p, sites s WHERE (s.town = 'Oslo' OR p.litres > 60) AND p.site_id = s.site_id"
    assert sorted(con.execute(canonical(sql, schema))) == [("O'Hara",), ("P 7",), ("R 4",)]


def test_what_the_guard_refuses_has_no_spelling(schema):
    with pytest.raises(Refusal):
        canonical("SELECT colour FROM pumps", schema)


def test_tables_are_joined_in_the_order_of_the_schema_as_far_as_keys_allow():
    edge = frozenset({("a", "x"), ("c", "x")})
    assert join_order(["a", "b", "c"], {edge}) == [("a", None), ("c", edge), ("b", None)]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_composed_shapes_are_new_run_and_keep_their_rows_in_one_spelling(lang):
    world = make_world(seed=0, lang=lang)
    rows = make_composed(world["tables"], lang)
    assert rows == make_composed(world["tables"], lang)
    shapes = {row["shape"] for row in rows}
    assert len(shapes) >= 30 and not shapes & {row["shape"] for row in world["sql"]}
    assert all(sum(row["shape"] == shape for row in rows) >= 3 for shape in shapes)
    con = sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    for row in rows:
        assert con.execute(row["sql"]).fetchone() not in (None, (None,), (0,))
        assert "{" not in row["question"] + row["sql"]
    schema, some = read_schema(con), rows[::4]
    spelled = [canonical(row["sql"], schema) for row in some]
    assert execution_accuracy(spelled, [row["sql"] for row in some], con)["mean"] == 1


def test_a_question_names_values_columns_and_what_joins_them(con, schema):
    found = linked("How many litres do the pumps in 东京 hold, more than 20?", schema, value_index(con, schema))
    assert found["values"] == {"东京": {("sites", "town")}} and found["literals"] == ["20"]
    wanted = {("pumps", "litres"), ("pumps", "site_id"), ("sites", "site_id"), ("sites", "town")}
    assert wanted <= found["columns"]
    assert "sites.town '东京'" in prompt("?", found) and prompt("?") == "?"


def test_words_for_columns_are_learnt_from_questions_with_their_sql(con, schema):
    rows = [
        dict(question=f"容量多少：{name}", sql=f"SELECT pumps.litres FROM pumps WHERE pumps.name = '{name}'")
        for name in ("P 7", "Q 1")
    ]
    rows += [
        dict(question=f"时间：{name}", sql=f"SELECT pumps.hours FROM pumps WHERE pumps.name = '{name}'")
        for name in ("P 7", "Q 1")
    ]
    links = learn_links(rows, schema, value_index(con, schema))
    assert links["容"] == {("pumps", "litres")} and links["时", "间"] == {("pumps", "hours")}


def test_constants_are_what_no_question_names(con, schema):
    rows = [
        dict(question="major pumps in Oslo", sql="SELECT pumps.name FROM pumps WHERE pumps.litres > 40 AND 'Oslo' = 1")
    ]
    assert unnamed_literals(rows * 2, value_index(con, schema)) == ["1", "40"]
    assert unnamed_literals(rows, value_index(con, schema)) == []


def test_templates_are_filled_with_values_of_their_columns(con, schema):
    values = column_values(con, schema)
    template = dict(
        question="{of} of {pumps.name}?",
        sql="SELECT {of} FROM pumps WHERE name = '{pumps.name}'",
        slots={"of": [["volume", "litres"], ["time", "hours"]]},
    )
    rows = from_templates([template], values, schema, per=8)
    assert len({row["question"] for row in rows}) == len(rows) > 4
    for row in rows:
        of, _, name = row["question"].removesuffix("?").partition(" of ")
        ((cell,),) = con.execute(row["sql"]).fetchall()
        column = dict(volume="litres", time="hours")[of]
        assert (cell,) == con.execute(f"SELECT {column} FROM pumps WHERE name = ?", (name,)).fetchone()
    with pytest.raises(InputError, match="pumps.colour"):
        from_templates([dict(question="{pumps.colour}", sql="SELECT 1 FROM pumps")], values, schema)


def test_exchanged_rows_still_answer_their_questions(con, schema):
    index, values = value_index(con, schema), column_values(con, schema)
    row = dict(question="litres of P 7", sql="SELECT pumps.litres FROM pumps WHERE pumps.name = 'P 7'")
    words = {("pumps", "litres"): "litres", ("pumps", "hours"): "hours"}
    rows = exchanged([row], values, index, schema, times=40, words=words)
    assert rows[0] == row
    assert {r["question"] for r in rows} == {
        f"{of} of {name}" for of in ("litres", "hours") for name in ("P 7", "Q 1", "R 4", "O'Hara")
    }
    for r in rows:
        of, name = r["question"].split(" of ")
        assert (
            con.execute(r["sql"]).fetchall()
            == con.execute(f"SELECT {of} FROM pumps WHERE name = ?", (name,)).fetchall()
        )


def test_messages_carry_the_links_or_nothing(con, schema):
    row = dict(question="litres of P 7", sql="SELECT pumps.litres FROM pumps WHERE pumps.name = 'P 7'")
    alone, told = (sql_messages([row], schema, index)[0]["messages"] for index in (None, value_index(con, schema)))
    assert alone[0]["content"] == row["question"] and "pumps.name 'P 7'" in told[0]["content"]
    assert alone[1] == told[1] == dict(role="assistant", content=row["sql"])


def answer(text, probability, ended=True):
    return dict(text=text, logprob=math.log(probability), tokens=5, ended=ended)


def test_answers_with_equal_rows_vote_together(setting):
    answers = [
        answer("SELECT pumps.name FROM pumps WHERE pumps.litres > 60", 0.4),
        answer("SELECT pumps.name FROM pumps WHERE pumps.litres < 20", 0.3),
        answer("SELECT pumps.name FROM pumps WHERE pumps.hours = 3", 0.25),
        answer("SELECT pumps.name FROM pumps WHERE pumps.hours = 3", 0.25),
    ]
    choice = choose_answer(answers, setting)
    assert choice["sql"] == answers[1]["text"]  # 0.3 + 0.25, the same text counts once
    assert choice["mass"] == pytest.approx(0.55) and choice["agreement"] == 0.75 and not choice["empty"]
    assert choose_answer(answers, setting, voting=False)["sql"] == answers[0]["text"]


def test_refused_failed_cut_and_empty_answers_are_left_out(setting):
    good = answer("SELECT sites.town FROM sites", 0.01)
    bad = [
        answer("DELETE FROM pumps", 0.9),
        answer("SELECT pumps.colour FROM pumps", 0.9),
        answer("SELECT sites.town FROM sites", 0.9, ended=False),
        answer("SELECT pumps.name FROM pumps WHERE pumps.litres > 1000", 0.9),
        answer("SELECT sites.region FROM sites WHERE sites.town = 'Rome'", 0.9),
    ]
    assert choose_answer([*bad, good], setting)["sql"] == good["text"]
    nothing = choose_answer(bad[:3], setting)
    assert nothing["sql"] is None and nothing["agreement"] == 0
    empty = choose_answer(bad[3:4], setting)
    assert empty["sql"] == bad[3]["text"] and empty["empty"]


def test_confidence_is_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    y = rng.random(300) < 1 / (1 + np.exp(-(0.5 + x @ [1, -2, 0, 0.5])))
    fitted = fit_confidence(x.tolist(), y.tolist(), strength=1e-9)
    wanted = sm.Logit(y.astype(float), sm.add_constant(x)).fit(disp=0).predict()
    assert np.allclose([confidence(row, fitted) for row in x], wanted, atol=1e-4)
    with pytest.raises(InputError, match="answered wrongly"):
        fit_confidence(x.tolist(), [True] * 300)


def test_a_value_left_unused_speaks_against_an_answer():
    found = dict(values={"Oslo": set(), "P 7": set()}, literals=["20"], columns=set())
    choice = dict(sql="SELECT a.b FROM a WHERE a.c = 'Oslo'", logprob=-0.5, agreement=1.0, empty=False)
    assert evidence(found, choice) == [pytest.approx(-math.log10(0.5)), 1.0, 0.0, 1.0]
    assert evidence(found, choice | dict(sql=choice["sql"] + " AND a.n > 20"))[-1] == 0.5
    assert evidence(found, dict(sql=None))[0] == pytest.approx(-math.log10(20))


def test_reliability_has_groups_of_equal_size():
    assert reliability([0.1, 0.9, 0.2, 0.8], [0, 1, 1, 1], bins=2) == [
        (pytest.approx(0.15), 0.5, 2),
        (pytest.approx(0.85), 1.0, 2),
    ]


def test_the_model_is_a_function_of_a_question(setting):
    asked = []

    def write(texts, grammars):
        asked.append((texts, grammars))
        return [[answer("SELECT COUNT(*) FROM pumps", 0.5)]]

    fitted = dict(weights=[0.0, 1.0, 0.0, 0.0, 0.0], mean=[0.0] * 4, scale=[1.0] * 4)
    found = sql_model(write, setting, fitted)("How many pumps in Oslo?")
    assert found == dict(
        sql="SELECT COUNT(*) FROM pumps", confidence=pytest.approx(1 / (1 + math.exp(math.log10(math.log(2)))))
    )
    ((texts, grammars),) = asked
    assert "sites.town 'Oslo'" in texts[0] and "'Oslo'" in grammars[0]
    nothing = sql_model(lambda *_: [[answer("DROP TABLE pumps", 0.5)]], setting, fitted)("?")
    assert nothing == dict(sql=None, confidence=0.0)
