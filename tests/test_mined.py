"""`tasks` in a recipe: from a folder of documents to the conversations that are trained on."""

import json
import random
import re

import pytest
import yaml

from domain_llm.core import InputError, fingerprint, read_json, read_jsonl
from domain_llm.data.mix import mixture
from domain_llm.run import experiments, keep, pipeline
from domain_llm.run.arms import arm_recipes, base_recipe, read_experiment
from domain_llm.run.inputs import read_inputs
from domain_llm.run.pipeline import run_recipe, run_stage
from domain_llm.run.preflight import SAMPLE, mined_findings, settings_findings
from domain_llm.run.recipe import check_recipe, read_recipe, training_stages
from domain_llm.run.report import write_report
from domain_llm.run.stages import marks, stages
from domain_llm.train.sft import encode_all, render_faults

WORDS = "lock gate sluice barge chamber keel rope winch quay pier tide ebb mooring hull deck bilge crew ferry".split()
HAN = "闸门船室水位绞盘缆绳码头潮汐龙骨甲板船员渡口堤岸航道浮标锚链舵轮桅杆帆布"
FAQ = "How many keepers must be on duty when the northern sluice is opened at night?"
TABLE = (
    "What does the text give as relief valve pressure for Bramble 6?",
    ('Which entry does the text have under "relief valve pressure" for Bramble 6?'),
)


def english(i):
    rng = random.Random(i)
    prose = " ".join(f"The {rng.choice(WORDS)} of the {rng.choice(WORDS)} is old." for _ in range(12))
    rows = f"| relief valve pressure | {40 + i} bar |\n| oil | {rng.choice(WORDS)} oil {i} |"
    return f"# Bramble {i}\n\n{prose}\n\n## Values\n\n| Property | Value |\n|---|---|\n{rows}\n"


def chinese(i):
    rng = random.Random(100 + i)
    prose = "".join("".join(rng.choices(HAN, k=9)) + "。" for _ in range(12))
    rows = f"| 工作压力 | {12 + i} 兆帕 |\n| 润滑油 | {rng.choice(HAN)}油 |"
    return f"# 绞盘甲{i}\n\n{prose}\n\n## 技术参数\n\n| 项目 | 数值 |\n|---|---|\n{rows}\n"


@pytest.fixture
def folder(tmp_path):
    "Twenty documents with a table each, a page of questions with one of the exam's, and the exam."
    (tmp_path / "docs").mkdir()
    for i in range(10):
        (tmp_path / "docs" / f"en{i}.md").write_text(english(i))
        (tmp_path / "docs" / f"zh{i}.md").write_text(chinese(i))
    page = f"# Questions\n\n{english(50)[:400]}\n\nQ: {FAQ}\nA: Two keepers.\n\nQ: Who oils the winch?\nA: The crew.\n"
    (tmp_path / "docs" / "faq.md").write_text(page)
    rows = [dict(question=q, choices=["43 bar", "2"], answer=0) for q in TABLE]
    rows.append(dict(question=FAQ, choices=["Two keepers", "None"], answer=0))
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(**more):
    "Settings with three tasks, and others in their place."
    data = dict(documents="docs", questions="exam.jsonl")
    tasks = ["d2qa", "d2spo", "title"]
    return dict(dict(data=data, tasks=tasks, corpus=dict(held_out=0.3), output="out"), **more)


def corpus(folder, **more):
    "The corpus stage of a recipe: its settings, folder and figures, and whether it was done anew."
    cfg = check_recipe(recipe(**more), folder)
    keep.claim(folder / "out")
    read_inputs(cfg, folder / "out")
    new, figures = run_stage(cfg, folder / "out", "corpus", stages(cfg)["corpus"], "model")
    return cfg, folder / "out" / "corpus", figures, new


def spoken(rows):
    return "\n".join(turn["content"] for row in rows for turn in row["messages"])


def test_held_out_documents_are_not_mined_and_all_others_are(folder):
    _, out, figures, _ = corpus(folder)
    kept, held = (read_jsonl(out / f"{name}.jsonl") for name in ("documents", "held_out"))
    said = spoken(read_jsonl(out / "instructions.jsonl"))
    name = {doc["id"]: doc["text"].splitlines()[0].removeprefix("# ") for doc in [*kept, *held]}
    assert {name[doc["id"]].rstrip("0123456789") for doc in held} == {"Bramble ", "绞盘甲"}
    for doc in held:
        assert not re.search(name[doc["id"]] + r"(?!\d)", said), doc["id"]
    for doc in kept:
        assert name[doc["id"]] in said
    tables = sum(
        doc["id"] != "faq.md" for doc in kept
    )  # two rows each and a list; two more of the page, two leaks less
    assert figures["mined_per_task"] == {"d2qa": 3 * tables, "d2spo": tables, "title": 2 * len(kept)}
    assert figures["mined"] == sum(figures["mined_per_task"].values())


def test_no_question_of_the_exam_is_mined(folder, capsys):
    "One is copied in a page, from which nothing of it is mined; another only comes to be when a table is asked about."
    _, out, _, _ = corpus(folder)
    rows = read_jsonl(out / "instructions.jsonl")
    assert "Bramble 6" in (out / "documents.jsonl").read_text() and "Who oils the winch?" in spoken(rows)
    assert not any(question in spoken(rows) for question in [FAQ, *TABLE])
    report = read_json(out / "report.json")
    (d2qa,) = [found for found in report["tasks"] if found["task"] == "d2qa"]
    assert d2qa["found"] - d2qa["rows"] == 2  # the question, and the document's list of questions
    gone = [leak["question"] for leak in report["leaks_by_source"]["tasks"] if leak["reason"] == "leak"]
    assert len(gone) == 2 and set(gone) <= set(TABLE)
    assert "2 rows of 'tasks' held exam questions" in capsys.readouterr().out


def test_mined_rows_are_conversations_that_the_template_takes(folder, tok):
    rows = read_jsonl(corpus(folder)[1] / "instructions.jsonl")
    assert render_faults(rows, tok) == []
    coded, left_out = encode_all(rows, tok, length=2000)
    assert left_out == 0 and len(coded) == len(rows)
    for row, piece in zip(rows, coded):
        graded = tok.decode([label for label in piece["labels"] if label != -100])
        assert graded == row["messages"][1]["content"].strip() + "<|im_end|>"
        assert re.fullmatch(r"mined row \d+, task (d2qa|d2spo|title)", row["where"])


def test_the_recipes_own_conversations_come_first_and_stay(folder):
    talk = [dict(role="user", content="Who opens it?"), dict(role="assistant", content="The keeper.")]
    (folder / "own.jsonl").write_text(json.dumps(dict(messages=talk)) + "\n")
    data = dict(documents="docs", questions="exam.jsonl", instructions="own.jsonl")
    _, out, figures, _ = corpus(folder, data=data)
    rows = read_jsonl(out / "instructions.jsonl")
    assert rows[0]["messages"] == talk and len(rows) == 1 + figures["mined"]


def test_the_seed_decides_what_is_mined_and_in_which_order_it_is_trained_on(folder, tok):
    _, out, _, _ = corpus(folder)
    first = (out / "instructions.jsonl").read_text()
    _, _, _, new = corpus(folder, seed=1)
    assert new and (out / "instructions.jsonl").read_text() != first
    _, _, _, new = corpus(folder)
    assert not new and (out / "instructions.jsonl").read_text() == first
    rows, _ = encode_all(read_jsonl(out / "instructions.jsonl"), tok, 2000, "instructions")
    sources = dict(domain=[dict(input_ids=[1] * 3000, labels=[1] * 3000, source="domain")], instructions=rows)
    runs = [mixture(sources, dict(domain=1, instructions=1), seed=seed)[0] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


MODELS = dict(model="model", chat_model=None)


def all_marks(cfg, out):
    "The present fingerprint of every stage as far as the corpus decides it."
    plan = stages(cfg)
    (out / "pretrain").mkdir(exist_ok=True)
    return {name: marks(cfg, name, plan[name], out, MODELS)[0] for name in ("corpus", "baseline", "pretrain")}


def test_other_tasks_repeat_corpus_and_training_but_read_nothing_again(folder):
    mix = dict(parts=dict(domain=1, instructions=1))
    cfg, _, _, _ = corpus(folder, mix=mix)
    before, stamps = all_marks(cfg, folder / "out"), [p.stat().st_mtime_ns for p in folder.glob("out/inputs/*/*")]
    cfg, _, _, new = corpus(folder, mix=mix, tasks=["d2spo"])
    after = all_marks(cfg, folder / "out")
    assert new and {name for name in before if before[name] != after[name]} == {"corpus", "pretrain"}
    assert [p.stat().st_mtime_ns for p in folder.glob("out/inputs/*/*")] == stamps
    assert not corpus(folder, mix=mix)[3]


def test_a_corpus_made_without_the_setting_serves_a_recipe_without_tasks(folder):
    cfg = check_recipe(recipe(tasks=[]), folder)
    keep.claim(folder / "out")
    read_inputs(cfg, folder / "out")
    stage = stages(cfg)["corpus"]
    reads = {name: keep.content(folder / "out", path) for name, path in stage.reads.items()}
    old = fingerprint("corpus", stage.version, dict(corpus=cfg["corpus"], seed=0), reads)
    made, _ = keep.begin(folder / "out", "corpus", [old])
    keep.finish(made, metrics=dict(documents=1))
    assert corpus(folder, tasks=[])[2:] == (dict(documents=1), False)
    assert corpus(folder)[3]


def test_a_task_without_a_row_says_what_it_looks_for(folder, capsys):
    _, out, figures, _ = corpus(folder, tasks=["steps", "d2spo", "reading_comprehension"])
    said = capsys.readouterr().out
    assert "task 'steps' found nothing in these documents; it looks for a numbered list" in said
    assert "task 'd2spo' found nothing" not in said and "d2spo 14" in said
    assert figures["mined_per_task"]["steps"] == 0 and figures["mined_per_task"]["continuation"] > 0


def test_tasks_that_find_nothing_at_all_end_the_run_before_it_trains(folder):
    with pytest.raises(InputError, match=r"tasks \(steps\) made no conversation of these documents.*data.instructions"):
        corpus(folder, tasks=["steps"])


def test_a_recipe_with_tasks_needs_no_other_conversations(folder):
    cfg = check_recipe(recipe(tasks="d2qa", mix=dict(parts=dict(domain=1, instructions=1))), folder)
    assert cfg["tasks"] == ["d2qa"] and training_stages(cfg) == ["pretrain", "sft"]
    with pytest.raises(InputError, match="data.instructions is empty, and so is tasks"):
        check_recipe(recipe(tasks=[], mix=dict(parts=dict(domain=1, instructions=1))), folder)
    idle = check_recipe(recipe(sft=False), folder)
    assert "nothing trains on them" in settings_findings(idle)[0]["said"]
    assert settings_findings(check_recipe(recipe(), folder)) == []


def test_long_mined_rows_are_found_before_the_training(folder, tiny_folder, monkeypatch):
    cfg, _, figures, _ = corpus(folder, model=str(tiny_folder), sft=dict(length=200, tokens_per_step=200))
    (found,) = [f for f in mined_findings(cfg, folder / "out") if f["about"] != "format"]
    assert found["about"] == "mined instructions for sft" and f"of {figures['mined']} conversations" in found["said"]
    monkeypatch.setattr("domain_llm.run.preflight.SAMPLE", 10)
    (found,) = [f for f in mined_findings(cfg, folder / "out") if f["about"] != "format"]
    taken = int(re.match(r"(\d+) of", found["about"])[1])
    assert (
        SAMPLE == 1000
        and 5 <= taken <= 10
        and found["about"].endswith(f"of {figures['mined']} mined instructions for sft")
    )
    cfg["sft"]["length"] = 8
    with pytest.raises(InputError, match="none of .* conversations fits into length: 8"):
        pipeline._say_mined(cfg, folder / "out")


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    "A run on documents alone, with tasks: its folder and metrics."
    where = tmp_path_factory.mktemp("mined")
    (where / "docs").mkdir()
    for i in range(8):
        (where / "docs" / f"{i}.md").write_text(english(i))
    cfg = dict(
        model=str(tiny_folder),
        output="out",
        data=dict(documents="docs"),
        tasks=["d2qa", "d2spo", "steps"],
        mix=dict(parts=dict(domain=2, general=1, instructions=1), epochs=0.5),
        pretrain=dict(length=256, tokens_per_step=256, probes=1),
        sft=dict(epochs=0.2, probes=1),
        evaluate=dict(probe_tokens=200, questions=10),
        quantize=False,
    )
    (where / "r.yaml").write_text(yaml.safe_dump(cfg))
    return where / "out", run_recipe(where / "r.yaml")


def test_manifest_metrics_and_report_count_the_mixture_twice(run):
    out, metrics = run
    figures = read_json(out / "pretrain" / "manifest.json")["metrics"]
    tokens, supervised = metrics["tokens_per_source"], metrics["supervised_per_source"]
    assert list(tokens) == ["domain", "general", "instructions"] and read_json(out / "metrics.json") == metrics
    assert {name: figures[name] for name in ("tokens_per_source", "supervised_per_source", "shares")} == {
        name: metrics[name] for name in ("tokens_per_source", "supervised_per_source", "shares")
    }
    for name in tokens:
        assert metrics["shares"]["tokens"][name] == pytest.approx(tokens[name] / sum(tokens.values()), abs=1e-4)
        assert metrics["shares"]["supervised"][name] == pytest.approx(
            supervised[name] / sum(supervised.values()), abs=1e-4
        )
    assert metrics["shares"]["tokens"]["domain"] == pytest.approx(0.5, abs=0.01)
    assert 0 < metrics["shares"]["supervised"]["instructions"] < 0.5 * metrics["shares"]["tokens"]["instructions"]
    page = (out / "report.html").read_text()
    assert f"{supervised['instructions']:,}" in page and "supervised tokens" in page
    history = read_json(out / "pretrain" / "history.json")
    assert {f"loss_{name}" for name in tokens} <= {key for point in history for key in point}


def test_the_report_names_what_each_task_gave(run):
    out, _ = run
    page = (out / "report.html").read_text()
    per_task = read_json(out / "corpus" / "manifest.json")["metrics"]["mined_per_task"]
    assert per_task["d2spo"] == 7 and per_task["steps"] == 0  # eight documents, one of them held out
    assert f'<td>d2spo</td><td class="n">{per_task["d2spo"]}</td>' in page
    assert "nothing found in these documents; it looks for a numbered list" in page
    card = (out / "MODEL_CARD.md").read_text()
    assert f"{per_task['d2qa']} d2qa, 7 d2spo." in card and "steps" not in card
    assert read_json(out / "sft" / "manifest.json")["metrics"]["conversations"] > 0


def test_a_report_of_a_training_without_the_counts_still_stands(run, tmp_path):
    out, _ = run
    manifest = read_json(out / "pretrain" / "manifest.json")
    kept = json.dumps(manifest)
    for name in ("supervised_per_source", "shares"):
        del manifest["metrics"][name]
    try:
        (out / "pretrain" / "manifest.json").write_text(json.dumps(manifest))
        names = ["corpus", "baseline", "pretrain", "sft", "evaluate", "answers"]
        metrics = write_report(out, tmp_path, dict(name="x", model="m", seed=0), names)
    finally:
        (out / "pretrain" / "manifest.json").write_text(kept)
    assert metrics["shares"] is None and metrics["tokens_per_source"]["domain"] > 0
    assert "supervised tokens" not in (tmp_path / "report.html").read_text()


ARMS = """
equal: tokens
recipe: {mix: {parts: {domain: 1, instructions: 1}}}
arms:
  triples: {tasks: [d2spo]}
  titles: {tasks: [title]}
claims:
  - {text: a, metric: domain_bpb, arm: triples, base: titles, direction: less}
"""


def test_arms_of_an_experiment_may_name_other_tasks(folder, tiny_folder, tmp_path):
    (tmp_path / "e.yaml").write_text(ARMS)
    more = dict(
        model=str(tiny_folder), mix=dict(tokens=600, max_epochs=50), evaluate=dict(questions=2, probe_tokens=100)
    )
    pretrain = dict(length=512, tokens_per_step=512)
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe(tasks=["d2qa"], pretrain=pretrain, **more)))
    what = read_experiment(tmp_path / "e.yaml")
    arms, without = arm_recipes(what, base_recipe(what, read_recipe(folder / "r.yaml")), [])
    assert list(arms) == ["triples", "titles"] and not without
    result = experiments.ablation(tmp_path / "e.yaml", folder / "r.yaml", seeds=1, output=tmp_path / "out")
    assert {name: arm["tasks"] for name, arm in result["arms"].items()} == dict(triples=["d2spo"], titles=["title"])
    values = [run["0"]["domain_bpb"]["values"] for run in result["runs"].values()]
    assert values[0] != values[1] != result["before"]["domain_bpb"]["values"]
