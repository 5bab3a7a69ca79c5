"""Repeat the course's records on a model of the size that companies use, on one GPU, and write them as one JSON file.

    python tools/record_gpu.py --model Qwen/Qwen2.5-7B-Instruct [--out gpu.json]
    python tools/record_gpu.py --dry            (a small random model on any machine: minutes, its figures mean nothing)

The steps: the plan; the check of a recipe, with the format of the conversations; short trainings by LoRA and QLoRA at
several lengths, with peak memory and tokens per second; the experiments on mixing and on MIP; the table of quantized
formats. Each step is a process of its own. What it gave is written into the folder OUT.steps as soon as it ends, with
the end of what it printed where it failed. The same command goes on after an interruption and tries failed steps again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from record_memory import settings_of, short_training

from domain_llm.core import read_json, write_json
from domain_llm.results import provenance

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10  # of a short training
FULL = dict(lengths=(256, 1024, 2048, 4096), tokens=300_000, seeds=3, formats="q8_0,q4_k_m,q4_0,nf4", demo=20)
DRY = dict(lengths=(64,), tokens=600, seeds=1, formats="q8_0", demo=8)


def steps(model, size, folder):
    "The steps by name: a command, and the file that it leaves; None where its words are the result."
    recipe = folder / "recipe.yaml"
    tool = [sys.executable, str(Path(__file__).resolve()), "--model", model]
    cli = [sys.executable, "-c", "import sys; from domain_llm.cli import main; sys.exit(main())"]
    plan, formats = folder / "plan.json", folder / "formats"
    found = dict(plan=([*cli, "plan", "--model", model, "--samples", "5000", "--json", plan, "--force"], plan))
    found["check"] = ([*cli, "check", recipe, "--output", folder / "check"], None)
    for method in ("lora", "qlora"):
        for length in size["lengths"]:
            set_ = dict(method=method, length=length, gradient_checkpointing=True)
            place = folder / f"memory-{method}-{length}-measured.json"
            found[f"memory-{method}-{length}"] = ([*tool, "--train", json.dumps(set_), "--out", place], place)
    for name in ("mix", "mip"):
        more = ["--seeds", size["seeds"], *(["--tokens", size["tokens"]] if name == "mix" else [])]
        command = [*cli, "ablate", name, "--recipe", recipe, "--output", folder / name, *more]
        found[name] = (command, folder / name / "result.json")
    command = [*cli, "quantize", model, "--formats", size["formats"], "--out", formats]
    found["quantize"] = (command, formats / "result.json")
    return found


def write_recipe(model, size, folder):
    "The recipe of the recorded experiments, for another model, whose size decides the method."
    import yaml

    recipe = yaml.safe_load((ROOT / "nbs" / "recipes" / "ablate.yaml").read_text(encoding="utf-8"))
    recipe |= dict(model=model, demo=size["demo"], pretrain=dict(tokens_per_step=256, length=256))
    recipe["mix"] |= dict(tokens=size["tokens"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def measure(model, given, out):
    "Peak memory, its estimate and tokens per second of a short training; written to a file."
    from domain_llm.run.base_model import loaded_sizes
    from domain_llm.run.peak import watched_training
    from domain_llm.train.qlora import adapted, load_for

    set_ = settings_of(given)
    model = adapted(load_for(set_["method"], model)[0], set_)

    def training(model, rows, out, set_):
        times = short_training(model, set_, loaded_sizes(model)["vocabulary"], STEPS)
        return dict(steps=STEPS, times=times)

    found = watched_training(training, model, None, Path(out).parent / "none", set_)
    seconds = (found["times"][-1] - found["times"][0]) / (STEPS - 1)
    rate = set_["tokens_per_step"] / seconds
    write_json(out, dict(settings=given, tokens_per_second=round(rate, 1), **found["memory"]))


def did(command, result):
    "What a step gave: its `result`, or that it `failed` with the end of what it said; and its seconds."
    start = time.time()
    if result:
        result.unlink(missing_ok=True)
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    took = dict(seconds=round(time.time() - start, 1))
    if done.returncode > 1 or done.returncode < 0 or not (result.exists() if result else done.returncode == 0):
        return dict(failed=done.stdout[-3000:], status=done.returncode, **took)
    return dict(result=read_json(result) if result else done.stdout, **took)


def record(wanted, folder):
    "Do the steps that are not done; gives what each gave."
    found = {}
    for name, (command, result) in wanted.items():
        path = folder / f"{name}.step.json"
        if not path.exists() or "failed" in read_json(path):
            print(f"{name} ...", flush=True)
            write_json(path, did(command, result))
        found[name] = read_json(path)
        ended = "failed" if "failed" in found[name] else "done"
        print(f"{name}: {ended} in {found[name]['seconds']:.0f} s", flush=True)
    return found


def small_model(folder):
    "The folder of a small random model with the demo model's tokenizer."
    from domain_llm.models import load_tokenizer, tiny

    tok = load_tokenizer()
    tiny(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def main(given=None):
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="hub id or folder (%(default)s)")
    a.add_argument("--out", type=Path, default=Path("gpu.json"), help="the file to send back (%(default)s)")
    a.add_argument("--dry", action="store_true", help="a small random model, to see that all steps run")
    a.add_argument("--train", help=argparse.SUPPRESS)
    a = a.parse_args(given)
    if a.train:
        return measure(a.model, json.loads(a.train), a.out)
    start, folder = time.time(), Path(f"{a.out}.steps").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    size, model = (DRY, small_model(folder / "model")) if a.dry else (FULL, a.model)
    write_recipe(model, size, folder)
    found = record(steps(model, size, folder), folder)
    write_json(
        a.out, dict(model=Path(model).name if a.dry else model, dry=a.dry, steps=found, provenance=provenance(start))
    )
    print(a.out)


if __name__ == "__main__":
    main()
