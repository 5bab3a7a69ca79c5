"""A whole run on a tiny random model: stages, skipping, killing, resuming."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from typing import get_args

import browser
import pytest
import yaml
from fixtures.languages import left_in_english, shown_figures

from domain_llm.core import InputError, read_json, read_jsonl, write_json, write_jsonl
from domain_llm.data.mix import tokenize
from domain_llm.data.read import KINDS
from domain_llm.data.select import SCORES
from domain_llm.data.tasks import MINED
from domain_llm.demo.general import common_questions, general_text, python_docs
from domain_llm.demo.world import make_world
from domain_llm.judge.choice import multiple_choice
from domain_llm.models import load
from domain_llm.run import keep, training
from domain_llm.run.inputs import ROLES, corpus_stage, demo_data, drawn_questions, read_inputs
from domain_llm.run.measuring import load_to_measure
from domain_llm.run.pipeline import final_model, run_recipe
from domain_llm.run.recipe import check_recipe, init_recipe, read_recipe
from domain_llm.run.report import write_report
from domain_llm.run.settings import Task, identifying, recipe_schema
from domain_llm.train.loop import TRAIN_DEFAULTS
from domain_llm.train.pretrain import interpolate
from domain_llm.train.sft import SFT_DEFAULTS


def small(tiny_folder, **more):
    return {
        **dict(
            name="small",
            model=str(tiny_folder),
            demo=8,
            mix=dict(parts=dict(domain=1, general=0.5), epochs=1),
            pretrain=dict(length=128, tokens_per_step=256, probes=4),
            sft=dict(length=256, tokens_per_step=512, probes=2, learning_rate=1e-3),
            evaluate=dict(questions=40, probe_tokens=800, screen=True),
            quantize=dict(types=["q8_0"]),
        ),
        **more,
    }


def start(path, out, **kw):
    return subprocess.Popen(
        ["domain-llm", "run", str(path), "--output", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kw,
    )


def figures(out):
    return {k: v for k, v in json.loads((Path(out) / "metrics.json").read_text()).items() if k != "seconds"}


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    "One uninterrupted run: its recipe, folder, and seconds."
    d = tmp_path_factory.mktemp("run")
    (d / "recipe.yaml").write_text(yaml.safe_dump(small(tiny_folder)))
    began = time.time()
    p = start(d / "recipe.yaml", d / "out")
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 0, said[-3000:]
    return d / "recipe.yaml", d / "out", time.time() - began, said


def test_run_leaves_what_it_promises(whole):
    _, out, _, said = whole
    m = json.loads((out / "metrics.json").read_text())
    for k in ("domain_mcq", "general_mcq", "domain_bpb", "general_bpb"):
        for when in ("before", "after"):
            assert m[f"{k}_{when}_low"] <= m[f"{k}_{when}"] <= m[f"{k}_{when}_high"]
    assert m["seconds"] > 0 and m["verdict"] in (out / "report.html").read_text().replace("&#39;", "'")
    for stage in ("corpus", "baseline", "pretrain", "sft", "evaluate", "screen", "answers", "quantize", "report"):
        made = json.loads((out / stage / "manifest.json").read_text())
        assert made["fingerprint"] and made["versions"]["torch"] and made["seconds"] >= 0
    assert (out / "MODEL_CARD.md").read_text().startswith("---\nbase_model:")
    assert not list(out.glob("*/checkpoints")) and "report:" in said
    assert m["domain_bpb_after"] < m["domain_bpb_before"]


def test_every_checkpoint_is_screened(whole):
    """Each probe's model is kept, loads by itself and is the one that was scored; the probe of the last step is that of
    the stage's end."""
    path, out, _, said = whole
    found, cfg = json.loads((out / "screen" / "screen.json").read_text()), read_recipe(path)
    steps = [
        f"{s} step {h['step']}"
        for s in ("pretrain", "sft")
        for h in json.loads((out / s / "history.json").read_text())
        if "score" in h and "share" not in h and h["step"]
    ]
    assert (
        [n for n in found["checkpoints"] if n != "final"] == ["base", *steps]
        and len(steps) == 6
        and found["said"] in said
    )
    assert found["said"] in (out / "report.html").read_text()
    questions = drawn_questions(out / "inputs" / "questions" / "rows.jsonl", cfg)
    for name in (steps[1], steps[-1]):
        stage, step = name.split(" step ")
        again = multiple_choice(*load_to_measure(str(out / stage / "kept" / f"step-{step}"), cfg), questions)
        assert (
            again["accuracy"] == found["checkpoints"][name]["accuracy"]
            and [int(c) for c in again["correct"]] == found["questions"][name]["correct"]
        )
    measured = {
        when: json.loads((out / s / "measured.json").read_text())["domain_mcq"]
        for when, s in (("base", "baseline"), ("final", "evaluate"))
    }
    assert [int(c) for c in measured["base"]["correct"]] == found["questions"]["base"]["correct"]
    assert [int(c) for c in measured["final"]["correct"]] in [r["correct"] for r in found["questions"].values()]


def test_screening_needs_questions_of_two_groups(tiny_folder, tmp_path):
    "Refused before anything is trained."
    (tmp_path / "q.jsonl").write_text(
        "".join(
            json.dumps(dict(question=f"What is {i} + 1?", choices=["one", "two"], answer=0, group="sums")) + "\n"
            for i in range(6)
        )
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(small(tiny_folder, data=dict(questions=["q.jsonl"]), output="out")))
    with pytest.raises(InputError, match="at least two groups"):
        run_recipe(tmp_path / "r.yaml")
    assert not (tmp_path / "out" / "pretrain").exists()


def test_report_opens_without_a_network(whole):
    from html.parser import HTMLParser

    page = (whole[1] / "report.html").read_text()
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            links.extend(v for k, v in attrs if k in ("src", "href") and not v.startswith("#"))

    Links().feed(page)
    assert links == ["report.zh.html"] and page.count("<svg") == 5
    assert "domain-llm chat" in page and "95% interval" in page


def test_the_chinese_report_says_what_the_english_one_says(whole):
    out, english, chinese = whole[1], *((whole[1] / name).read_text() for name in ("report.html", "report.zh.html"))
    assert shown_figures(chinese) == shown_figures(english)
    corpus, checks = read_json(out / "corpus" / "report.json"), read_json(out / "quantize" / "checks.json")
    found = [row for rows in corpus["examples"].values() for row in rows]
    found += read_json(out / "answers" / "answers.json") + checks["answers"]
    free = {text for row in found for text in row.values() if isinstance(text, str)}
    assert left_in_english(chinese, free) == [] and len(left_in_english(english, free)) > 20


@pytest.mark.skipif(browser.chromium() is None, reason="needs Chromium: apt-get install chromium")
def test_report_fits_a_phone(whole):
    with browser.Browser("phone") as page:
        for name in ("report.html", "report.zh.html"):
            page.open((whole[1] / name).as_uri())
            page.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
            assert page.run("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
            heights = page.run("[...document.querySelectorAll('summary')].map(part => part.offsetHeight)")
            assert heights and min(heights) >= 44


def test_measured_peaks_stand_beside_their_estimates_and_the_run_and_the_report_say_the_same(whole):
    out, page, said = whole[1], (whole[1] / "report.html").read_text(), " ".join(whole[3].split())
    for stage in ("pretrain", "sft"):
        made = read_json(out / stage / "manifest.json")
        memory = made["metrics"]["memory"]
        assert 0.5 < memory["peak_gb"] <= made["peak_memory_gb"] * 2**30 / 1e9 + 0.01
        off = abs(memory["peak_gb"] / memory["estimate_gb"] - 1) > 0.1
        sentence = f"held {memory['peak_gb']:.2f} GB at its peak, and the estimate was {memory['estimate_gb']:.2f} GB"
        assert (f"{stage} {sentence}" in said) == (f"{stage.title()} {sentence}" in page) == off


def test_the_report_shows_the_first_conversation_with_its_losses(whole):
    out, page = whole[1], (whole[1] / "report.html").read_text()
    drawn = page.partition("<h2>What fine-tuning trains</h2>")[2].partition("</svg>")[0]
    answer = read_jsonl(out / "corpus" / "instructions.jsonl")[0]["messages"][1]["content"]
    assert "nats</title>" in drawn and f">·{answer.split()[1]}</text>" in drawn
    assert "&lt;|im_end|&gt;</text>" in drawn


def test_a_probe_of_one_document_has_no_interval_and_says_so(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "out")
    for stage in ("baseline", "evaluate"):
        path = tmp_path / "out" / stage / "measured.json"
        found = json.loads(path.read_text())
        found["general_bpb"].update(low=None, high=None, change=None)
        path.write_text(json.dumps(found))
    plan = [
        p.parent.name
        for p in sorted((tmp_path / "out").glob("*/manifest.json"))
        if p.parent.name not in ("demo", "report")
    ]
    metrics = write_report(tmp_path / "out", tmp_path, dict(name="x", model="m", seed=0), plan)
    assert metrics["general_bpb_after_low"] is None and "one document, so no interval" in metrics["verdict"]
    for name in ("metrics.json", "report.html", "report.zh.html", "MODEL_CARD.md"):
        text = (tmp_path / name).read_text()
        assert "NaN" not in text and "nan to" not in text and "None to" not in text


def test_second_run_skips_everything(whole):
    path, out, _, _ = whole
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/manifest.json")}
    said = start(path, out).communicate(timeout=300)[0]
    assert (
        said.count("unchanged, skipped") == 9 and len(stamps) == 10
    )  # the demo's own files are not counted among the stages
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/manifest.json")} == stamps


KILLS = int(os.environ.get("DOMAIN_LLM_KILLS", 10))  # 100 for the long test


def tree(folder):
    "The names of all files and folders of a run."
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*")}


def test_killed_at_random_moments_it_ends_the_same(whole, runs, tmp_path):
    """Again and again a run is killed, each time after another while; it ends with the figures of the whole one, no
    leftovers, and its inputs are as they were."""
    path, out, _, _ = whole
    rng, killed, rounds = random.Random(0), 0, 0
    inputs = {
        p: p.read_bytes()
        for p in [
            path,
            *Path(json.loads((out / "pretrain" / "manifest.json").read_text())["settings"]["model"]).iterdir(),
        ]
    }
    while killed < KILLS:
        mine, rounds = tmp_path / f"out{rounds}", rounds + 1
        for _ in range(10 if KILLS - killed > 10 else KILLS - killed):
            ended = runs.run(path, mine, rng.uniform(0.05, 6))
            if ended == "exit 0":
                break
            assert ended == "signal 9", (ended, Path(f"{mine}.log").read_text()[-2000:])
            killed += 1
        ended = runs.run(path, mine)
        assert ended == "exit 0", (ended, Path(f"{mine}.log").read_text()[-2000:])
        assert figures(mine) == figures(out)
        assert tree(mine) == tree(out)
        shutil.rmtree(mine)
    assert killed >= KILLS and {p: p.read_bytes() for p in inputs} == inputs
    print(f"killed {killed} times in {rounds} runs")


def test_a_run_that_resumes_between_its_stages_ends_the_same(whole, tmp_path):
    "The new adapter of fine-tuning is drawn as it was in the run that did not stop."
    path, out, _, _ = whole
    shutil.copytree(out, tmp_path / "out")
    for stage in ("sft", "evaluate"):
        shutil.rmtree(tmp_path / "out" / stage)
    said = start(path, tmp_path / "out").communicate(timeout=600)[0]
    assert "[4/9] sft: Supervised" in said and said.index("unchanged, skipped") < said.index("[4/9]")
    history = [json.loads((o / "sft" / "history.json").read_text()) for o in (out, tmp_path / "out")]
    assert history[0] == history[1] and figures(out) == figures(tmp_path / "out")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_trained_model_is_saved_before_it_is_interpolated(tiny_folder, tmp_path, monkeypatch, method):
    "A run that is cut in the search for the share resumes without training again, and ends as one that was not cut."
    import torch

    cfg = small(
        tiny_folder,
        sft=False,
        quantize=False,
        mix=dict(parts=dict(domain=1), tokens=3000),
        evaluate=dict(questions=40, probe_tokens=400),
        pretrain=dict(method=method, length=128, tokens_per_step=128, probes=1, learning_rate=1e-2),
    )
    base, ids = load(str(tiny_folder))[0], torch.arange(30)[None] + 1000

    def make_probe(*args, **kw):
        "A random model forgets nothing: here what is lost is the distance of its logits from the base model's."

        def probe(model):
            with torch.no_grad():
                far = (model(input_ids=ids).logits.float() - base(input_ids=ids).logits).abs().mean().item()
            return dict(domain_bpb=1.0, general_bpb=1 + far, score=1.0 if far < 0.02 else 100 + far)

        return probe

    monkeypatch.setattr(training, "make_probe", make_probe)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    metrics = run_recipe(tmp_path / "r.yaml", tmp_path / "whole")
    assert metrics["share_kept"] < 1 and (tmp_path / "whole" / "pretrain" / "trained").is_dir()
    real = interpolate

    def cut(*args, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "interpolate", cut)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tmp_path / "r.yaml", tmp_path / "cut")
    monkeypatch.setattr(training, "interpolate", real)
    monkeypatch.setattr(training, "train", lambda *args, **kw: pytest.fail("trained again"))
    again = run_recipe(tmp_path / "r.yaml", tmp_path / "cut")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in metrics.items() if k != "seconds"}
    kept = tmp_path / "cut" / "pretrain" / "model"
    assert (kept / ("adapter_model.safetensors" if method == "lora" else "model.safetensors")).exists()


def test_fine_tuning_after_an_adapter_has_a_model_to_belong_to(tiny_folder, tmp_path):
    "LoRA after LoRA: the last adapter loads in plain peft, and gives the model that was measured."
    import torch
    from peft import AutoPeftModelForCausalLM

    train = dict(method="lora", length=256, tokens_per_step=256, probes=1, learning_rate=1e-3, rank=4)
    cfg = small(
        tiny_folder,
        quantize=False,
        mix=dict(parts=dict(domain=1), tokens=2000),
        evaluate=dict(questions=40, probe_tokens=400),
        pretrain=train,
        sft=train | dict(epochs=0.3),
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    run_recipe(tmp_path / "r.yaml", tmp_path / "out")
    folder = final_model(tmp_path / "out")
    ids = torch.arange(20)[None] + 300
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    ours = load(str(folder))[0](input_ids=ids).logits
    base = load(str(tiny_folder))[0](input_ids=ids).logits
    assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(ours, base, atol=1e-4)


def test_corrupted_checkpoint_is_passed_over(whole, tmp_path):
    "Kill in training, damage the newest checkpoint, resume: the run says so and ends the same."
    path, out, _, _ = whole
    p = start(path, tmp_path / "out")
    folder = tmp_path / "out" / "pretrain" / "checkpoints"
    for _ in range(1200):
        if len(list(folder.glob("checkpoint-*/seal.json"))) >= 1:
            break
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    newest = max(folder.glob("checkpoint-*"), key=lambda q: int(q.name.split("-")[1]))
    with open(newest / "model.safetensors", "r+b") as f:
        f.truncate(100)
    said = start(path, tmp_path / "out").communicate(timeout=600)[0]
    assert "is incomplete" in said and figures(tmp_path / "out") == figures(out)


def test_two_runs_in_one_folder(whole, tmp_path):
    with keep.alone(whole[1]):
        p = start(whole[0], whole[1])
        assert "another run is working" in p.communicate(timeout=120)[0] and p.returncode == 2


def test_own_documents_without_exam_or_answers(tiny_folder, tmp_path):
    "The least recipe: documents only. No domain exam, no fine-tuning; the report still stands."
    docs = tmp_path / "docs"
    docs.mkdir()
    rng = random.Random(0)
    words = "pump valve seal pressure flange gasket torque bearing shaft rotor stator coupling".split()
    for i in range(40):
        (docs / f"{i}.md").write_text(f"# Manual {i}\n\n" + " ".join(rng.choices(words, k=120)) + ".\n")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    made = init_recipe(docs, tmp_path / "r.yaml")
    text = (
        made.read_text()
        .replace("model: smollm2-135m-instruct", f"model: {tiny_folder}")
        .replace("length: 1024", "length: 128")
        .replace("tokens_per_step: 2048", "tokens_per_step: 512")
    )
    (tmp_path / "r.yaml").write_text(text + "\n")
    p = subprocess.run(["domain-llm", "run", tmp_path / "r.yaml"], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr[-3000:]
    m = json.loads((tmp_path / "runs" / "docs" / "metrics.json").read_text())
    assert m["domain_mcq_after"] is None and m["domain_bpb_after"] < m["domain_bpb_before"]
    assert "broken.pdf" in (tmp_path / "runs" / "docs" / "report.html").read_text() and "1 file skipped" in p.stdout


EXAMPLES = (
    "output",
    "model",
    "chat_",
    "trust_remote_code",
    "data.",
    "tasks",
    "select.tokens",
    "select.kinds",
    "select.near",
    "mix.tokens",
    "evaluate.screen",
)  # settings that the template shows, not defaults


def template(uncomment):
    """The recipe that the template is, with the settings that it only shows if asked for; the second of two lines of
    one name is left out."""
    text = (
        (files("domain_llm") / "assets" / "template.yaml").read_text().replace("NAME", "x").replace("DOCUMENTS", "docs")
    )
    lines, seen = [], set()
    for line in text.splitlines():
        shown = re.match(r"( *)# ([a-z_]+: .*)", line)
        key = (shown[1], shown[2].split(":")[0]) if shown else None
        if shown and uncomment and key not in seen:
            seen.add(key)
            line = shown[1] + shown[2]
        name = re.match(r"(model): ", line)
        if name:
            seen.add(("", "model"))
        lines.append(line)
    return yaml.safe_load("\n".join(lines))


def test_template_shows_settings_that_work_and_the_defaults_that_it_claims(tmp_path):
    given = template(uncomment=True)
    (tmp_path / "docs").mkdir()
    for key in ("general", "general_probe", "instructions", "questions", "general_questions"):
        (tmp_path / given["data"][key]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / given["data"][key]).touch()
    check_recipe(given, tmp_path)
    plain = check_recipe(template(uncomment=False), tmp_path)
    full = check_recipe(template(uncomment=True), tmp_path)

    def flat(cfg, prefix=""):
        for k, v in cfg.items():
            yield from flat(v, f"{prefix}{k}.") if isinstance(v, dict) and k != "parts" else [(prefix + k, v)]

    shown = dict(flat(full))
    assert len(shown) > 40
    for name, value in flat(plain):
        if not name.startswith(EXAMPLES):
            assert shown[name] == value, f"the template shows {name}: {shown[name]}, but the default is {value}"


def test_own_multiplechoice_is_leak_free(whole):
    "The demo's planted leaks must not be in the documents that were trained on."
    truth = json.loads((whole[1] / "demo" / "world" / "truth.json").read_text())
    rows = [*read_jsonl(whole[1] / "corpus" / "documents.jsonl"), *read_jsonl(whole[1] / "corpus" / "general.jsonl")]
    text = " ".join(r["text"] for r in rows)
    questions = {q["question"] for q in read_jsonl(whole[1] / "inputs" / "questions" / "rows.jsonl")}
    assert truth and not [q for q in questions if q in text]


def test_documents_are_selected_within_the_budget(tiny_model, tmp_path):
    model, tok = tiny_model
    docs = [
        dict(
            text=f"Section {i}. The pump of line {i} runs at {10 + i} bar and shall be checked after {i} days.",
            kind=k,
            source="s",
            id=f"{k}{i}",
        )
        for i in range(20)
        for k in ("standard", "news")
    ]
    write_jsonl(tmp_path / "documents.jsonl", docs)

    def selected(**select):
        cfg = check_recipe(dict(demo=8, **select))
        return list(training._selected(tmp_path / "documents.jsonl", cfg, model, tok, tmp_path / "rows")())

    found = selected(select=dict(tokens=200, kinds=["standard"]))
    sizes = [len(r["input_ids"]) for r in tokenize(found, tok, "x")]
    assert {d["kind"] for d in found} == {"standard"} and 150 < sum(sizes) <= 200
    assert selected() == docs
    assert len(selected(select=dict(near=0.5))) == 20


def test_settings_know_what_their_modules_know():
    "The recipe names ways to select and kinds itself, so that the command line starts at once."
    select = recipe_schema()["$defs"]["Select"]["properties"]
    assert set(select["by"]["enum"]) == set(SCORES)
    assert set(select["kinds"]["items"]["enum"]) == set(KINDS)
    check_recipe(dict(demo=8, select=dict(kinds=list(KINDS))))
    assert get_args(Task) == MINED
    check_recipe(dict(demo=8, tasks=list(MINED)))
    for way in SCORES:
        check_recipe(dict(demo=8, select=dict(by=way)))


def test_the_schema_file_is_that_of_the_models():
    path = files("domain_llm") / "assets" / "recipe.schema.json"
    stale = "stale: domain-llm schema > domain_llm/assets/recipe.schema.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(recipe_schema())), stale


def test_every_setting_is_described_and_has_its_trainers_default():
    "The descriptions are what an editor shows."
    schema = recipe_schema()
    sections = {name: part for name, part in schema["properties"].items() if "$ref" in json.dumps(part)}
    plain = {name: part for name, part in schema["properties"].items() if name not in sections}
    for name, part in [("", dict(properties=plain)), *schema["$defs"].items()]:
        for key, setting in part["properties"].items():
            assert setting.get("description"), f"{name}.{key} has no description"
    for name, defaults in dict(Pretrain=TRAIN_DEFAULTS, Sft=SFT_DEFAULTS).items():
        shown = {key: setting["default"] for key, setting in schema["$defs"][name]["properties"].items()}
        assert {key: shown[key] for key in defaults} == defaults


def test_a_demo_is_a_number_of_machines_or_a_section(tmp_path):
    short, long = ({"demo": 8}, {"demo": {"entities": 8, "lang": "en"}})
    assert check_recipe(short) == check_recipe(long)
    assert check_recipe({"demo": {"lang": "zh"}})["demo"] == dict(entities=20, lang="zh")
    assert check_recipe({"demo": None, "data": {"documents": str(tmp_path)}})["demo"] is None


def test_the_language_of_a_small_world_is_a_setting_that_came_later():
    known = identifying({"lab": check_recipe({"lab": {"entities": 8}})["lab"]})
    assert known == {"lab": dict(entities=8, renderings=100, wordings=3, one_wording=False)}
    assert identifying({"lab": check_recipe({"lab": {"lang": "zh"}})["lab"]})["lab"]["lang"] == "zh"


def test_a_demo_brings_general_data_in_its_language(tmp_path):
    "And the same run's folder follows when the language changes."
    own = {}
    for lang in ("zh", "en", "zh"):
        cfg = demo_data(check_recipe({"demo": {"entities": 8, "lang": lang}}), tmp_path)
        read_inputs(cfg, tmp_path)
        own[lang] = {role: read_jsonl(tmp_path / "inputs" / role / "rows.jsonl") for role in ROLES}
    made = make_world(entities=8, lang="zh")
    for read, drawn in zip(own["zh"]["questions"], made["mcq"], strict=True):
        assert {k: drawn[k] for k in read} == read and {"question", "choices", "answer"} <= set(read)
    assert [r["messages"] for r in own["zh"]["instructions"]] == [r["messages"] for r in made["instructions"]]
    assert own["zh"]["general"] == general_text(lang="zh")
    assert own["zh"]["general_probe"] == general_text("probe", "zh")
    assert own["zh"]["general_questions"] == common_questions("zh")
    assert own["en"]["general_questions"] == common_questions() and own["en"]["general_probe"] == python_docs()


def test_all_mistakes_are_named_at_once():
    wrong = dict(demo=8, sed=1, mix=dict(epochs="0", parts=dict(domain=1, genral=1)), pretrain=dict(rank=0))
    with pytest.raises(InputError) as e:
        check_recipe(wrong)
    said = str(e.value).splitlines()
    assert "4 mistakes" in said[0] and len(said) == 5
    for part in ("'sed' (did you mean 'seed'?)", "'mix.epochs' is '0'", "'genral'", "'pretrain.rank' is 0"):
        assert part in str(e.value)


def test_numbers_stay_as_they_were_written():
    "Fingerprints of stages hold them: 1 and 1.0 are two texts."
    cfg = check_recipe(dict(demo=8, mix=dict(epochs=1, max_epochs=2.0), pretrain=dict(learning_rate="2e-4", warmup=0)))
    assert json.dumps([cfg["mix"]["epochs"], cfg["mix"]["max_epochs"], cfg["pretrain"]["warmup"]]) == "[1, 2.0, 0]"
    assert cfg["pretrain"]["learning_rate"] == 2e-4 and cfg["sft"]["alpha"] == 32


def test_a_corpus_stage_on_disk_writes_what_one_in_memory_writes(tmp_path, monkeypatch):
    cfg = demo_data(check_recipe(dict(demo=12, tasks=["d2qa"])), tmp_path)
    read_inputs(cfg, tmp_path)
    read = {role: tmp_path / "inputs" / role / "rows.jsonl" for role in ROLES}
    read["skipped"] = tmp_path / "inputs" / "documents" / "skipped.json"
    figures, written, scratch = [], [], tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("domain_llm.data.rows._scratch", lambda: scratch)
    for name, most in (("memory", 10**9), ("disk", 1000)):
        monkeypatch.setattr("domain_llm.data.rows.IN_MEMORY", most)
        monkeypatch.setattr("domain_llm.data.reworded._BLOCK", most)
        (tmp_path / name).mkdir()
        figures.append(corpus_stage(cfg, read, tmp_path / name))
        written.append({path.name: path.read_text() for path in (tmp_path / name).glob("*.jsonl")})
        assert not [*scratch.iterdir()]  # what came between is gone
    assert figures[0] == figures[1] and written[0] == written[1] and len(written[0]) == 4


def test_exam_questions_are_taken_out_of_everything_that_is_trained_on(tmp_path):
    "Copies in documents, general text and instructions; other words in documents. What resembles a question stays."
    asked = "At what pressure in bar does the relief valve of the large Bramble 41 in the northern lock open?"
    questions = [
        dict(question=asked, choices=["140 bar", "90 bar"], answer=0),
        *(
            dict(question=f"Who signs for the sluice number {i} of the canal?", choices=["a keeper", "b"], answer=0)
            for i in range(20)
        ),
    ]
    plain = [
        f"Page {i} is about pump {i}, which its keeper checks every {i + 2} days, and about nothing else. " * 4
        for i in range(12)
    ]
    leaky = f"{plain[0]}\n\n{asked} It opens at 140 bar.\n\n{plain[1]}"
    again = (
        "The large Bramble 41 in the northern lock: at what pressure does its relief valve open? At 140 bar, they say."
    )
    reworded = f"{plain[2]}\n\n{again}\n\n{plain[3]}"
    docs = [dict(text=t, source="s", kind="book", id=str(i)) for i, t in enumerate([leaky, reworded, *plain[4:]])]

    def talk(q):
        return dict(messages=[dict(role="user", content=q), dict(role="assistant", content="140 bar.")], task="t")

    rows = dict(
        documents=docs,
        general=[dict(docs[0], kind="general"), dict(docs[3], kind="general")],
        instructions=[talk(asked), talk("How fast is the pump?")],
        questions=questions,
        general_questions=[],
    )
    read = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in read.items():
        write_jsonl(path, rows[name])
    write_json(tmp_path / "skipped.json", [])
    out = tmp_path / "corpus"
    out.mkdir()
    cfg = check_recipe(dict(demo=8))
    corpus_stage(cfg, read | {"skipped": tmp_path / "skipped.json"}, out)
    trained = {
        name: json.dumps(read_jsonl(out / f"{name}.jsonl"))
        for name in ("documents", "held_out", "general", "instructions")
    }
    for name, text in trained.items():
        assert "At what pressure in bar" not in text, name
    documents = trained["documents"] + trained["held_out"]
    assert (
        "relief valve open? At 140" not in documents
        and "Page 3 is about" in documents
        and "How fast is the pump?" in trained["instructions"]
    )
    report = read_json(out / "report.json")
    assert {"general", "instructions", "documents"} == set(report["leaks_by_source"]) and report["leaks_by_source"][
        "general"
    ][0]["question"] == asked
