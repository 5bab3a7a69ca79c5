"""Instructions made of annotated rows and of documents alone."""

import re
import time

import pytest

from domain_llm.core import InputError
from domain_llm.data.leaks import decontaminate
from domain_llm.data.patterns import answered_questions, defined_terms, reasons, stated_triples
from domain_llm.data.tasks import (
    KINDS,
    MINED,
    NEEDS,
    definitions,
    document_questions,
    document_triples,
    language,
    mined,
    multiple_choice_rows,
    reading_comprehension,
    row_tasks,
    search_summary,
    text_to_sql,
)
from domain_llm.demo.facts import demo_strings
from domain_llm.demo.world import make_world
from domain_llm.judge.choice import asked_prompts
from domain_llm.train.sft import check_messages

MANUAL = """# 绞盘甲三

## 1 术语

绞盘是指沿闸墙牵引船舶的机械。平潮，是指潮位暂时不升不降的短暂时段。制动器是一种用于减缓闸门关闭速度的装置。

## 2 技术参数

| 项目 | 数值 |
|---|---|
| 工作压力 | 12 兆帕 |
| 润滑油 | 蓖麻油 |

## 3 维护

海水会腐蚀钢材。因此，外壳每周须用淡水冲洗一次。由于低温下密封圈会变硬，因此冬季启动前应当预热十分钟。记录由值班工程师签字。

### 更换密封圈的步骤

1. 关闭手动阀并断开电源。
2. 取下外壳，擦净密封槽。
3. 装入新的密封圈。

### 常见问题

问：多久检查一次？
答：每三十天检查一次。
"""


@pytest.fixture(scope="module")
def world():
    return make_world(entities=20)


@pytest.fixture(scope="module")
def documents(world):
    "The world's documents without planted leaks and copies."
    copies = {copy for _, copy in world["planted"]["duplicates"]}
    kept, _ = decontaminate(world["documents"], world["mcq"])
    return [d for d in kept if d["id"] not in copies]


def asked(row):
    return row["messages"][0]["content"]


def answer(row):
    return row["messages"][1]["content"]


def flat(text):
    return " ".join(text.split())


def answers_of(row):
    "The parts of an answer that must stand in the document."
    said = answer(row)
    if row["task"] == "d2spo":
        return [part for line in said.splitlines() for part in line.split(" | ")]
    if row["task"] == "d2qa":
        return re.findall(r"^(?:A: |答：)(.+)$", said, re.M) or [said]
    return said.splitlines() if row["task"] in ("steps", "terms") else [said]


def test_mined_triples_are_facts_of_the_world(world, documents):
    facts = {(f["entity"], f["attribute"], f["value"]) for f in world["facts"]}
    found = {}
    for doc in documents:
        for row in mined([doc], "d2spo"):
            lines = answer(row).splitlines()
            found.setdefault(doc["kind"], set()).update(tuple(line.split(" | ")) for line in lines)
    for kind, triples in found.items():
        print(f"{kind}: {len(triples)} triples, recall {len(triples & facts) / len(facts):.0%}")
        assert triples <= facts, f"{kind}: {triples - facts}"
    assert found["standard"] == found["book"] == facts
    assert set(found) == {"standard", "book"}  # of prose nothing is mined


def test_a_copy_with_other_words_still_gives_true_values(world):
    "A planted copy may say 'check interval'; whose value it is and which one must be right."
    facts = {(f["entity"], f["value"]) for f in world["facts"]}
    copies = {copy for _, copy in world["planted"]["duplicates"]}
    rows = [row for d in world["documents"] if d["id"] in copies for row in stated_triples(d["text"])]
    assert rows and {(s, v) for row in rows for s, _, v in row["triples"]} <= facts


@pytest.mark.parametrize("longest", [2000, 300])
def test_every_mined_answer_stands_in_its_document(world, longest):
    docs = [*world["documents"], dict(text=MANUAL)]
    tasks = set()
    for doc in docs:
        for row in mined([doc], MINED, longest=longest):
            check_messages(row["messages"], doc.get("id", "manual"))
            tasks.add(row["task"])
            for part in answers_of(row):
                assert flat(part) in flat(doc["text"]), (row["task"], part)
    if longest == 2000:
        assert tasks == {"d2qa", "d2spo", *KINDS}


def test_passages_are_no_longer_than_asked_for(world):
    for row in mined(world["documents"], MINED, longest=300):
        assert len(asked(row).encode()) < 300 + 300 and len(answer(row).encode()) < 1200


def test_chinese_documents_give_chinese_instructions():
    rows = mined([dict(text=MANUAL)], MINED)
    assert {row["task"] for row in rows} == {"d2qa", "d2spo", *KINDS}
    for row in rows:
        instruction = asked(row)
        for line in MANUAL.splitlines():
            instruction = instruction.replace(line, "") if line else instruction
        assert not re.search("[A-Za-z]{3}", instruction), instruction
        assert re.search("[\u4e00-\u9fff]", instruction)
    by_task = {task: [answer(row) for row in rows if row["task"] == task] for task in ("d2spo", "reason", "terms")}
    assert by_task["d2spo"] == ["绞盘甲三 | 工作压力 | 12 兆帕\n绞盘甲三 | 润滑油 | 蓖麻油"]
    assert by_task["reason"] == ["因此，外壳每周须用淡水冲洗一次。", "冬季启动前应当预热十分钟。"]
    assert by_task["terms"] == ["绞盘\n平潮\n制动器"]


def test_language_goes_by_the_share_of_chinese_characters():
    assert language("The valve opens at 40 bar.") == language("") == language("12") == "en"
    assert language("The term 溢流阀 names a relief valve that opens by itself.") == "en"
    assert language("溢流阀 RV-40 的 relief pressure 为 40 bar，由值班工程师每三十天检查一次。") == "zh"


def test_no_instruction_holds_an_exam_question(world, documents):
    rows = mined(documents, MINED)
    texts = [asked(row) + "\n" + answer(row) for row in rows]
    as_documents = [dict(text=text, source="", kind="general", id=str(i)) for i, text in enumerate(texts)]
    assert decontaminate(as_documents, world["mcq"])[1] == []
    stems = {q["question"] for q in world["mcq"]}
    assert not any(stem in text for text in texts for stem in stems)


@pytest.mark.parametrize("style", ["cloze", "letter"])
def test_even_leaking_documents_give_no_prompt_of_the_exam(world, style):
    "A leak of the corpus may be repeated, but nothing is asked as the exam asks it."
    prompts = [flat(text) for text, _ in asked_prompts(world["mcq"], style)]
    texts = "\n".join(flat(asked(row) + " " + answer(row)) for row in mined(world["documents"], MINED))
    assert not any(prompt in texts for prompt in prompts)


def test_the_seed_decides_everything(documents):
    first, again, other = (mined(documents, MINED, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [row["task"] for row in first] == [row["task"] for row in other]


def test_the_line_format_is_that_of_the_demo(world):
    rows = [row for row in world["instructions"] if row["task"] == "domain_extraction"]
    triples = [[line.split(" | ") for line in answer(row).splitlines()] for row in rows]
    texts = [asked(row).split("\n\n", 1)[1] for row in rows]
    built = document_triples([dict(text=text, triples=t) for text, t in zip(texts, triples)])
    assert [answer(row) for row in built] == [answer(row) for row in rows]
    wordings = [wording.split("\n")[0] for wording in demo_strings()["instructions"]["extract"]]
    assert sum(asked(row).startswith(tuple(wordings)) for row in built) > 0


def test_a_document_is_asked_for_its_questions():
    rows = [dict(text="It opens.", question=f"q{i}?", answer=f"a{i}") for i in range(2)]
    built = document_questions([*rows, dict(text="阀门打开。", question="什么打开？", answer="阀门")])
    assert [answer(row) for row in built] == [
        "a0",
        "a1",
        "阀门",
        "Q: q0?\nA: a0\n\nQ: q1?\nA: a1",
        "问：什么打开？\n答：阀门",
    ]
    assert all(row["task"] == "d2qa" for row in built)


def test_other_builders():
    (row,) = multiple_choice_rows([dict(question="Which?", choices=["a", "b", "c"], answer=2)])
    assert "A. a\nB. b\nC. c" in asked(row) and answer(row) == "C. c"
    (row,) = search_summary([dict(query="阀门", results=["甲 {x}", "乙"], summary="阀门在四十巴时打开。")])
    assert "[1] 甲 {x}\n\n[2] 乙" in asked(row) and answer(row) == "阀门在四十巴时打开。" and "搜索" in asked(row)
    (row,) = text_to_sql([dict(question="How many?", sql="SELECT COUNT(*) FROM t", schema="CREATE TABLE t (a)")])
    assert "CREATE TABLE t (a)" in asked(row) and answer(row) == "SELECT COUNT(*) FROM t"
    (row,) = definitions([dict(term="sill", definition="The stone threshold of a lock.")])
    assert "sill" in asked(row) and row["task"] == "definitions"


@pytest.mark.parametrize(
    "build, row, said",
    [
        (document_questions, dict(text="a", question="b"), "document_questions: row 2 has no text under 'answer'"),
        (document_questions, dict(text="a", question="b", anwser="c"), "did you mean 'anwser'"),
        (document_questions, "text", "row 2 is a str"),
        (document_triples, dict(text="a", triples=[["s", "p"]]), "row 2 needs 'triples'"),
        (document_triples, dict(text="a", triples=[["s", "p | q", "o"]]), "row 2 needs 'triples'"),
        (document_triples, dict(text="a", triples=[]), "row 2 needs 'triples'"),
        (search_summary, dict(query="a", results="one", summary="b"), "row 2 needs 'results'"),
        (text_to_sql, dict(question="a", sql="b", schema=" "), "row 2 has no text under 'schema'"),
        (multiple_choice_rows, dict(question="a", choices=["b", "c"], answer=2), "a place from 0 to 1"),
        (multiple_choice_rows, dict(question="a", choices=["b", "c"], answer=True), "row 2 needs 'answer'"),
        (multiple_choice_rows, dict(question="a", choices=["b"], answer=0), "row 2 needs 'choices'"),
        (definitions, dict(term=3, definition="b"), "row 2 has no text under 'term'"),
        (reading_comprehension, dict(text=None), "row 2 has no text under 'text'"),
    ],
)
def test_a_broken_row_is_named(build, row, said):
    whole = dict(text="a", question="b", answer="c", triples=[["s", "p", "o"]], query="q", results=["r"])
    whole |= dict(summary="s", sql="x", schema="y", term="t", definition="d")
    if build is multiple_choice_rows:
        whole |= dict(choices=["b", "c"], answer=0)
    with pytest.raises(InputError, match=re.escape(said)):
        build([whole, row])


def test_tasks_that_cannot_be_mined_are_refused():
    for name, said in (("d2sop", "did you mean 'd2spo'"), ("step", "did you mean 'steps'"), ("text2sql", "annotated")):
        with pytest.raises(InputError, match=said):
            mined([dict(text="a")], [name])
    assert mined([], MINED) == []
    assert mined([dict(text="No form at all")], "reading_comprehension") == []


def test_a_name_stands_for_the_tasks_of_its_rows(documents):
    assert row_tasks(MINED) == list(NEEDS) == ["d2qa", "d2spo", *KINDS]
    assert row_tasks("steps") == ["steps"] and row_tasks(["terms", "reading_comprehension"]) == list(KINDS)
    for name in MINED:
        assert {row["task"] for row in mined(documents, name)} <= set(row_tasks(name))


DOUBTFUL = [
    "A major problem is a lack of money that nobody saw.",
    "This is a tool that breaks.",
    "It is defined as broken.",
    "这并不是指水箱。",
    "其主要是指水箱。",
    "A capstan is a winch that hauls",
]


@pytest.mark.parametrize("text", DOUBTFUL)
def test_what_defines_nothing(text):
    assert defined_terms(text) == []


def test_definitions_of_laws_and_standards():
    assert [t for t, _ in defined_terms('"Affiliate" means any person. The term sill shall mean a stone.')] == [
        "Affiliate",
        "sill",
    ]
    assert [t for t, _ in defined_terms("本办法所称“船闸”，是指供船舶通过的水工建筑物。")] == ["船闸"]


def test_doubtful_tables_and_lists_state_nothing():
    for block in (
        "| Property | Value |\n|---|---|\n| fluid | oil |",  # no heading
        "# How do I fill it?\n\n| Property | Value |\n|---|---|\n| fluid | oil |",  # no subject
        "# Falcon 12\n\n4 Records\n\n| Property | Value |\n|---|---|\n| kept | 8 years |",  # of the records
        "# Falcon 12\n\n| Property | Value |\n|---|---|\n| fluid | oil |\n| fluid | water |",  # two values
        "# Falcon 12\n\n| Property | Value |\n|---|---|\n| fluid | oil | red |",  # a ragged row
        "# Falcon 12\n\n- fluid: oil\n- open the valve",  # a list of something else
        "# Falcon 12\n\n- Note: oil\n- fluid: oil",  # remarks
    ):
        assert stated_triples(block) == [], block
    owned = "# Falcon 12 and Falcon 13\n\n- fluid of the Falcon 12: oil\n- fluid of the Falcon 13: water"
    assert stated_triples(owned)[0]["triples"] == [["Falcon 12", "fluid", "oil"], ["Falcon 13", "fluid", "water"]]


def test_questions_whose_answer_has_no_clear_end_are_left():
    assert answered_questions("Q: Why?\nA: Rust.\nAnd salt.") == []
    assert answered_questions("**Q: Why?**\n**A:** Rust.\n\nQ: How?\nA: Slowly.") == [
        ("Why?", "Rust."),
        ("How?", "Slowly."),
    ]
    assert answered_questions("问题1：何时开闸？答案：平潮时。") == [("何时开闸？", "平潮时。")]


def test_causes_stand_in_the_same_paragraph():
    assert list(reasons("Salt eats steel.\n\nTherefore, rinse it.")) == []
    assert list(reasons("水位上升，因此闸门关闭，所以船舶停航。")) == []  # which of the two follows from what?


def test_a_long_or_strange_document_takes_no_long_time():
    heading = "## 3 Terms\n\n3.1 Bush: the sleeve in which a shaft turns.\n\nA line. Therefore, another.\n"
    texts = ["\n" * 20_000, "| a " * 9000, "Q: " * 9000, "，因此" * 9000, "A b " * 9000, "- a: " * 9000]
    texts += ["# T\n" + "a line of text\n" * 9000, heading * 500, "“" * 9000, "1. " * 9000]
    start = time.process_time()
    for text in texts:
        mined([dict(text=text + "x")], MINED)
    assert time.process_time() - start < 10
