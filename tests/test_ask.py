"""A question is answered by the model, the rules or a question back, in a terminal, by whoever can."""

import hashlib
import json
import sqlite3
import time

import pytest
from fixtures.plant import EXAMPLES, make_plant
from wcwidth import wcswidth

from domain_llm import cli
from domain_llm.core import InputError
from domain_llm.ship import ask
from domain_llm.ship.ask import answer, answer_query, nearest_questions, opened, read_examples, table_lines, told_answer
from domain_llm.ship.guard import Refusal

WHERE = "Where is the Heron?"
UNKNOWN = "Will it rain on Tuesday?"


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    "Paths of a small database and its known questions."
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def source(plant):
    with opened(plant[0], [plant[1]]) as made:
        yield made


def says(sql, confidence=1.0):
    return lambda question: dict(sql=sql, confidence=confidence)


@pytest.mark.parametrize(
    "confidence, threshold, by, rows",
    [(0.9, 0.8, "model", [(3,)]), (0.8, 0.8, "model", [(3,)]), (0.7, 0.8, "rules", [("Hill",)])],
)
def test_the_model_answers_above_its_threshold_and_the_rules_below(source, confidence, threshold, by, rows):
    model = says("SELECT COUNT(*) FROM sites", confidence)
    found = answer(WHERE, **source, model=model, model_threshold=threshold)
    assert (found["by"], found["rows"]) == (by, rows) and found["nearest"] == []
    assert found["confidence"] == (confidence if by == "model" else 1.0)


def test_nobody_is_sure(source):
    found = answer(UNKNOWN, **source, model=says("SELECT COUNT(*) FROM sites", 0.3))
    assert found["by"] == "clarification" and found["sql"] is None and found["rows"] == []
    assert found["confidence"] >= 0.3 and 1 <= len(found["nearest"]) <= 3
    assert answer("Where is the heron", **source)["by"] == "rules"
    assert answer("Where is the heron", **source, rules_threshold=1.01)["by"] == "clarification"


def raises(question):
    raise RuntimeError("out of tokens")


@pytest.mark.parametrize(
    "model",
    [
        raises,
        lambda question: None,
        lambda question: {"sql": "SELECT 1"},
        says(None),
        says(5),
        says("SELECT 1", float("nan")),
        says("SELECT 1", 7),
        says("SELECT 1", "sure"),
        says("SELECT colour FROM machines"),
        says("DELETE FROM machines"),
        says("SELECT name FROM sites; DELETE FROM machines"),
        says("no SQL at all"),
        says("SELECT COUNT(*) FROM machines a, machines b, machines c, machines d"),
    ],
)
def test_what_fails_or_is_refused_falls_to_the_next(source, plant, model):
    before = hashlib.sha256(plant[0].read_bytes()).digest()
    found = answer(WHERE, **source, model=model)
    assert (found["by"], found["rows"]) == ("rules", [("Hill",)])
    assert hashlib.sha256(plant[0].read_bytes()).digest() == before


def test_a_long_question_costs_nothing(source):
    asked = []
    begun = time.monotonic()
    found = answer("7 " * 10**6, **source, model=asked.append)
    assert time.monotonic() - begun < 1 and not asked
    assert found["by"] == "clarification" and "1,999,999" in found["note"] and "300" in found["note"]


def test_many_values_cost_little():
    "With rules that have up to two slots, all ways to fill them by 149 numbers would take seconds."
    with opened("demo") as source:
        begun = time.monotonic()
        assert answer("7 " * 149, **source)["by"] == "clarification"
        assert time.monotonic() - begun < 2


def test_nothing_is_asked(source):
    found = answer("  ", **source)
    assert found["by"] == "clarification" and len(found["nearest"]) == 3 and "Ask a question" in found["note"]


def test_broken_letters_can_be_printed(source):
    found = answer("Where is the \udcff Heron?", **source)
    assert told_answer(found).encode() and json.dumps(found["question"], ensure_ascii=False).encode()


def test_languages(source):
    assert answer("苍鹭在哪里？", **source)["rows"] == [("山上",)]
    assert "不确定" in answer("明天下雨吗？", **source)["note"]
    assert "not sure" in answer("明天下雨吗？", **source, lang="en")["note"]
    assert "不确定" in answer(UNKNOWN, **source, lang="zh")["note"]
    assert "个字符" in answer("长" * 301, **source)["note"]
    assert "没有符合条件的行" in answer("Which machines cost less than nothing?", **source, lang="zh")["note"]
    with pytest.raises(InputError, match="lang is 'fr'"):
        answer("Où est le héron ?", **source, lang="fr")


def test_offers_can_be_answered_and_differ(source):
    "Never the one that has no rows, nor the one whose query fails; each of another shape."
    where = {key: source[key] for key in ("known", "database", "schema")}
    for question in (UNKNOWN, "Which machines cost less than nothing at all?", "Which colour has the Heron?", ""):
        offers = nearest_questions(question, **where)
        found = [answer(offer, **source) for offer in offers]
        assert len(offers) == 3 and all(f["by"] == "rules" and f["rows"] for f in found)
        assert len({ask.shape_of(f["sql"]) for f in found}) == 3
    assert nearest_questions("What does the heron cost", **where)[0] == "What does the Heron cost?"


def test_a_database_without_rows_offers_nothing(tmp_path):
    database, examples = make_plant(tmp_path, filled=False)
    with opened(database, [examples]) as source:
        assert answer(UNKNOWN, **source)["nearest"] == [answer("How many machines are there?", **source)["question"]]


def test_a_database_that_is_gone_is_no_question_back(tmp_path):
    database, examples = make_plant(tmp_path)
    with opened(database, [examples]) as source:
        database.unlink()
        with pytest.raises(InputError, match="is no file"):
            answer(WHERE, **source)


def test_a_person_hears_why_a_query_is_not_run(source):
    where = {key: source[key] for key in ("database", "schema")}
    found = answer_query("SELECT name FROM sites ORDER BY name", **where)
    assert found["by"] == "person" and found["rows"] == [("Hill",), ("Quay",), ("山上",)]
    with pytest.raises(Refusal, match="DROP is not allowed"):
        answer_query("DROP TABLE sites", **where)


def test_columns_stand_below_each_other_in_every_script():
    "By the widths of another library."
    rows = [("苍鹭", 1, "x"), ("Heron", None, "y"), ("a" * 99, 2.5, "z"), ("鹭" * 99, 2, "z")]
    lines = table_lines(["名称", "number", "last"], rows)
    starts = {wcswidth(line[: line.rindex(last)]) for line, last in zip([lines[0], *lines[2:]], ("last", *"xyzz"))}
    assert len(starts) == 1 and max(wcswidth(line) for line in lines) <= 40 + 2 + 6 + 2 + 4


def test_a_cell_commands_no_terminal():
    found = dict(question="q", sql="SELECT 1", columns=["\x1b[2J"], rows=[("\x1b]0;evil\x07\r\n",)], note=None)
    told = told_answer(dict(found, by="rules", confidence=1.0, nearest=[]))
    assert all(c.isprintable() or c == "\n" for c in told) and "evil" in told


@pytest.mark.parametrize(
    "row, said",
    [
        ({"question": "How many?"}, 'row 1 has no text "sql"'),
        ({"question": " ", "sql": "SELECT 1"}, 'no text "question"'),
        ({"question": "How many?", "sql": "SELECT FROM WHERE ("}, "cannot be read"),
        ({"question": "How many?", "sql": 5}, 'no text "sql"'),
    ],
)
def test_bad_examples(row, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=said):
        read_examples([tmp_path / "rows.jsonl"])


def said(capsys, *argv):
    "Exit status, stdout and stderr of a command."
    status = cli.main([str(a) for a in argv])
    return status, *capsys.readouterr()


def test_one_question_in_the_terminal(plant, capsys):
    status, out, _ = said(capsys, "ask", plant[0], WHERE, "--examples", plant[1])
    assert status == 0 and "answered by rules" in out and "SELECT sites.name" in out and out.endswith("Hill\n")
    status, out, _ = said(capsys, "ask", plant[0], WHERE, "--examples", plant[1], "--lang", "zh")
    assert "由规则回答" in out


def test_questions_from_a_pipe(plant, capsys, monkeypatch):
    lines = iter([WHERE, "", "苍鹭在哪里？", "/quit", "How many machines are there?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    status, out, _ = said(capsys, "ask", plant[0], "--examples", plant[1])
    assert status == 0 and "Hill" in out and "山上" in out and "COUNT" not in out


def test_the_demo_answers_in_two_languages(capsys):
    "The place of a machine, as the database says."
    for lang, question in (("en", "Where is the {}?"), ("zh", "{}在哪里？")):
        with opened("demo", lang=lang) as source:
            con = sqlite3.connect(source["database"])
            query = "SELECT machines.name, sites.name FROM machines, sites WHERE machines.site_id = sites.site_id"
            machine, site = con.execute(query).fetchone()
            con.close()
        status, out, _ = said(capsys, "ask", "demo", question.format(machine), "--lang", lang)
        assert status == 0 and site in out.splitlines()[-1]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["ask", "missing.sqlite", "x"], "nothing to learn from|is no file"),
        (["ask", "postgresql+psycopg://reader@localhost/plant", "x"], "from a SQLite file only"),
        (["ask", "{plant}", "x"], "nothing to learn from"),
        (["ask", "{plant}", "x", "--examples", "missing.jsonl"], "cannot read missing.jsonl"),
        (["serve", "x.gguf", "--examples", "{examples}"], "belong to --task text2sql"),
        (["serve", "{plant}", "--task", "text2sql"], "nothing to learn from"),
        (["serve", "--task", "text2sql", "--allow-origin", "http://a.example"], "--allow-origin is for"),
        (["serve", "--task", "text2sql", "--feedback", "new.jsonl", "--store", "missing.sqlite"], "is no file"),
        (["serve", "--task", "text2sql", "--feedback", "{examples}"], "exists already"),
        (["serve", "--task", "text2sql", "--store", "{plant}"], "database of something else"),
        (["serve", "--task", "text2sql", "--slots", "0"], "--slots is 0"),
        (["serve", "--task", "text2sql", "--host", "0.0.0.0"], "no API key"),
    ],
)
def test_bad_input(argv, message, plant, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOMAIN_LLM_API_KEY", raising=False)
    fill = dict(plant=plant[0], examples=plant[1])
    status, _, err = said(capsys, *(word.format(**fill) for word in argv))
    assert status == 2 and any(part in err for part in message.split("|")), err


def test_a_threshold_is_a_share(plant):
    with pytest.raises(SystemExit):
        cli.main(["ask", str(plant[0]), "x", "--threshold", "80"])


def test_examples_of_the_fixture_are_sound():
    assert len({row["question"] for row in EXAMPLES}) == len(EXAMPLES)
