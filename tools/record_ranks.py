"""Losses of a training in two processes beside those of one, also where it is killed and goes on with another number;
recorded in nbs/results/ranks.json.

    python tools/record_ranks.py

A tiny random model is trained on CPUs in 32 bits, as tests/rank_runs.py lets processes do it: alone; in two by DDP and
by FSDP2; and in two and in one, the last of which is killed in the middle, after which one and two resume.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from domain_llm.core import read_json
from domain_llm.results import save_result

TESTS = Path(__file__).resolve().parent.parent / "tests"
SETTINGS = dict(method="full", tokens_per_step=128, probes=8)
TIMES = 8  # passes over the rows
KILLED_AT = 100  # passes of the process that is killed, of about 160 where there are no two
WAYS = {  # name -> for each call the processes, whether the weights are divided, and when the last is killed
    "one process": [(1, False, None)],
    "two, DDP": [(2, False, None)],
    "two, FSDP2": [(2, True, None)],
    "two killed, one resumes": [(2, False, KILLED_AT // 2), (1, False, None)],
    "one killed, two resume": [(1, False, KILLED_AT), (2, True, None)],
}


def trained(ask, folder, calls):
    "The calls of a training, of which the last must end well; gives its folder."
    for processes, divide, killed in calls:
        given = dict(out=str(folder), settings=SETTINGS, times=TIMES, divide=divide)
        if killed:
            given["die"] = (processes - 1, killed)
        ends = ask(dict(job="train", processes=processes, given=given))
        if any(ends) != bool(killed):
            raise SystemExit(f"the processes ended with {ends}: {Path(f'{folder}.log').read_text()[-3000:]}")
    return folder


def losses(folder):
    "Steps and losses."
    history = read_json(folder / "result.json")["history"]
    return [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]


def apart(one, other):
    "The largest difference between the weights of two trainings."
    a, b = (torch.load(folder / "weights.pt") for folder in (one, other))
    return max((a[name] - b[name]).abs().max().item() for name in a.keys() | b.keys())


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    start, found, folders = time.time(), {}, {}
    command = [sys.executable, str(TESTS / "rank_runs.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS)
    with tempfile.TemporaryDirectory() as root, subprocess.Popen(command, **pipes) as server:

        def ask(job):
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        for n, (name, calls) in enumerate(WAYS.items()):
            folders[name] = trained(ask, Path(root) / str(n), calls)
            gap = apart(folders["one process"], folders[name])
            tokens = read_json(folders[name] / "result.json")["tokens"]
            found[name] = dict(losses=losses(folders[name]), tokens=tokens, weights_apart=gap)
            print(name, tokens, len(found[name]["losses"]), gap, flush=True)
        server.stdin.close()
    print(save_result("ranks", dict(ways=found, settings=SETTINGS, killed_at=KILLED_AT), start))


if __name__ == "__main__":
    main()
