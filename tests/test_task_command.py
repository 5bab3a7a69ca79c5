"""`domain-llm task`: the words of the rows, the answers, the metric beside the baseline, and what is refused."""

import pytest

from domain_llm.cli import main
from domain_llm.core import InputError, read_json, read_jsonl, write_jsonl
from domain_llm.data.tasks import asked, document_questions, document_triples, search_summary
from domain_llm.task_command import baseline, found_in, read_rows, scored, told_scores

TEXT = {"en": "The seal of the Heron is rubber.", "zh": "苍鹭型的密封材料是橡胶。"}
TRIPLES = [
    dict(text="The Heron has seals of rubber. It opens at 40 bar.", triples=[["Heron", "seal", "rubber"]]),
    dict(text="Seals of the Crane: cork. It opens at 55 bar.", triples=[["Crane", "pressure", "55 bar"]]),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Answers of other tests are not read."
    monkeypatch.setenv("DOMAIN_LLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_model_is_asked_in_words_that_it_was_trained_on(lang):
    text, triple = TEXT[lang], ["a", "b", "c"]
    pages = dict(query=text, results=[text, text])
    cases = [
        ("d2spo", dict(text=text), document_triples, dict(triples=[triple])),
        ("d2qa", dict(text=text, question=text), document_questions, dict(answer=text)),
        ("search2sum", pages, search_summary, dict(summary=text)),
    ]
    for task, row, build, answer in cases:
        trained = {build([row | answer], seed)[0]["messages"][0]["content"] for seed in range(30)}
        assert asked(task, [row])[0] in trained
    pairs = [dict(text=text, question=f"{text}{i}", answer=text) for i in range(2)]
    trained = {document_questions(pairs, seed)[-1]["messages"][0]["content"] for seed in range(30)}
    assert asked("d2qa", [dict(text=text)])[0] in trained


def test_a_document_becomes_passages(tmp_path):
    lines = [f"第{i}行：" + "压" * 100 for i in range(20)]
    (tmp_path / "manual.md").write_text("\n".join(lines) + "\n" + "长" * 1500, encoding="utf-8")
    rows = read_rows("d2spo", tmp_path)
    assert all(len(row["text"].encode()) <= 2000 for row in rows)
    whole = "".join("".join(row["text"].split()) for row in rows)
    assert whole == "".join(lines) + "长" * 1500


def test_what_a_program_can_read_is_taken_out():
    said = "Sure:\nHeron | seal | rubber\n苍鹭 ｜ 压力 ｜ 40 bar\nno triple | here"
    assert found_in("d2spo", said) == [["Heron", "seal", "rubber"], ["苍鹭", "压力", "40 bar"]]
    assert found_in("d2qa", "Q: Which seal?\nA: Rubber.\n\n问：压力？\n答：40 bar。") == [
        ("Which seal?", "Rubber."),
        ("压力？", "40 bar。"),
    ]


def test_baselines_know_what_training_says_and_no_more():
    test = [dict(text="The Ibis opens at 70 bar and has seals of felt.", triples=[["Ibis", "seal", "felt"]])]
    assert baseline("d2spo", test, TRIPLES) == ["Ibis | pressure | 70 bar"]
    known = [dict(text="x", question="Which seal has the Heron?", answer="Rubber.", group="Heron")]
    assert baseline("d2qa", [dict(question="Which seal has the Ibis?", group="Ibis")], known) == ["Rubber."]
    assert baseline("search2sum", [dict(results=["苍鹭很大。它是蓝色的。", "x"])]) == ["苍鹭很大。"]


def test_scores_by_hand():
    "ROUGE-L: 2 * 3 / (3 + 4) and 1 against 2 * 2 / (2 + 4) and 2 * 1 / (1 + 4); the differences are paired."
    rows = [dict(query=q, results=["a b. c"], summary="a b c d") for q in "xy"]
    rows[1]["results"] = ["d. c"]
    found = scored("search2sum", rows, ["a b d", "a b c d"])
    assert found["model"]["values"] == pytest.approx([6 / 7, 1])
    assert found["baseline"]["values"] == pytest.approx([4 / 6, 2 / 5])
    assert found["change"]["diff"] == pytest.approx(((6 / 7 - 4 / 6) + (1 - 2 / 5)) / 2)
    assert told_scores(found)[0] == "ROUGE-L, mean of 2 rows in 2 groups"
    same = scored("d2spo", TRIPLES, ["Heron | seal | rubber", "nothing"], [])
    assert same["model"]["values"] == [1, 0] and same["model"]["f1"] == pytest.approx(2 / 3)
    assert told_scores(same)[-1] == "50% of the model's answers are triples and nothing else"
    assert "all groups agree" in told_scores(scored("d2spo", TRIPLES, ["", ""], []))[3]


def test_the_command_answers_and_measures(tiny_folder, tmp_path, capsys):
    test, train, out, figures = (tmp_path / f"{name}.jsonl" for name in ("test", "train", "out", "figures"))
    write_jsonl(test, [dict(row, id=i) for i, row in enumerate(TRIPLES)] + [dict(text="没有答案。", id=9)])
    write_jsonl(train, TRIPLES)
    asked_for = ["task", "d2spo", str(tiny_folder), str(test), "--train", str(train), "--max-tokens", "4"]
    assert main([*asked_for, "--out", str(out), "--json", str(figures)]) == 0
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [0, 1, 9] and all(isinstance(row["output"], str) for row in rows)
    said, found = capsys.readouterr().out, read_json(figures)
    assert "mean of 2 rows in 2 groups" in said and "known values" in said
    assert found["baseline"]["values"] == pytest.approx([2 / 3, 1]), "40 bar looks like a pressure, too"
    assert found["model"]["mean"] == 0 and found["change"]["diff"] == pytest.approx(-5 / 6)


BAD = {
    "no results": ("search2sum", [dict(query="x")], [], "row 1 needs 'results'"),
    "half a question": ("d2qa", [dict(text="x", question=" ")], [], "no text under 'question'"),
    "no text": ("d2spo", [dict(txt="x")], [], "no text under 'text'"),
    "a triple of two": ("d2spo", [dict(text="x", triples=[["a", "b"]])], [], "needs 'triples'"),
    "nothing to learn from": ("d2spo", TRIPLES, [], "--train FILE"),
    "no tokens": ("d2spo", [dict(text="x")], ["--max-tokens", "0"], "at least 1"),
    "nothing to measure": ("d2spo", [dict(text="x")], ["--json", "f.json"], "no row of"),
    "no rows": ("d2spo", [], [], "has no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_a_model_is_loaded(case, tmp_path, capsys, monkeypatch):
    task, rows, options, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", rows)
    assert main(["task", task, "no-such-model", "rows.jsonl", *options]) == 2
    assert said in capsys.readouterr().err


def test_documents_are_no_search():
    with pytest.raises(InputError, match="query and results"):
        read_rows("search2sum", "manuals")
