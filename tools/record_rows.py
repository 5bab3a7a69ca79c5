"""Memory of `domain-llm run` from documents to training steps, and of its resume, for corpora of several sizes;
recorded in nbs/results/rows.json.

    python tools/record_rows.py [--millions 1 10 200]

Half of the tokens are domain documents, half are general text, as record_scale.py makes them. A recipe with a small
random model is run by the command line, killed once a checkpoint of the training is whole, called again and killed
after the next one. `peak_mb` has, by stage, the largest anonymous memory of the process, which the system cannot take
back; program and model are in it. Linux only.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import yaml
from record_scale import anonymous_mb, write_documents

from domain_llm.core import write_jsonl
from domain_llm.demo.world import make_world
from domain_llm.models import load_tokenizer, tiny
from domain_llm.results import save_result

STEPS = 20  # between two checkpoints
LENGTH = 1024
MEGABYTES = 5.3  # of a million tokens


def write_recipe(folder, millions):
    "A small model, two halves of documents, and the recipe that trains on both for one epoch."
    tok, questions = load_tokenizer(), make_world(seed=0)["mcq"]
    tiny(tok).save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    write_jsonl(folder / "questions.jsonl", questions)
    for name, first in (("domain", 0), ("general", 10_000)):
        (folder / name).mkdir()
        write_documents(folder / name, millions * MEGABYTES / 2, questions, first)
    data = dict(documents=[str(folder / "domain")], general=[str(folder / "general")])
    probes = max(1, round(millions * 1e6 / (LENGTH * STEPS)))
    recipe = dict(
        name="rows",
        model=str(folder / "model"),
        data=data | dict(questions=[str(folder / "questions.jsonl")]),
        mix=dict(parts=dict(domain=1, general=1)),
        pretrain=dict(length=LENGTH, tokens_per_step=LENGTH, probes=probes),
        sft=False,
        quantize=False,
        evaluate=dict(questions=40, probe_tokens=2000),
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def checkpoints(out):
    "The steps of the checkpoints that are whole."
    found = (out / "pretrain" / "checkpoints").glob("checkpoint-*/seal.json")
    return {int(path.parent.name.split("-")[1]) for path in found}


def watched(folder, beyond):
    "Call the run until there is a checkpoint of a step beyond this one; gives the peaks by stage, and seconds."
    log, out, peaks, began = folder / "log.txt", folder / "out", {}, time.time()
    command = ["domain-llm", "run", str(folder / "recipe.yaml"), "--output", str(out)]
    with open(log, "w") as f:
        running = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not any(step > beyond for step in checkpoints(out)):
            if running.poll() is not None:
                raise SystemExit(log.read_text()[-3000:])
            stage = (["start"] + re.findall(r"^\[\d+/\d+\] (\w+):", log.read_text(), re.MULTILINE))[-1]
            peaks[stage] = max(peaks.get(stage, 0), anonymous_mb(running.pid))
            time.sleep(0.1)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    return dict(peak_mb=peaks, seconds=time.time() - began)


def tokens_said(log):
    "The tokens of each source, as the run says them."
    (line,) = re.findall(r"^tokens of (.*)$", log, re.MULTILINE)
    return {name: int(n.replace(",", "")) for name, n in re.findall(r"(\w+) ([\d,]+) \(", line)}


def measure(millions):
    "Figures of one size."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder, millions)
        first = watched(folder, 0)
        tokens = tokens_said((folder / "log.txt").read_text())
        step = max(checkpoints(folder / "out"))
        resumed = watched(folder, step)
        disk = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    return dict(tokens=tokens, first=first, resumed=resumed, killed_at=step, disk_mb=disk / 1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10, 200], metavar="N", help="tokens")
    given, started, found = parser.parse_args(), time.time(), []
    for millions in given.millions:
        found.append(measure(millions))
        print(json.dumps(found[-1]), flush=True)
    print(save_result("rows", dict(sizes=found, length=LENGTH, steps=STEPS), started))


if __name__ == "__main__":
    main()
