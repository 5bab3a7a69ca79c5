"""A whole run on a tiny random model: stages, skipping, killing, resuming."""
import json, os, random, re, signal, subprocess, sys, time
from pathlib import Path

import pytest, yaml

from domain_llm import mix, recipe
from domain_llm.core import InputError


def small(tiny_folder, **more):
    return {**dict(name="small", model=str(tiny_folder), demo=8, mix=dict(parts=dict(domain=1, general=0.5), epochs=1), pretrain=dict(length=128, tokens_per_step=256, probes=4),
                   sft=dict(length=256, tokens_per_step=512, probes=2, learning_rate=1e-3), evaluate=dict(questions=40, probe_tokens=800, screen=True), quantize=dict(types=["q8_0"])), **more}


def start(path, out, **kw):
    return subprocess.Popen(["domain-llm", "run", str(path), "--output", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **kw)


def figures(out): return {k: v for k, v in json.loads((Path(out) / "metrics.json").read_text()).items() if k != "seconds"}


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
        for when in ("before", "after"): assert m[f"{k}_{when}_low"] <= m[f"{k}_{when}"] <= m[f"{k}_{when}_high"]
    assert m["seconds"] > 0 and m["verdict"] in (out / "report.html").read_text().replace("&#39;", "'")
    for stage in ("corpus", "baseline", "pretrain", "sft", "evaluate", "quantize", "report"):
        made = json.loads((out / stage / "manifest.json").read_text())
        assert made["fingerprint"] and made["versions"]["torch"] and made["seconds"] >= 0
    assert (out / "MODEL_CARD.md").read_text().startswith("---\nbase_model:")
    assert not list(out.glob("*/checkpoints")) and "report:" in said
    assert m["domain_bpb_after"] < m["domain_bpb_before"]


def test_every_checkpoint_is_screened(whole):
    "Each probe's model is kept, loads by itself and is the one that was scored; the probe of the last step is that of the stage's end."
    from domain_llm.evaluate import multiple_choice
    path, out, _, said = whole
    found, cfg = json.loads((out / "evaluate" / "screen.json").read_text()), recipe.read_recipe(path)
    steps = [f"{s} step {h['step']}" for s in ("pretrain", "sft") for h in json.loads((out / s / "history.json").read_text()) if "score" in h and "share" not in h and h["step"]]
    assert [n for n in found["checkpoints"] if n != "final"] == ["base", *steps] and len(steps) == 6 and found["said"] in said
    assert found["said"] in (out / "report.html").read_text()
    questions = recipe._questions([str(out / "demo" / "questions" / "domain_mcq.jsonl")], 40, 0)
    for name in (steps[1], steps[-1]):
        stage, step = name.split(" step ")
        again = multiple_choice(*recipe.load_to_measure(str(out / stage / "kept" / f"step-{step}"), cfg), questions)
        assert again["accuracy"] == found["checkpoints"][name]["accuracy"] and [int(c) for c in again["correct"]] == found["questions"][name]["correct"]
    measured = {when: json.loads((out / s / "measured.json").read_text())["domain_mcq"] for when, s in (("base", "baseline"), ("final", "evaluate"))}
    assert [int(c) for c in measured["base"]["correct"]] == found["questions"]["base"]["correct"]
    assert [int(c) for c in measured["final"]["correct"]] in [r["correct"] for r in found["questions"].values()]


def test_screening_passes_over_what_a_kill_or_a_stage_no_longer_wanted_has_left(whole, tmp_path):
    import shutil
    path, out, _, _ = whole
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "pretrain" / "kept" / "step-12.abc.part").mkdir()
    cfg = {**recipe.read_recipe(path), "sft": None, "output": str(tmp_path / "out")}
    before, after = (json.loads((out / s / "measured.json").read_text())["domain_mcq"] for s in ("baseline", "evaluate"))
    recipe._screen(cfg, recipe.gather(cfg), tmp_path / "out" / "evaluate", before, after)
    names = list(json.loads((tmp_path / "out" / "evaluate" / "screen.json").read_text())["checkpoints"])
    assert len([n for n in names if n.startswith("pretrain")]) == 4 and not [n for n in names if n.startswith("sft")]


def test_screening_needs_questions_of_two_groups(tiny_folder, tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(dict(question=f"What is {i} + 1?", choices=["one", "two"], answer=0, group="sums")) + "\n" for i in range(6)))
    cfg = recipe.check(small(tiny_folder, data=dict(questions=["q.jsonl"]), output="out"), tmp_path)
    data = recipe.gather(cfg)
    recipe.corpus_stage(cfg, data, tmp_path / "out" / "corpus")
    with pytest.raises(InputError, match="at least two groups"): recipe.baseline_stage(cfg, data, tmp_path / "out" / "baseline")


def test_report_opens_without_a_network(whole):
    from html.parser import HTMLParser
    page = (whole[1] / "report.html").read_text()
    links = []
    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs): links.extend(v for k, v in attrs if k in ("src", "href") and not v.startswith("#"))
    Links().feed(page)
    assert not links and page.count("<svg") == 4
    assert "domain-llm chat" in page and "McNemar" in page


def test_a_probe_of_one_document_has_no_interval_and_says_so(whole, tmp_path):
    import shutil
    from domain_llm import report
    shutil.copytree(whole[1], tmp_path / "out")
    for stage in ("baseline", "evaluate"):
        path = tmp_path / "out" / stage / "measured.json"
        found = json.loads(path.read_text())
        found["general_bpb"].update(low=float("nan"), high=float("nan"))
        path.write_text(json.dumps(found))
    metrics = report.write_report(tmp_path / "out", recipe.read_recipe(whole[0]))
    assert metrics["general_bpb_after_low"] is None and "NaN" not in (tmp_path / "out" / "metrics.json").read_text()
    for name in ("report.html", "MODEL_CARD.md"): assert "nan to" not in (tmp_path / "out" / name).read_text()


def test_second_run_skips_everything(whole):
    path, out, _, _ = whole
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/manifest.json")}
    said = start(path, out).communicate(timeout=300)[0]
    assert said.count("unchanged, skipped") == len(stamps) == 7
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/manifest.json")} == stamps


def test_a_changed_setting_repeats_its_stage_and_the_ones_after(whole, tiny_folder):
    cfg = recipe.check(small(tiny_folder), whole[0].parent)
    cfg["output"] = str(whole[1])
    data = recipe.gather(cfg)
    old = recipe.stage_fingerprints(cfg, data)
    changed = json.loads(json.dumps(cfg)); changed["sft"]["learning_rate"] = 1e-4
    new = recipe.stage_fingerprints(changed, data)
    assert [s for s in old if old[s] != new[s]] == ["sft", "evaluate", "quantize", "report"]


KILLS = int(os.environ.get("DOMAIN_LLM_KILLS", 4))  # 10 when the points shall lie closer


@pytest.mark.parametrize("point", range(KILLS))
def test_killed_anywhere_ends_the_same(whole, tmp_path, point):
    "SIGKILL after a share of the run's time; the resumed run must end with the figures of the whole one."
    path, out, seconds, _ = whole
    p = start(path, tmp_path / "out")
    time.sleep(seconds * (point + 0.5) / KILLS)
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    p.wait()
    again = start(path, tmp_path / "out")
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 0, said[-3000:]
    want, got = figures(out), figures(tmp_path / "out")
    assert got == want


def test_a_run_that_goes_on_between_its_stages_ends_the_same(whole, tmp_path):
    "The new adapter of fine-tuning is drawn as it was in the run that did not stop."
    import shutil
    path, out, _, _ = whole
    shutil.copytree(out, tmp_path / "out")
    for stage in ("sft", "evaluate"): shutil.rmtree(tmp_path / "out" / stage)
    said = start(path, tmp_path / "out").communicate(timeout=600)[0]
    assert "[3/7] pretrain: unchanged" in said and "[4/7] sft: Supervised" in said
    history = [json.loads((o / "sft" / "history.json").read_text()) for o in (out, tmp_path / "out")]
    assert history[0] == history[1] and figures(out) == figures(tmp_path / "out")


def test_corrupted_checkpoint_is_passed_over(whole, tmp_path):
    "Kill in training, damage the newest checkpoint, resume: the run says so and ends the same."
    path, out, _, _ = whole
    p = start(path, tmp_path / "out")
    folder = tmp_path / "out" / "pretrain" / "checkpoints"
    for _ in range(1200):
        if len(list(folder.glob("checkpoint-*/seal.json"))) >= 1: break
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    newest = max(folder.glob("checkpoint-*"), key=lambda q: int(q.name.split("-")[1]))
    with open(newest / "model.safetensors", "r+b") as f: f.truncate(100)
    said = start(path, tmp_path / "out").communicate(timeout=600)[0]
    assert "is incomplete" in said and figures(tmp_path / "out") == figures(out)


def test_two_runs_in_one_folder(whole, tmp_path):
    with recipe.alone(whole[1]):
        p = start(whole[0], whole[1])
        assert "another run is working" in p.communicate(timeout=120)[0] and p.returncode == 2


def test_own_documents_without_exam_or_answers(tiny_folder, tmp_path):
    "The least recipe: documents only. No domain exam, no fine-tuning; the report still stands."
    docs = tmp_path / "docs"; docs.mkdir()
    rng = random.Random(0)
    words = "pump valve seal pressure flange gasket torque bearing shaft rotor stator coupling".split()
    for i in range(40): (docs / f"{i}.md").write_text(f"# Manual {i}\n\n" + " ".join(rng.choices(words, k=120)) + ".\n")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    made = recipe.init(docs, tmp_path / "r.yaml")
    text = made.read_text().replace("model: smollm2-135m-instruct", f"model: {tiny_folder}").replace("length: 1024", "length: 128").replace("tokens_per_step: 2048", "tokens_per_step: 512")
    (tmp_path / "r.yaml").write_text(text + "\n")
    p = subprocess.run(["domain-llm", "run", tmp_path / "r.yaml"], capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr[-3000:]
    m = json.loads((tmp_path / "runs" / "docs" / "metrics.json").read_text())
    assert m["domain_mcq_after"] is None and m["domain_bpb_after"] < m["domain_bpb_before"]
    assert "broken.pdf" in (tmp_path / "runs" / "docs" / "report.html").read_text() and "1 file skipped" in p.stdout


def test_template_gives_the_defaults_it_claims():
    "A recipe made by init must pass the check, and every key in the template must be known."
    text = (Path(recipe.__file__).parent / "data" / "template.yaml").read_text().replace("NAME", "x").replace("DOCUMENTS", ".")
    recipe.check(yaml.safe_load(text), ".")
    for line in text.splitlines():  # the commented settings too
        key = line.strip().lstrip("# ").split(":")[0]
        if line.strip().startswith("# ") and ":" in line and " " not in key: assert any(key in (s if isinstance(s, dict) else {}) for s in [recipe.SCHEMA, *recipe.SCHEMA.values()]), key


def test_own_multiplechoice_is_leak_free(whole):
    "The demo's planted leaks must not be in the documents that were trained on."
    from domain_llm.core import read_jsonl
    truth = json.loads((whole[1] / "demo" / "truth.json").read_text())
    text = " ".join(r["text"] for r in read_jsonl(whole[1] / "corpus" / "documents.jsonl"))
    questions = {q["question"] for q in read_jsonl(whole[1] / "demo" / "questions" / "domain_mcq.jsonl")}
    assert truth and not [q for q in questions if q in text]


def test_documents_are_selected_within_the_budget(tiny_model):
    model, tok = tiny_model
    docs = [dict(text=f"Section {i}. The pump of line {i} runs at {10 + i} bar and shall be checked after {i} days.", kind=k, source="s", id=f"{k}{i}") for i in range(20) for k in ("standard", "news")]
    cfg = recipe.check(dict(demo=8, select=dict(tokens=200, kinds=["standard"])))
    found = recipe._selected(docs, cfg, model, tok)
    sizes = [len(r["input_ids"]) for r in mix.tokenize(found, tok, "x")]
    assert {d["kind"] for d in found} == {"standard"} and 150 < sum(sizes) <= 200
    assert recipe._selected(docs, recipe.check(dict(demo=8)), model, tok) == docs
    assert len(recipe._selected(docs, recipe.check(dict(demo=8, select=dict(near=0.5))), model, tok)) == 20


def test_settings_know_what_their_modules_know():
    "The recipe names ways to select and kinds itself, so that the command line starts at once."
    from domain_llm import corpus, select
    for kind, known in (("way to select", list(select.SCORES)), ("kinds", list(corpus.KINDS))):
        says, ok = recipe.KINDS[kind]
        assert set(re.findall(r"[a-z]+", says.split(":")[-1])) - {"or"} == set(known)
        assert all(ok([k] if kind == "kinds" else k) for k in known)
