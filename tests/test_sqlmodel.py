"""A Text-to-SQL model in a folder: trained, cut and continued, calibrated, asked from the command line."""

import json
import os
import sqlite3

import pytest

from domain_llm import cli
from domain_llm.core import InputError, read_json
from domain_llm.ship import sqlmodel
from domain_llm.ship.ask import answer, shape_of
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sqlmodel import calibrated, checked_rows, make_sql_model, opened_model, parted, told_model
from domain_llm.ship.text2sql import confidence, evidence, sql_setting
from domain_llm.small_world import small_model, train_tokenizer

PUMPS = [(f"Pump {n}", f"Quay {n % 9}", 100 * n) for n in range(3, 53)]
KINDS = {
    "Where is {0}?": "SELECT site FROM pumps WHERE name = '{0}'",
    "What does {0} cost?": "SELECT price FROM pumps WHERE name = '{0}'",
    "What is at {1}?": "SELECT name FROM pumps WHERE site = '{1}'",
    "How many pumps are at {1}?": "SELECT COUNT(*) FROM pumps WHERE site = '{1}'",
}


@pytest.fixture(scope="module", autouse=True)
def one_core():
    "llama.cpp's threads wait for each other at every step; beside other tests one thread is many times faster."
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    path = tmp_path_factory.mktemp("plant") / "pumps.sqlite"
    con = sqlite3.connect(path)
    con.execute("CREATE TABLE pumps (name TEXT, site TEXT, price INTEGER)")
    con.executemany("INSERT INTO pumps VALUES (?, ?, ?)", PUMPS)
    con.commit()
    con.close()
    return path


@pytest.fixture(scope="module")
def rows():
    made = [(q.format(*pump), sql.format(*pump)) for pump in PUMPS for q, sql in KINDS.items()]
    return [dict(question=question, sql=sql) for question, sql in dict(made).items()]


@pytest.fixture(scope="module")
def base(rows, tmp_path_factory):
    "A model of random weights whose tokenizer knows the questions."
    folder = tmp_path_factory.mktemp("base") / "model"
    tok = train_tokenizer([text for row in rows for text in row.values()])
    small_model(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(rows, plant, base, tmp_path_factory):
    pytest.importorskip("xllamacpp")
    out = tmp_path_factory.mktemp("made") / "sql"
    return out, make_sql_model(rows, plant, str(base), out, passes=12, rate=2e-3)


def test_whole_shapes_are_kept_apart():
    "Of 17 shapes with 10 questions each the 8th and the 16th are apart, and a fifth of the others."
    rows = [
        dict(question=f"{k} {n}", sql=f"SELECT {'a' * (k + 1)} FROM t WHERE b = {n}")
        for n in range(10)
        for k in range(17)
    ]
    training, calibrating = parted(rows)
    assert len(calibrating) == 20 + 150 // 5 and len(training) == 120
    shapes = [list(dict.fromkeys(shape_of(row["sql"]) for row in part)) for part in (training, calibrating)]
    assert set(shapes[1]) - set(shapes[0]) == {shape_of(rows[7]["sql"]), shape_of(rows[15]["sql"])}
    assert {row["question"] for row in training} | {row["question"] for row in calibrating} == {
        row["question"] for row in rows
    }
    with pytest.raises(InputError, match="leave 16 to learn from.*at least 20 are needed. Give at least 100"):
        parted(
            [row for row in rows if row["question"].startswith(("0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "6 "))] + rows[:10]
        )


@pytest.mark.parametrize("sql", ["DELETE FROM pumps", "SELECT colour FROM pumps", "SELECT name FROM pumps; SELECT 1"])
def test_a_query_that_may_not_be_run_is_not_taught(sql, plant):
    rows = [dict(question="Where is Pump 3?", sql="SELECT site FROM pumps"), dict(question="What?", sql=sql)]
    with pytest.raises(InputError, match=r"question 2 \(What\?\): its query cannot be used"):
        checked_rows(rows, plant, read_schema(plant))


def says(sql, logprob):
    return dict(text=sql, logprob=logprob, tokens=3, ended=True)


def test_calibration_by_hand(rows, plant):
    "Twenty sure and right, five sure and wrong, fifteen unsure and wrong: nothing keeps 95% right; 80% is 20 of 25."
    schema = read_schema(plant)
    setting = sql_setting(rows, plant, schema)
    found = dict(values={}, literals=[])
    asked = [row for row in rows if row["question"].startswith("What does")][:40]
    sure = [(found, [says(row["sql"], -0.1)]) for row in asked[:20]]
    wrong = [(found, [says("SELECT name FROM pumps WHERE name = 'Pump 3'", -0.1)])] * 5
    unsure = [(found, [says("SELECT site FROM pumps WHERE name = 'Pump 3'", -9.0)])] * 15
    told = calibrated(asked, sure + wrong + unsure, setting, wanted=0.8)
    assert (told["questions"], told["right"], told["answered"], told["right_answered"]) == (40, 20, 25, 20)
    assert told["right_on_copies"] == 20
    high, low = (
        confidence(evidence(found, dict(sql="SELECT 1", logprob=p, agreement=1.0, empty=False)), told["fitted"])
        for p in (-0.1, -9.0)
    )
    assert low < 0.2 < high and told["threshold"] == pytest.approx(high) and high == pytest.approx(0.8, abs=0.05)
    assert calibrated(asked, sure + wrong + unsure, setting, wanted=0.95)["threshold"] is None
    nothing = calibrated(asked[:20], unsure + wrong, setting)
    assert nothing["right"] == 0 and nothing["threshold"] is None
    lines = told_model(nothing | dict(wanted=0.95))
    assert lines[0].startswith("0 of 20 questions") and "so the model answers nothing" in lines[1]


def test_what_is_right_by_accident_is_counted_apart(rows, plant, monkeypatch):
    "A price that is asked by itself has the right rows here, and on a copy it is another pump's."
    asked = [row for row in rows if row["question"].startswith("What does")][:20]
    setting = sql_setting(rows, plant, read_schema(plant))
    (cost,) = (price for name, _, price in PUMPS if f"What does {name} cost?" == asked[0]["question"])
    by_price = f"SELECT price FROM pumps WHERE price = {cost} LIMIT 1"
    answers = [by_price, *(row["sql"] for row in asked[1:])]
    answered = [(dict(values={}, literals=[]), [says(sql, -0.1)]) for sql in answers]
    told = calibrated(asked, answered, setting)
    assert (told["right"], told["right_on_copies"]) == (20, 19)
    assert "20 of 20 questions" in told_model(told | dict(wanted=0.95))[0]
    assert "19 of them also on 3 copies" in told_model(told | dict(wanted=0.95))[0]
    monkeypatch.setattr(sqlmodel, "LARGEST_COPIED", 10)
    told = calibrated(asked, answered, setting)
    assert told["right_on_copies"] is None and "copies" not in told_model(told | dict(wanted=0.95))[0]


def test_it_answers_what_it_was_not_trained_on(made, plant, rows):
    out, found = made
    assert found["right"] >= 20 and found["right_answered"] >= 0.95 * found["answered"] > 0
    assert read_json(out / "text2sql.json") == found
    _, calibrating = parted(checked_rows(rows, plant, read_schema(plant)))
    assert len(list((out / "answers").iterdir())) == len(calibrating) == found["questions"]
    right = 0
    with opened_model(out, plant) as more:
        for name, _, price in PUMPS[1::5]:
            told = answer(f"What does {name} cost?", plant, read_schema(plant), **more)
            right += told["by"] == "model" and told["rows"] == [(price,)]
    assert right >= 8


def test_what_is_there_is_not_made_again(made, rows, plant, base, monkeypatch):
    out, found = made

    def fail(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(sqlmodel, "_train", fail)
    kept = sorted(out.glob("answers/*"))
    kept[0].unlink()
    (out / "text2sql.json").unlink()
    assert make_sql_model(rows, plant, str(base), out, passes=12, rate=2e-3) == found
    assert sorted(out.glob("answers/*")) == kept
    with pytest.raises(InputError, match="made with other passes"):
        make_sql_model(rows, plant, str(base), out, passes=3, rate=2e-3)
    with pytest.raises(InputError, match="made with other questions"):
        make_sql_model(rows[:-1], plant, str(base), out, passes=12, rate=2e-3)


def test_a_cut_training_goes_on(rows, plant, base, tmp_path, monkeypatch):
    "A folder without a model is trained again from its last checkpoint."
    real, calls = sqlmodel.train, []

    def cut(model, order, folder, set_):
        calls.append(real(model, order, folder, set_)["steps"])
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(sqlmodel, "train", cut)
    monkeypatch.setattr(sqlmodel, "export_gguf", lambda *a: (_ for _ in ()).throw(RuntimeError("trained")))
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            make_sql_model(rows, plant, str(base), tmp_path / "sql", passes=1, rate=2e-3)
        assert (tmp_path / "sql" / "model").exists() == (error is RuntimeError)
    assert len(calls) == 2 and any((tmp_path / "sql" / "training").glob("checkpoint-*"))


def test_files_of_others_are_left_alone(rows, plant, base, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        make_sql_model(rows, plant, str(base), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_commands(made, plant, rows, base, tmp_path, capsys):
    examples = tmp_path / "questions.jsonl"
    examples.write_text("\n".join(json.dumps(row) for row in rows))
    out, _ = made
    asked = ["text2sql", str(plant), "--examples", str(examples), "--out", str(out), "--model", str(base)]
    assert cli.main([*asked, "--passes", "12", "--learning-rate", "2e-3"]) == 0
    assert "from a confidence of" in capsys.readouterr().out
    assert cli.main(["ask", str(plant), "What does Pump 17 cost?", "--model", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1700" in said and "answered by the model" in said
    assert cli.main([*asked, "--passes", "3"]) == 2
    assert "made with other" in capsys.readouterr().err
    assert cli.main(["ask", str(plant), "What?", "--model", str(tmp_path)]) == 2
    assert "rows.jsonl" in capsys.readouterr().err


def test_a_model_that_is_never_sure_leaves_the_rules_to_answer(made, plant, tmp_path, capsys):
    out, found = made
    (tmp_path / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes())
    (tmp_path / "text2sql.json").write_text(json.dumps(found | dict(threshold=None)))
    assert cli.main(["ask", str(plant), "What does Pump 17 cost?", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "1700" in said.out and "answered by rules" in said.out and "the rules answer" in said.err
