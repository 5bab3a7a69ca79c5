"""Training speed on an idle machine and beside a busy process, for several spin counts of OpenMP; recorded in
nbs/results/bench_threads.json.

    python tools/bench_threads.py [--tokens 4000] [--rounds 2]

OpenMP's threads wait for each other at the end of every parallel loop. A thread that spins while it waits keeps its
core from the thread it waits for when another program takes a core. `GOMP_SPINCOUNT` says how long a thread spins
before it sleeps.
"""

import argparse
import os
import subprocess
import sys
import time

from domain_llm.data.mix import tokenize
from domain_llm.demo.world import make_world
from domain_llm.models import load
from domain_llm.results import save_result
from domain_llm.train.loop import TRAIN_DEFAULTS, train

SPINS = (300_000, 30_000, 10_000, 1_000)  # the first is libgomp's own
BUSY = "while True: pass"


def measure(tokens):
    "Tokens per second of full tuning on the demo's documents, after a short warm-up; printed."
    import tempfile

    model, tok = load()
    rows = tokenize(make_world()["documents"], tok, "domain", 256)
    for size in (1000, tokens):
        some = []
        while sum(len(r["input_ids"]) for r in some) < size:
            some.append(rows[len(some)])
        with tempfile.TemporaryDirectory() as folder:
            start = time.time()
            train(
                model,
                some,
                folder,
                {**TRAIN_DEFAULTS, "tokens_per_step": 256, "length": 256, "learning_rate": 1e-5, "probes": 1},
            )
            seconds = time.time() - start
    print(sum(len(r["input_ids"]) for r in some) / seconds)


def run(spin, tokens, busy):
    "Tokens per second in a process of its own, beside a busy one if asked for."
    env = {**os.environ, "GOMP_SPINCOUNT": str(spin)}
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(tokens)], env=env, capture_output=True, text=True, check=True
        )
        return float(done.stdout.split()[-1])
    finally:
        if other:
            other.kill()


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--tokens", type=int, default=4000)
    a.add_argument("--rounds", type=int, default=2)
    a.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.measure:
        return measure(a.measure)
    start, speed = time.time(), {spin: {"idle": [], "busy": []} for spin in SPINS}
    for _ in range(a.rounds):
        for spin in SPINS:
            for when in ("idle", "busy"):
                speed[spin][when].append(round(run(spin, a.tokens, when == "busy"), 1))
                print(f"{spin:8,} {when} {speed[spin][when][-1]}", flush=True)
    print(save_result("bench_threads", dict(tokens=a.tokens, tokens_per_second=speed), started=start))


if __name__ == "__main__":
    main()
