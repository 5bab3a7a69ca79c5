"""The checklist of a project: folders made by hand, with figures whose verdict follows from a hand computation."""

import json

import pytest

from domain_llm import cli
from domain_llm.core import InputError, write_json, write_jsonl
from domain_llm.judge.ablate import verdict
from domain_llm.run import course as c
from domain_llm.ship.accept import accept

NAMES = ["multiple choice", "open questions", "ablation", "forgetting", "quantization", "served task", "review"]


def answers(right, n, size=1):
    "So many right answers of n, in groups of a size."
    groups = [f"g{i // size}" for i in range(n)]
    return dict(correct=[int(i < right) for i in range(n)], groups=groups)


def measured(general, groups=68, size=2):
    n = groups * size
    exam = answers(n // 2, n, size) | dict(n=n, accuracy=0.5, low=0.4, high=0.6)
    change = dict(low=general - 2 - 0.02, high=general - 2 + 0.02)
    return dict(domain_mcq=exam, general_bpb=dict(bpb=general, change=change))


def open_rows(groups=49):
    return [
        dict(question=f"第 {i} 台泵的压力是多少？", reference="125 巴", group=f"泵 {i // 2}") for i in range(2 * groups)
    ]


def experiment(shift, seeds=3, items=20, control=False, **more):
    "A result of two arms whose items differ by `shift` with a spread of 0.01 that two seeds share."
    base = [0.5 + 0.01 * (i % 3) for i in range(items)]
    runs = {"with": {}, "without": {}}
    for seed in range(seeds):
        moved = [b + shift + 0.01 * ((i * (seed + 2)) % 5 - 2) for i, b in enumerate(base)]
        runs["with"][str(seed)] = dict(domain_exact=dict(values=moved))
        runs["without"][str(seed)] = dict(domain_exact=dict(values=base))
    claim = dict(text="it helps", metric="domain_exact", arm="with", base="without", control=control, **more)
    known = dict(experiment="mix", model="pump-base", seeds=list(range(seeds)))
    return known | dict(claims=verdict(runs, [claim]))


def formats(lost, n=400, kind="open", right=300):
    "Original and one file that answers `lost` questions fewer."
    before, after = answers(right, n), answers(right - lost, n)
    file = dict(name="q8_0", program="llama.cpp", bytes=10_000_000, tasks={kind: after})
    judged = accept({kind: before}, [file], 0.03)
    return dict(original=dict(tasks={kind: before}), formats=dict(q8_0=file), verdict=judged)


SQL = dict(threshold=0.6, questions=60, right=45, answered=40, right_answered=39, wanted=0.95, file="q8_0.gguf")


DECIDED, ACCEPTED = experiment(0.5), formats(0)


@pytest.fixture
def run(tmp_path):
    "The folder of a project where all that is required passes."
    run = tmp_path / "runs" / "pumps"
    (run / ".domain_llm").mkdir(parents=True)
    write_json(run / "baseline" / "measured.json", measured(2.0))
    write_json(run / "baseline" / "manifest.json", dict(settings=dict(model="models/pump-base")))
    write_json(run / "evaluate" / "measured.json", measured(2.1))
    for stage, budget in (("pretrain", 0.01), ("sft", 0.10)):
        write_json(run / stage / "manifest.json", dict(settings={stage: dict(forgetting_budget=budget)}))
    write_jsonl(run / "open.jsonl", open_rows())
    write_json(run / "ablate" / "mix" / "result.json", DECIDED)
    write_json(run / "formats" / "result.json", ACCEPTED)
    return run


def states(run, recipe=None):
    return {item["item"]: item["state"] for item in c.course(run, recipe)["items"]}


def test_a_finished_project_passes(run):
    found = c.course(run)
    assert [item["item"] for item in found["items"]] == NAMES
    assert states(run) == dict.fromkeys(NAMES[:-1], "passed") | dict(review="missing")
    assert found["passed"] and not any(i["command"] for i in found["items"] if i["state"] == "passed")
    assert c.told_course(found)[-1] == "6 of 6 required items passed"


def test_an_empty_run_lacks_everything(tmp_path):
    run = tmp_path / "run"
    (run / ".domain_llm").mkdir(parents=True)
    found = c.course(run)
    assert set(states(run).values()) == {"missing"} and not found["passed"]
    assert all(item["command"].startswith("domain-llm ") for item in found["items"])
    with pytest.raises(InputError, match="is not the folder of a run"):
        c.course(tmp_path)


@pytest.mark.parametrize("groups, state", [(67, "failed"), (68, "passed")])
def test_the_exam_needs_groups_by_hand(run, groups, state):
    "McNemar, a fifth answered differently: 0.15 sqrt(n) = 1.96 sqrt(0.2) + 0.8416 sqrt(0.2 - 0.15^2), n = 67.2."
    write_json(run / "evaluate" / "measured.json", measured(2.1, groups, size=10))
    item = c.exam_item(run, "my recipe.yaml")
    assert item["state"] == state and f"in {groups} groups" in item["found"]
    if state == "failed":
        assert item["command"] == f"domain-llm run 'my recipe.yaml' --output {run}" and "68" in item["first"]


def test_a_run_without_an_exam_lacks_one(run):
    found = measured(2.1)
    write_json(run / "evaluate" / "measured.json", {k: v for k, v in found.items() if k != "domain_mcq"})
    assert c.exam_item(run)["state"] == "missing"


def test_open_questions_by_place_and_number(run, tmp_path):
    write_jsonl(run / "open.jsonl", open_rows(48))
    assert c.open_item(run)["state"] == "failed" and "48 groups" in c.open_item(run)["found"]
    (run / "open.jsonl").unlink()
    assert c.open_item(run)["state"] == "missing"
    write_jsonl(tmp_path / "open.jsonl", open_rows())
    item = c.open_item(run, tmp_path / "recipe.yaml")
    assert item["state"] == "passed" and item["file"].endswith("open.jsonl")
    (run / "open.jsonl").write_text('{"question": ""}\n')
    item = c.open_item(run, tmp_path / "recipe.yaml")
    assert item["state"] == "failed" and "has no text" in item["found"]


@pytest.mark.parametrize(
    "result, state",
    [
        (experiment(0.5), "passed"),  # decided
        (experiment(0.5, seeds=2), "failed"),  # two seeds
        (experiment(0.5, control=True), "failed"),  # a control is bound to work
        (experiment(0.0), "failed"),  # nothing found, and nothing said of what matters
        (experiment(0.0, matters=0.5), "passed"),  # what matters would have been found
        (experiment(0.0, matters=1e-5), "failed"),  # it would not
    ],
)
def test_the_power_of_an_ablation(run, result, state):
    write_json(run / "ablate" / "mix" / "result.json", result)
    item = c.ablation_item(run, "recipe.yaml")
    assert item["state"] == state
    if state == "failed":
        begin = f"domain-llm ablate mix --recipe recipe.yaml --output {run}/ablate/mix"
        assert item["command"].startswith(begin)
    if len(result["seeds"]) == 2:
        assert item["command"].endswith("--seeds 3")


def test_an_ablation_beside_the_run_and_of_another_model(run):
    mine = run / "ablate" / "mix" / "result.json"
    write_json(run.parent / "ablate" / "mix" / "result.json", DECIDED)
    mine.unlink()
    assert c.ablation_item(run)["state"] == "passed"
    write_json(run.parent / "ablate" / "mix" / "result.json", experiment(0.5) | dict(model="another"))
    item = c.ablation_item(run)
    assert item["state"] == "missing" and "1 with another one" in item["found"]
    (run.parent / "ablate" / "mix" / "result.json").write_text("{")
    assert c.ablation_item(run)["state"] == "missing"
    mine.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        c.ablation_item(run)


@pytest.mark.parametrize("general, state", [(2.0, "passed"), (2.19, "passed"), (2.21, "failed")])
def test_the_budget_is_that_of_the_last_training(run, general, state):
    "2.0 to 2.21 is +10.5%, above the 10% of sft; the 1% of pretrain is not asked."
    write_json(run / "evaluate" / "measured.json", measured(general))
    assert c.forgetting_item(run)["state"] == state
    assert f"{general / 2 - 1:+.1%}" in c.forgetting_item(run)["found"]


def test_a_refused_and_an_outdated_quantization(run):
    exports = {run / "quantize": "a", run / "formats": "a"}
    for folder, made_of in exports.items():
        write_json(folder / "export.json", {"m.gguf": {"from": made_of, "bytes": 1}})
    assert c.quantization_item(run)["state"] == "passed"
    write_json(run / "formats" / "export.json", {"m.gguf": {"from": "b", "bytes": 1}})
    item = c.quantization_item(run)
    assert item["state"] == "failed" and "another model" in item["found"]
    assert c.served_item(run)["state"] == "missing"  # what it answered was another model, too
    (run / "formats" / "export.json").unlink()
    write_json(run / "formats" / "result.json", formats(40))
    item = c.quantization_item(run)
    assert item["state"] == "failed" and item["command"] == f"domain-llm quantize {run}"


@pytest.mark.parametrize(
    "n, right, kind, state",
    [
        (400, 230, "open", "passed"),  # 57.5%, from 52.6%
        (400, 215, "open", "failed"),  # 53.8%, from 48.9%
        (400, 230, "sql", "passed"),
        (400, 400, "choice", "missing"),  # choosing a letter is no task
    ],
)
def test_a_served_task_by_its_answers(run, n, right, kind, state):
    write_json(run / "formats" / "result.json", formats(0, n, kind, right))
    assert c.served_item(run)["state"] == state


@pytest.mark.parametrize(
    "change, file, state",
    [
        ({}, True, "passed"),
        ({}, False, "failed"),
        (dict(threshold=None, answered=0, right_answered=0), True, "failed"),
        (dict(answered=4, right_answered=4), True, "passed"),  # Wilson: from 51%
        (dict(answered=3, right_answered=3), True, "failed"),  # from 44%
    ],
)
def test_a_served_task_by_text2sql(run, change, file, state):
    (run / "formats" / "result.json").unlink()
    write_json(run / "sql" / "text2sql.json", SQL | change)
    if file:
        (run / "sql" / "gguf").mkdir()
        (run / "sql" / "gguf" / "q8_0.gguf").touch()
    assert c.served_item(run)["state"] == state


def begun(models=("pumps", "base"), groups=49):
    rows = [
        dict(question=f"q{i}", group=f"g{i}", role="compare", reviewer=who)
        for i in range(groups)
        for who in ("R1", "R2")
    ]
    return dict(packet="p", items=rows, models=list(models), same=[], rule="none")


def test_a_review_that_was_begun_has_to_be_finished(run):
    (run / "open.jsonl").unlink()
    write_json(run.parent / "review" / "key.json", begun(["other", "base"]))
    assert states(run)["review"] == "missing" and states(run)["open questions"] == "missing"
    write_json(run.parent / "review" / "key.json", begun())
    found = c.course(run)
    assert states(run)["open questions"] == "passed" and not found["passed"]
    assert found["items"][-1]["command"].startswith("domain-llm review --collect marks/ --key ")
    reviewers = dict(R1=dict(marks=49), R2=dict(marks=40))
    done = dict(reviewers=reviewers, failed=["R2"], choice=dict(said="pumps is chosen"))
    write_json(run.parent / "review" / "result.json", done)
    item = c.course(run)["items"][-1]
    assert item["state"] == "passed" and "49 marks; reviewers: 1 counted, 1 failed" in item["found"]


def test_the_command(run, tmp_path, capsys):
    out = tmp_path / "list.json"
    assert cli.main(["check", "--course", str(run), "--json", str(out)]) == 0
    assert [item["item"] for item in json.loads(out.read_text())["items"]] == NAMES
    assert "6 of 6 required items passed" in capsys.readouterr().out
    assert cli.main(["check", "--course", str(run), "--json", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    (run / "open.jsonl").unlink()
    assert cli.main(["check", "--course", str(run), "--json", str(out), "--force"]) == 1
    for wrong in (["--course", str(tmp_path)], ["--json", "x.json"], ["--course", str(run), "--show", "1"]):
        assert cli.main(["check", *wrong]) == 2
