"""A run keeps what it has made and never touches what it has not made."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from domain_llm import cli
from domain_llm.core import InputError, fingerprint, read_json
from domain_llm.demo.files import write_world
from domain_llm.run import experiments, keep, pipeline
from domain_llm.run.inputs import ROLES
from domain_llm.run.pipeline import NAMES, run_recipe
from domain_llm.run.recipe import check_recipe
from domain_llm.run.settings import Recipe, section_of
from domain_llm.run.stages import REPORTS, identity, stages

TINY = dict(
    name="small",
    demo=dict(entities=8),
    model="owner/base",
    chat_model="owner/chat",
    mix=dict(parts=dict(domain=1, general=0.5, instructions=0.2)),
    evaluate=dict(screen=True),
)


def hashes(folder):
    "Every file below a folder with the hash of its bytes."
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


MADE = {  # what each stage leaves behind, as far as later stages read it
    "corpus": ("documents.jsonl", "held_out.jsonl", "general.jsonl", "instructions.jsonl"),
    "baseline": ("measured.json",),
    "vocab": ("vocab.json", "model/weights"),
    "pretrain": ("model/weights", "history.json", "kept/step-1/weights"),
    "sft": ("model/weights", "kept/step-1/weights"),
    "chat_vector": ("model/weights",),
    "evaluate": ("measured.json",),
    "screen": ("screen.json",),
    "answers": ("answers.json",),
    "quantize": ("model.gguf",),
    "report": REPORTS,
}


@pytest.fixture
def calls(monkeypatch):
    "The names of the stages that work, in order; each writes a digest of what it was given instead of a result."
    done, real = [], stages

    def work(name, reads):
        def fake(cfg, read, out):
            "A stage."
            done.append(name)
            given = json.loads(json.dumps(cfg))
            given.get("evaluate", {}).pop("screen", None)  # keeping checkpoints does not change a model
            known = {k: read[k] for k in reads if name != "corpus" or k not in ("questions", "skipped")}
            digest = fingerprint(given, known if name != "report" else [])
            for path in MADE[name]:
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(dict(verdict=digest)) if path == "metrics.json" else digest
                (out / path).write_text(text)
            return {}

        return fake

    def fake_stages(cfg):
        return {name: replace(stage, work=work(name, stage.reads)) for name, stage in real(cfg).items()}

    monkeypatch.setattr(pipeline, "stages", fake_stages)
    monkeypatch.setattr(pipeline, "preflight_of", lambda cfg, out: [])
    monkeypatch.setattr(pipeline, "_say_worth", lambda out: None)
    monkeypatch.setattr(pipeline, "_say_mined", lambda cfg, out: None)
    return done


def changed(settings, name, value):
    "A copy of a recipe with one setting in place."
    copy = json.loads(json.dumps(settings))
    section, _, key = name.partition(".")
    if key:
        copy[section] = {**(copy.get(section) or {}), key: value}
    else:
        copy[section] = value
    return copy


AFTER_SFT = ["evaluate", "screen", "answers", "quantize", "report"]
AFTER_PRETRAIN = ["pretrain", "sft", *AFTER_SFT]
ALL = ["corpus", "baseline", *AFTER_PRETRAIN]
OTHER = dict(warmup=0.2, schedule="constant", weight_decay=0.1, rank=8, alpha=8, probes=3, forgetting_budget=0.5)
OTHER |= dict(batch=2, optimizer="adamw8bit")
TABLE = {  # setting -> (another value, stages that run again)
    "name": ("other", ["report"]),
    "model": ("owner/other", ["baseline", *AFTER_PRETRAIN]),
    "chat_model": ("owner/other", ["baseline", *AFTER_PRETRAIN]),
    "chat_vector": (True, ["chat_vector", *AFTER_SFT]),
    "sft.start": ("chat", ["sft", *AFTER_SFT]),
    "trust_remote_code": (True, ["baseline", *AFTER_PRETRAIN]),
    "seed": (1, ALL),
    "demo.entities": (9, ALL),
    "demo.lang": ("zh", ALL),
    "data.ask": (["What now?"], ["answers", "quantize", "report"]),
    "tasks": (["d2qa"], ALL),  # the fake corpus is another one as a whole
    "corpus.near_duplicate": (0.8, ALL),
    "corpus.min_chars": (100, ALL),
    "corpus.held_out": (0.2, ALL),
    "vocab.pieces": (100, ["vocab", *AFTER_PRETRAIN]),
    "vocab.start": ("weighted", ["vocab", *AFTER_PRETRAIN]),
    "vocab.descriptions": ({"weir": "a low dam"}, ["vocab", *AFTER_PRETRAIN]),
    **{f"select.{k}": (v, AFTER_PRETRAIN) for k, v in dict(tokens=1000, by="prior", kinds=["web"], near=0.5).items()},
    "mix.parts": ({"domain": 1, "general": 2, "instructions": 0.2}, AFTER_PRETRAIN),
    **{f"mix.{k}": (v, AFTER_PRETRAIN) for k, v in dict(epochs=2, tokens=5000, max_epochs=9).items()},
    **{
        f"pretrain.{k}": (v, AFTER_PRETRAIN)
        for k, v in dict(
            method="lora",
            learning_rate=1e-3,
            tokens_per_step=512,
            length=128,
            **OTHER,
        ).items()
    },
    **{
        f"sft.{k}": (v, ["sft", *AFTER_SFT])
        for k, v in dict(
            epochs=2,
            method="full",
            learning_rate=1e-3,
            tokens_per_step=1024,
            length=256,
            **OTHER,
        ).items()
    },
    "pretrain.gradient_checkpointing": (True, []),  # a matter of memory, with which the result is the same
    "sft.gradient_checkpointing": (False, []),
    "evaluate.questions": (10, ["baseline", "evaluate", "screen", "report"]),
    "evaluate.probe_tokens": (500, ["baseline", *AFTER_PRETRAIN]),
    "evaluate.screen": (False, ["report"]),
    "quantize.types": (["q8_0"], ["quantize", "report"]),
}


def settings_of(section, prefix=""):
    "The names of all settings of a recipe."
    for name, field in section.model_fields.items():
        inner = section_of(field)
        yield from settings_of(inner, f"{name}.") if inner else [prefix + name]


def test_the_table_holds_every_setting():
    paths = {f"data.{role}" for role in ROLES}
    small_worlds = {name for name in settings_of(Recipe) if name.startswith("lab.")}  # of experiments, which no run has
    assert set(TABLE) == set(settings_of(Recipe)) - paths - small_worlds - {"output"}


def test_each_setting_repeats_exactly_what_depends_on_it(calls, tmp_path):
    "And its results come back, without work, when the setting does."
    path, out = tmp_path / "r.yaml", tmp_path / "out"

    def run(settings):
        calls.clear()
        path.write_text(yaml.safe_dump(settings))
        run_recipe(path, out)
        return list(calls)

    assert run(TINY) == ALL
    for name, (value, again) in TABLE.items():
        assert run(changed(TINY, name, value)) == again, name
        assert run(TINY) == [], f"after {name}"
    without = changed(TINY, "evaluate.screen", False)
    assert run(changed(without, "seed", 5)) == [s for s in ALL if s != "screen"]
    assert run(changed(TINY, "seed", 5)) == [
        "pretrain",
        "sft",
        "screen",
        "report",
    ]  # checkpoints were not kept, the model is the same


def test_changed_files_repeat_what_reads_them(calls, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(12):
        (docs / f"{i}.md").write_text(
            f"# Page {i}\n\nThe pump of line {i} runs at {1000 + i} rpm and is checked after {i + 3} days.\n"
        )
    rows = [dict(question=f"How fast is pump {i}?", choices=["1", "2"], answer=0) for i in range(4)]
    for name in ("questions", "more"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows[: 4 if name == "questions" else 3])
        )
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(dict(name="x", data=dict(documents="docs", questions="questions.jsonl"), output="out"))
    )

    def run():
        calls.clear()
        run_recipe(tmp_path / "r.yaml")
        return list(calls)

    plan = ["corpus", "baseline", "pretrain", "evaluate", "answers", "quantize", "report"]
    assert run() == plan and run() == []
    (docs / "2.md").write_text("# Page 2\n\nRewritten.\n")
    assert run() == plan
    (docs / "picture.png").write_bytes(b"\x89PNG")
    assert run() in ([], ["corpus", "report"])  # the list of skipped files may change, no document does
    (tmp_path / "questions.jsonl").write_text((tmp_path / "more.jsonl").read_text())
    assert run() == [
        "corpus",
        "baseline",
        "evaluate",
        "answers",
        "quantize",
        "report",
    ]  # the fake corpus leaves its documents as they are


RUN_PATHS = [
    *NAMES,
    *(f"{s}/{f}" for s, files in MADE.items() for f in files),
    *REPORTS,
    "demo/world/truth.json",
    "inputs/documents/rows.jsonl",
    keep.PRIVATE,
    f"{keep.PRIVATE}/lock",
    f"{keep.PRIVATE}/published.json",
    f"{keep.PRIVATE}/replaced/x",
    f"{keep.PRIVATE}/new/x",
]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("path", RUN_PATHS)
def test_nothing_that_stands_in_the_way_of_a_run_is_touched(path, kind, calls, tmp_path):
    out = tmp_path / "out"
    planted = out / path
    if kind == "folder":
        planted = planted / "manual.md"
    planted.parent.mkdir(parents=True)
    planted.write_text("The only copy.")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    before = hashes(tmp_path)
    with pytest.raises(InputError, match="not made by a run"):
        run_recipe(tmp_path / "r.yaml", out)
    after = hashes(tmp_path)
    assert {k: after[k] for k in before} == before and not calls


def test_documents_that_lie_where_a_stage_would_write_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        (tmp_path / "corpus" / f"{i}.md").write_text(f"Page {i}")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(data=dict(documents="corpus"))))
    before = hashes(tmp_path / "corpus")
    assert cli.main(["run", "r.yaml", "--output", "."]) == 2
    assert "was not made by a run" in capsys.readouterr().err and hashes(tmp_path / "corpus") == before


def test_a_run_inside_its_documents_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("Page")
    with pytest.raises(InputError, match="inside the documents folder"):
        check_recipe(dict(data=dict(documents=".")), tmp_path)


def test_what_lies_beside_the_results_stays(calls, tmp_path):
    out = tmp_path / "out"
    (out / "manuals").mkdir(parents=True)
    (out / "manuals" / "a.md").write_text("The only copy.")
    (out / "notes.txt").write_text("mine")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    run_recipe(tmp_path / "r.yaml", out)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(TINY, "seed", 3)))
    run_recipe(tmp_path / "r.yaml", out)
    assert (out / "manuals" / "a.md").read_text() == "The only copy." and (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", REPORTS)
def test_an_edited_report_is_not_replaced(name, calls, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    run_recipe(tmp_path / "r.yaml", out)
    (out / name).write_text("with my notes")
    with pytest.raises(InputError, match=name):
        run_recipe(tmp_path / "r.yaml", out)
    assert (out / name).read_text() == "with my notes"


@pytest.mark.parametrize(
    "path",
    [
        "runs/mix-0.json",
        "before/x",
        "result/x",
        "result.json",
        "trade.png",
        "effects.png",
        "corpus/documents.jsonl",
        "demo/x",
        "inputs/documents/x",
    ],
)
def test_nothing_that_stands_in_the_way_of_an_experiment_is_touched(path, tmp_path):
    out = tmp_path / "out"
    (out / path).parent.mkdir(parents=True)
    (out / path).write_text("The only copy.")
    with pytest.raises(InputError, match="not made by a run"):
        experiments.ablation("mix", None, output=out)
    assert (out / path).read_text() == "The only copy."


def test_commands_do_not_overwrite_a_file(tmp_path, capsys, tiny_folder):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("A page about pumps and valves. " * 20)
    for name in ("out.jsonl", "figures.json", "recipe.yaml"):
        (tmp_path / name).write_text("The only copy.")
    for argv in (
        ["corpus", tmp_path / "docs", "--out", tmp_path / "out.jsonl"],
        ["eval", tiny_folder, "--limit", "2", "--json", tmp_path / "figures.json"],
        ["init", tmp_path / "docs", "--recipe", tmp_path / "recipe.yaml"],
    ):
        assert cli.main([str(a) for a in argv]) == 2
        assert "exists already" in capsys.readouterr().err
    assert {(tmp_path / n).read_text() for n in ("out.jsonl", "figures.json", "recipe.yaml")} == {"The only copy."}
    assert cli.main(["corpus", str(tmp_path / "docs"), "--out", str(tmp_path / "out.jsonl"), "--force"]) == 0
    assert "pumps" in (tmp_path / "out.jsonl").read_text()


def test_the_demo_is_not_written_over_anything(tmp_path):
    made = write_world(tmp_path / "world", entities=8)
    (tmp_path / "world" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="Choose a new folder"):
        write_world(tmp_path / "world", seed=1, entities=8)
    assert (tmp_path / "world" / "notes.txt").read_text() == "mine" and made["truth"].exists()


def test_tidy_lists_asks_and_removes_what_is_no_longer_wanted(calls, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for seed in (0, 1):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(TINY, "seed", seed)))
        run_recipe(tmp_path / "r.yaml", out)
    present = {k: v for k, v in hashes(out).items() if not k.startswith(keep.PRIVATE)}
    aside = keep.spare(out)
    assert {r["stage"] for r in aside} >= {"demo", *ALL}
    note = aside[0]["folder"] / "note.txt"
    note.write_text("mine")
    for answer, left in (("n", len(aside)), ("y", 1)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert cli.main(["tidy", str(out)]) == 0
        assert len(list((out / keep.PRIVATE / "replaced").iterdir())) == left
    assert "note.txt" in capsys.readouterr().out and note.read_text() == "mine"
    assert (
        cli.main(["tidy", str(out)]) == 0
        and "nothing to remove" in capsys.readouterr().out
        and note.read_text() == "mine"
    )
    assert {k: v for k, v in hashes(out).items() if not k.startswith(keep.PRIVATE)} == present
    calls.clear()
    run_recipe(tmp_path / "r.yaml", out)
    assert calls == []
    assert cli.main(["tidy", str(tmp_path)]) == 2


def test_a_cut_tidy_resumes(tmp_path):
    keep.claim(tmp_path)
    for mark in ("a", "b"):
        folder, _ = keep.begin(tmp_path, "x", [mark])
        (folder / "r").write_text(mark)
        keep.finish(folder)
    (aside,) = keep.spare(tmp_path)
    (aside["folder"] / "started.json").unlink()  # a kill in the middle of the removal
    (again,) = keep.spare(tmp_path)
    assert keep.remove(again["folder"]) == [] and not keep.spare(tmp_path)


def cut_result(out):
    "The folder of a result that was cut off and set aside, with what it had made."
    keep.claim(out)
    folder, _ = keep.begin(out, "x", ["a"])
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights").write_text("of the run")
    keep.begin(out, "x", ["b"])
    (aside,) = keep.spare(out)
    return aside["folder"]


def test_what_somebody_put_beside_a_cut_result_is_not_removed_with_it(tmp_path):
    aside = cut_result(tmp_path)
    note = aside / "checkpoints" / "note.txt"
    note.write_text("mine")
    assert keep.remove(aside) == [note] and note.read_text() == "mine"
    assert [p for p in aside.rglob("*") if p.is_file()] == [note] and not keep.spare(tmp_path)


def test_a_file_of_any_name_in_a_stage_that_is_cut_stays(tmp_path):
    keep.claim(tmp_path)
    folder, _ = keep.begin(tmp_path, "x", ["a"])
    for name in ("cut.json", "x-a.json"):
        (folder / name).write_text("mine")
    keep.begin(tmp_path, "x", ["b"])
    folder, _ = keep.begin(tmp_path, "x", ["a"])
    assert [(folder / name).read_text() for name in ("cut.json", "x-a.json")] == ["mine", "mine"]


def test_a_cut_result_without_a_list_loses_no_file(tmp_path):
    aside = cut_result(tmp_path)
    aside.with_name(f"{aside.name}.json").unlink()
    assert [path.name for path in keep.remove(aside)] == ["weights"] and not keep.spare(tmp_path)


def test_a_cut_result_that_comes_back_resumes_and_is_whole_in_the_end(tmp_path):
    aside = cut_result(tmp_path)
    folder, done = keep.begin(tmp_path, "x", ["a"])
    assert not done and not aside.exists() and (folder / "checkpoints" / "weights").exists()
    (folder / "r").write_text("made")
    keep.finish(folder)
    assert set(read_json(folder / "manifest.json")["files"]) == {"r", "started.json"}


def test_a_retrained_model_is_told_by_its_content(tiny_folder, tmp_path):
    "Same names, same sizes, other weights."
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    assert identity(str(copy)) == identity(str(tiny_folder))
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    times = weights.stat()
    weights.write_bytes(raw)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity(str(copy)) != identity(str(tiny_folder))


def test_a_finished_stage_whose_file_is_gone_says_so(tmp_path):
    keep.claim(tmp_path)
    folder, _ = keep.begin(tmp_path, "x", ["a"])
    (folder / "r").write_text("1")
    keep.finish(folder)
    assert keep.content(tmp_path, "x/r") == keep.content(tmp_path, "x/r")
    with pytest.raises(InputError, match="missing"):
        keep.content(tmp_path, "x/other")
    assert read_json(folder / "manifest.json")["stage"] == "x"


def test_a_run_without_file_locks_still_runs(tmp_path, monkeypatch):
    "As on Windows, which has no fcntl."
    import builtins

    real = builtins.__import__

    def without(name, *args, **kw):
        if name == "fcntl":
            raise ImportError(name)
        return real(name, *args, **kw)

    keep.claim(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    with keep.alone(tmp_path):
        pass


def test_nothing_needs_symbolic_links():
    root = Path(keep.__file__).parent
    users = [p.name for p in root.glob("*.py") if "os.symlink(" in p.read_text() or "symlink_to(" in p.read_text()]
    assert users in ([], ["quantize.py"])  # which does without where links are not allowed


def test_a_second_run_does_not_disturb_the_first(calls, tmp_path):
    "It is refused before it touches what the first is making."
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    out = tmp_path / "out"
    run_recipe(tmp_path / "r.yaml", out)
    with keep.alone(out):
        making = out / keep.PRIVATE / "new" / "corpus"
        making.mkdir(parents=True)
        with pytest.raises(InputError, match="another run"):
            run_recipe(tmp_path / "r.yaml", out)
        assert making.exists()
