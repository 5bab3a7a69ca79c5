"""Record the demo in nbs/results/demo.json: several seeds, and once each documents alone and instructions alone.

    python tools/record_demo.py [--seeds 5] [--folder runs/record] [--kills 10]

Every run is kept in the folder, so that calling it again resumes. With --kills N the first run is made once more,
killed with SIGKILL at N random moments and started again each time; whether it ended with the same figures is recorded
beside them.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import yaml

from domain_llm.core import read_json, read_jsonl, write_json
from domain_llm.devices import half_dtype
from domain_llm.models import load
from domain_llm.results import load_result, save_result
from domain_llm.run.measuring import exam, figures
from domain_llm.train.pretrain import probe_texts

COMMAND = Path(sys.executable).parent / "domain-llm"


def arms(demo, seeds, folder):
    "The recipes to run: name -> recipe. Instructions alone are given as often as the first run of the demo gave them."
    yield from (
        (f"demo-{seed}", {**demo, "seed": seed} | ({"quantize": False} if seed else {})) for seed in range(seeds)
    )
    parts = {k: v for k, v in demo["mix"]["parts"].items() if k != "instructions"}
    yield "documents alone", {**demo, "mix": {**demo["mix"], "parts": parts}, "quantize": False}
    passes = read_json(folder / "demo-0" / "pretrain" / "manifest.json")["metrics"]["epochs_per_source"]["instructions"]
    yield (
        "instructions alone",
        {
            **demo,
            "mix": {"parts": {"domain": 1}},
            "pretrain": False,
            "sft": {**demo["pretrain"], "method": "full", "epochs": passes},
            "quantize": False,
        },
    )


def run(recipe, out, kill_after=None):
    "Run a recipe; with `kill_after`, SIGKILL it after so many seconds. Gives whether it ended by itself."
    path = Path(f"{out}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    process = subprocess.Popen([str(COMMAND), "run", str(path), "--output", str(out)], start_new_session=True)
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    assert process.returncode == 0, f"{out}: exit status {process.returncode}"
    return True


SHARES = (0, 0.25, 0.5, 0.75, 1)


def curve(out):
    """What each share of the training's change teaches and costs: the exam by parts and general text, on questions and
    texts that no choice has seen."""
    import torch

    kept = out / "curve.json"
    if kept.exists():
        return read_json(kept)
    cfg, stage = read_json(out / "pretrain" / "manifest.json")["settings"], out / "pretrain"
    folder = stage / "trained" if (stage / "trained").exists() else stage / "model"
    weights = [dict(load(name, device="cpu")[0].named_parameters()) for name in (cfg["model"], str(folder))]
    _, general = probe_texts(
        read_jsonl(out / "inputs" / "general_probe" / "rows.jsonl"), 2 * cfg["evaluate"]["probe_tokens"]
    )
    questions = exam(
        read_json(out / "evaluate" / "manifest.json")["settings"],
        {r: out / "inputs" / r / "rows.jsonl" for r in ("questions", "general_questions")},
    )
    points = []
    for share in SHARES:
        model, tok = load(cfg["model"], device="cpu")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.lerp(*(w[name] for w in weights), share))
        found = figures(model.to(half_dtype("cpu")), tok, dict(general=general), dict(domain=questions["domain"]))
        parts = {part: r["accuracy"] for part, r in found["domain_mcq"]["by_part"].items()}
        points.append(
            dict(
                share=share,
                bpb=found["general_bpb"]["bpb"],
                general=found["general_bpb"]["bpb"] / (points[0]["bpb"] if points else found["general_bpb"]["bpb"]) - 1,
                **parts,
            )
        )
    write_json(kept, points)
    return points


def record(out):
    "What is recorded of a finished run."
    stages = {p.parent.name: read_json(p) for p in sorted(out.glob("*/manifest.json"))}
    places = {
        "before": out / "baseline" / "measured.json",
        "trained": out / "evaluate" / "trained.json",
        "after": out / "evaluate" / "measured.json",
    }
    measured = {when: read_json(path) for when, path in places.items() if path.exists()}
    items = {
        when: {
            key: {k: r[k] for k in ("correct", "groups", "by_part", "docs", "bytes") if k in r}
            for key, r in found.items()
        }
        for when, found in measured.items()
    }
    checks = read_json(out / "quantize" / "checks.json") if "quantize" in stages else None
    more = {"curve": curve(out)} if out.name.startswith("demo-") else {}
    return {
        **read_json(out / "metrics.json"),
        **more,
        "items": items,
        "answers": read_json(out / "answers" / "answers.json"),
        "stages": {
            name: {k: m.get(k) for k in ("seconds", "peak_memory_gb", "metrics")}
            for name, m in stages.items()
            if "metrics" in m
        },
        "histories": {s: read_json(out / s / "history.json") for s in ("pretrain", "sft") if s in stages},
        "corpus": {k: read_json(out / "corpus" / "report.json")[k] for k in ("steps", "dropped")},
        "quantized": checks and checks["checks"],
    }


def killed(recipe, out, whole, kills):
    "Run a recipe once more, killed at random moments; whether the metrics are those of the whole run."
    rng, times, usual = random.Random(0), 0, read_json(whole / "metrics.json")
    while times < kills and not run(recipe, out, rng.uniform(20, 110)):
        times += 1  # a checkpoint is written every 30 seconds
    run(recipe, out)
    same = {k: v for k, v in read_json(out / "metrics.json").items() if k != "seconds"} == {
        k: v for k, v in usual.items() if k != "seconds"
    }
    return dict(times=times, same_metrics=same)


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--seeds", type=int, default=5)
    a.add_argument("--folder", type=Path, default=Path("runs/record"))
    a.add_argument("--kills", type=int, default=0)
    a = a.parse_args()
    demo, start = (
        yaml.safe_load((files("domain_llm") / "assets" / "demo.yaml").read_text(encoding="utf-8")),
        time.time(),
    )
    found = {}
    for name, recipe in arms(demo, a.seeds, a.folder):
        out = (a.folder / name.replace(" ", "-")).resolve()
        began = time.time()
        run(recipe, out)
        found[name] = record(out)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
    result = dict(recipe=demo, runs=found)
    if a.kills:
        result["killed"] = killed(
            {**demo, "seed": 0}, (a.folder / "killed").resolve(), (a.folder / "demo-0").resolve(), a.kills
        )
    print(save_result("demo", result, started=start), load_result("demo").get("killed", ""))


if __name__ == "__main__":
    main()
