"""Metrics for open answers, against rouge-score, hand-computed values and queries whose worth is known."""

import sqlite3
import time

import numpy as np
import pytest

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables
from domain_llm.demo.world import make_world
from domain_llm.judge.answers import (
    exact_match,
    execution_accuracy,
    frequent_answers,
    lead_sentence,
    normalised,
    parse_triples,
    regex_triples,
    rouge_l,
    token_f1,
    triple_f1,
    value_in_answer,
    with_interval,
)
from domain_llm.judge.queries import is_ordered
from domain_llm.judge.stats import difference, ratio_interval, wilson


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture
def con(world):
    con = sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    yield con
    con.close()


# --- what is compared


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("The  Fish-Oil!", "fish oil", True),
        ("１２５ＢＡＲ", "125bar", True),
        ("工作 压力：高。", "工作压力高", True),
        ("-5 °C", "5 °C", False),
        ("−5 °C", "-5 °C", True),
        ("温度-5度", "温度5度", False),
        ("3-5 bar", "3 5 bar", True),
        ("1,234,567", "1234567", True),
        ("1,23", "123", False),
        ("1.25 mm", "125 mm", False),
        ("A.", "a", True),
        ("A", "B", False),
    ],
)
def test_normalised(one, other, same):
    assert (normalised(one) == normalised(other)) is same
    assert exact_match([one], [other])["mean"] == same


def test_values_stand_as_whole_words():
    answers = ["It opens at 125 bar.", "It opens at 125 bar.", "压力为125巴。", "压力为1125巴。"]
    r = value_in_answer(answers, ["125 bar", "25 bar", "125巴", "125巴"])
    assert r["values"] == [1, 0, 1, 0]


def test_any_accepted_reference_will_do():
    assert exact_match(["64 newton metres"], [["64 Nm", "64 newton metres"]])["mean"] == 1
    assert token_f1(["b c"], [["x y", "b d"]])["mean"] == 0.5


def test_token_f1_by_hand():
    r = token_f1(["x x y", "the oil of fish", "为一二五巴", "", "z"], ["x x x x", "fish oil", "一二五巴", "x", "x"])
    assert r["values"] == pytest.approx([4 / 7, 4 / 5, 8 / 9, 0, 0])
    assert r["mean"] == pytest.approx(np.mean([4 / 7, 4 / 5, 8 / 9, 0, 0]))


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    rng = np.random.default_rng(0)
    words = "the pump valve opens at 125 bar, a Shaft. not before".split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 25))) for _ in range(200)]
    answers, references = texts[:100], texts[100:]
    expected = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references)]
    assert rouge_l(answers, references)["values"] == pytest.approx(expected)


def test_rouge_l_of_chinese_by_hand():
    r = rouge_l(["北京是首都", "首都是北京", "泵125巴"], ["北京是首都", "北京是首都", "泵为125巴"])
    assert r["values"] == pytest.approx([1, 2 / 5, 6 / 7])


# --- intervals


def test_intervals_are_those_of_the_chapter_on_error_bars():
    rates = exact_match(["a b", "c", "d"], ["a b", "x", "x"])
    assert (rates["low"], rates["high"]) == wilson(1, 3)
    r = with_interval([0.5, 0.25, 0.75, 0.5], ["a", "a", "b", "b"])
    assert (r["low"], r["high"]) == (0, 1), "two groups say little"
    values = [0.5, 0.4, 0.6, 0.5, 0.45]
    r = with_interval(values)
    assert (r["low"], r["high"]) == pytest.approx(ratio_interval(values))
    assert difference(values, r["values"])["diff"] == 0


def test_no_interval_where_nothing_can_be_said():
    for values, groups in (([0.5, 0.5], None), ([0.5, 0.2], "aa"), ([0.1, 0.3, 0.3, 0.1], "aabb"), ([0.3], None)):
        r = with_interval(values, groups)
        assert r["low"] is None and r["high"] is None
    with pytest.raises(InputError, match="one label per item"):
        with_interval([1, 0], ["a"])


@pytest.mark.parametrize("metric", [exact_match, value_in_answer, token_f1, rouge_l, triple_f1])
def test_bad_input_is_named(metric):
    for answers, references in (([], []), (["a"], [])):
        with pytest.raises(InputError, match="one reference per answer"):
            metric(answers, references)
    with pytest.raises(InputError, match="answer 2 is None"):
        metric(["a", None], ["a", "b"])
    for wrong in (None, [], [None], [3.5]):
        with pytest.raises(InputError, match="reference 1"):
            metric(["a"], [wrong])


def test_a_reference_needs_a_word():
    with pytest.raises(InputError, match="reference 1.*no word"):
        exact_match([""], ["。"])


# --- triples


def test_lines_of_triples():
    text = (
        "- A | b | C\n\na|B|c\n| the d | e | f |\n泵｜压力｜125 巴\na | b\na | b | c | d\na | | c\n|---|---|---|\nDone."
    )
    found, others = parse_triples(text)
    assert ("d", "e", "f") in found and ("泵", "压 力", "125 巴") in found
    assert len(found) == 3 and others == 5


def test_triples_by_hand():
    wanted = ["m | p | 1\nm | q | 2", "m | p | 3", "", "m | p | 4"]
    answers = ["m | q | 2\nM | Q | 2.\nm | p | 9\nm | r | 1", "Sure:\nm | p | 3", "", ""]
    r = triple_f1(answers, wanted)
    assert r["values"] == pytest.approx([2 / 5, 1, 1, 0])
    assert (r["precision"], r["recall"], r["f1"]) == pytest.approx((2 / 4, 2 / 4, 2 / 4))
    assert r["valid"] == [True, False, True, False] and r["validity"] == 0.5
    low, high = ratio_interval([2, 2, 0], [5, 2, 1])
    assert (r["f1_low"], r["f1_high"]) == pytest.approx((max(0, low), min(1, high)))


def test_triples_of_nothing():
    r = triple_f1(["", ""], ["a | b | c", ""])
    assert (r["precision"], r["recall"], r["f1"], r["f1_low"]) == (None, 0, 0, None)
    r = triple_f1(["", ""], ["", ""])
    assert (r["precision"], r["recall"], r["f1"], r["mean"], r["validity"]) == (None, None, 1, 1, 1)


def test_the_demos_own_lines_are_valid(world):
    lines = [row["messages"][1]["content"] for row in world["instructions"] if row["task"] == "domain_extraction"]
    facts = {tuple(map(normalised, (f["entity"], f["attribute"], f["value"]))) for f in world["facts"]}
    assert len(lines) == 10
    for text in lines:
        found, others = parse_triples(text)
        assert len(found) == 4 and found <= facts and others == 0


# --- SQL


@pytest.mark.parametrize(
    "query, ordered",
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n\tby a limit 1", True),
        ("SELECT a FROM t ORDER /* ) */ BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT a FROM t WHERE b = 'it''s ( order by'", False),
        ('SELECT "order by" FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT '(' FROM t ORDER BY 1", True),
        ("SELECT a FROM t GROUP BY a", False),
    ],
)
def test_order_at_the_top_level(query, ordered):
    assert is_ordered(query) is ordered


@pytest.fixture
def numbers():
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE t (a INTEGER, b REAL, c TEXT)")
    con.executemany("INSERT INTO t VALUES (?, ?, ?)", [(1, 0.1, "x"), (2, 0.2, "y"), (2, 0.2, "y"), (3, None, "z")])
    con.commit()
    yield con
    con.close()


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("SELECT a, b FROM t ORDER BY a DESC", "SELECT a, b FROM t", True),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a", False),
        ("SELECT a AS n FROM t ORDER BY a;", "SELECT a FROM t ORDER BY a", True),
        ("SELECT DISTINCT a FROM t", "SELECT a FROM t", False),
        ("SELECT a FROM t UNION ALL SELECT 1", "SELECT a FROM t", False),
        ("SELECT b, a FROM t", "SELECT a, b FROM t", False),
        ("SELECT 0.3", "SELECT 0.1 + 0.2", True),
        ("SELECT 0.3 + 1e-6", "SELECT 0.1 + 0.2", False),
        ("SELECT 2.0", "SELECT 2", True),
        ("SELECT '2'", "SELECT 2", False),
        ("SELECT 1700000001", "SELECT 1700000000", False),
        ("SELECT NULL", "SELECT 0", False),
        ("SELECT a FROM t WHERE 0", "SELECT c FROM t WHERE 0", True),
        ("", "SELECT c FROM t WHERE 0", False),
        ("-- nothing", "SELECT c FROM t WHERE 0", False),
        ("SELECT a FROM t WHERE a = ?", "SELECT a FROM t", False),
        ("SELECT 1; SELECT 1", "SELECT 1", False),
        ("SELECT 1\0", "SELECT 1", False),
        ("SELECT '\ud800'", "SELECT 1", False),
        ("SELECT 1 AS x, 0.1 + 0.2 UNION ALL SELECT 2, 0.3", "SELECT 2, 0.1 + 0.2 UNION ALL SELECT 1, 0.3", True),
    ],
)
def test_results_are_compared(numbers, answer, reference, right):
    r = execution_accuracy([answer], [reference], numbers)
    assert r["values"] == [right]


WRITES = [
    "DELETE FROM machines",
    "INSERT INTO types VALUES (99, 'x')",
    "UPDATE machines SET name = 'x' RETURNING name",
    "DROP TABLE parts",
    "CREATE TABLE x (a)",
    "CREATE TEMP TABLE x (a)",
    "PRAGMA user_version = 7",
    "PRAGMA writable_schema = 1",
    "ATTACH DATABASE 'stolen.sqlite' AS x",
    "VACUUM INTO 'stolen.sqlite'",
    "BEGIN",
    "COMMIT",
    "SELECT load_extension('x')",
    "WITH x AS (SELECT 1) DELETE FROM machines",
    "SELECT 1; DROP TABLE parts",
]


@pytest.mark.parametrize("kind", ["connection", "file"])
def test_nothing_is_written(world, con, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a ?#%.sqlite"
    database = con
    if kind == "file":
        with sqlite3.connect(path) as target:
            con.backup(target)
        target.close()
        database = path
    before, listed = "\n".join(con.iterdump()), sorted(tmp_path.iterdir())
    raw = path.read_bytes() if kind == "file" else None
    r = execution_accuracy(WRITES, ["SELECT name FROM machines"] * len(WRITES), database)
    assert r["mean"] == 0 and all(r["errors"])
    assert "\n".join(con.iterdump()) == before and not con.in_transaction
    assert sorted(tmp_path.iterdir()) == listed
    assert kind == "connection" or path.read_bytes() == raw


def test_a_statement_that_the_connection_knows_is_refused_too(con):
    query = "DELETE FROM parts WHERE part_id < 0"
    con.execute(query)
    con.commit()
    r = execution_accuracy([query], ["SELECT 1"], con)
    assert r["errors"][0] and not con.in_transaction
    con.execute("DELETE FROM parts")  # it is the caller's again
    assert con.execute("SELECT COUNT(*) FROM parts").fetchone() == (0,)


def test_a_long_query_is_stopped(con):
    endless = "SELECT COUNT(*) FROM parts a, parts b, parts c, parts d, parts e, parts f"
    many = "SELECT a.name FROM parts a, parts b, parts c, parts d, parts e"
    recursive = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    huge = "SELECT zeroblob(900000000)"
    start = time.monotonic()
    r = execution_accuracy([endless, many, recursive, huge], ["SELECT name FROM machines"] * 4, con, seconds=0.3)
    assert time.monotonic() - start < 5
    assert r["values"] == [0, 0, 0, 0]
    assert "interrupted" in r["errors"][0] and r["errors"][1] is None
    assert con.execute("SELECT COUNT(*) FROM parts a, parts b, parts c").fetchone() == (60**3,)


def test_the_demos_queries_agree_with_themselves_alone(world, con):
    rows = world["sql"][::7]
    queries = [row["sql"] for row in rows]
    r = execution_accuracy(queries, queries, con, groups=[row["shape"] for row in rows])
    assert r["mean"] == 1 and r["errors"] == [None] * len(rows)
    truth = [con.execute(query).fetchall() for query in queries]
    pairs = [(i, i + 1) for i in range(len(rows) - 1) if sorted(map(str, truth[i])) != sorted(map(str, truth[i + 1]))]
    r = execution_accuracy([queries[i] for i, _ in pairs], [queries[j] for _, j in pairs], con)
    assert len(pairs) > 100 and r["mean"] == 0


def test_errors_of_references_and_files(con, tmp_path):
    with pytest.raises(InputError, match="reference 2.*does not run"):
        execution_accuracy(["SELECT 1"] * 2, ["SELECT 1", "SELECT nothing"], con)
    with pytest.raises(InputError, match="is no file"):
        execution_accuracy(["SELECT 1"], ["SELECT 1"], tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no database " * 200)
    with pytest.raises(InputError, match="not a database"):
        execution_accuracy(["SELECT 1"], ["SELECT * FROM t"], tmp_path / "text.sqlite")


# --- baselines


def test_most_frequent_answer_of_the_same_form():
    training = [
        ("Pressure of the Swan 32?", "The Swan 32 has 5 bar."),
        ("Pressure of the Swan 3?", "The Swan 3 has 6 bar."),
        ("pressure of the Turner 66", "The Turner 66 has 6 bar."),
        ("泵A的颜色?", "泵A是红色。"),
    ]
    names = ["Swan 3", "Swan 32", "Turner 66", "泵A", "泵B"]
    asked = ["Pressure of the Swan 32?", "泵B的颜色？", "And the tag of the Turner 66?", "Hello"]
    expected = ["The Swan 32 has 6 bar.", "泵B是红色。", "The Turner 66 has 6 bar.", "The  has 6 bar."]
    assert frequent_answers(asked, training, names) == expected
    with pytest.raises(InputError, match="no training pairs"):
        frequent_answers(asked, [])


def test_rules_from_training_triples():
    training = ["Swan 32 | bolt torque | 64 Nm\nSwan 32 | bush | oak", "泵A | 压力 | 125巴"]
    passages = [
        "Tighten the Turner 66 to 8 Nm. Soaked bushes.",
        "泵B的压力为90巴。",
        "No name, 5 Nm.",
        "The Swan 32 has OAK.",
    ]
    found = regex_triples(passages, training, ["Turner 66", "Swan 32", "泵B"])
    assert found == ["Turner 66 | bolt torque | 8 Nm", "泵B | 压力 | 90巴", "", "Swan 32 | bush | OAK"]


def test_first_sentence():
    assert lead_sentence(" It holds 1.5 l. Then more! ") == "It holds 1.5 l."
    assert lead_sentence("泵的压力为125巴。不得更改。") == "泵的压力为125巴。"
    assert lead_sentence("Title\ntext") == "Title"
    assert lead_sentence("") == ""
