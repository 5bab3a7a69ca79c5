"""Memory and time from documents to the first training steps, for corpora of several sizes; recorded in
nbs/results/rows.json.

    python tools/record_rows.py [--millions 1 10 200]

Each size is a process of its own: two files of documents (half domain, half general), token rows, a mixture 1:1,
packed rows and twenty steps of a small model, as `domain-llm run` does it. `grew_mb` is the largest growth of
anonymous memory, which the system cannot take back, over that of the program with model and tokenizer. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from domain_llm.core import iter_jsonl, write_jsonl
from domain_llm.data.mix import mixture, token_rows
from domain_llm.data.rows import gathered
from domain_llm.demo.world import make_world
from domain_llm.devices import file_lines
from domain_llm.models import load_tokenizer, tiny
from domain_llm.results import save_result
from domain_llm.train.loop import TRAIN_DEFAULTS, train

STEPS = 20
LENGTH = 1024


class EnoughSteps(Exception):
    "Raised by the probe that ends a training."


def anonymous_mb():
    "Anonymous memory of this process, in MB."
    (line,) = (line for line in file_lines("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def watch(peaks, ended):
    "Keep the largest anonymous memory in `peaks` until `ended` is set."
    while not ended.wait(0.02):
        peaks[0] = max(peaks[0], anonymous_mb())


def write_documents(path, tokens, seed):
    "A file of different documents of the demo with so many tokens at least."

    def documents():
        written = 0
        for n in range(10**9):
            for doc in make_world(seed=1000 * seed + n % 50, entities=20)["documents"]:
                text = f"Copy {n}. {doc['text']}"
                yield dict(text=text)
                written += len(text) / 3.2  # characters of a token, from a count of these documents
                if written > tokens:
                    return

    write_jsonl(path, documents())


def few_steps(model, rows, tokens, folder):
    "Train until the first probe after the start."
    calls = []

    def probe(model):
        calls.append(1)
        if len(calls) > 1:
            raise EnoughSteps
        return dict(score=0.0)

    probes = max(1, tokens // (LENGTH * STEPS))
    settings = {**TRAIN_DEFAULTS, "length": LENGTH, "tokens_per_step": LENGTH, "probes": probes}
    try:
        train(model, rows, folder, settings, probe)
    except EnoughSteps:
        pass


def measure(millions):
    "Figures of one size, printed as JSON."
    tok = load_tokenizer()
    model = tiny(tok)
    with tempfile.TemporaryDirectory() as name:
        folder, tokens = Path(name), millions * 500_000
        for seed, source in enumerate(("domain", "general")):
            write_documents(folder / f"{source}.jsonl", tokens, seed)
        base, started, seconds = anonymous_mb(), time.time(), {}
        peaks, ended = [base], threading.Event()
        threading.Thread(target=watch, args=(peaks, ended), daemon=True).start()
        sources = {}
        for source in ("domain", "general"):
            texts = iter_jsonl(folder / f"{source}.jsonl")
            sources[source] = gathered(token_rows(texts, tok, source, LENGTH), folder / f"{source}.arrow")
        seconds["tokenized"] = time.time() - started
        rows, plan = mixture(sources, dict(domain=1, general=1), path=folder / "mixture.arrow")
        seconds["mixed"] = time.time() - started
        few_steps(model, rows, sum(plan["tokens"].values()), folder / "training")
        seconds["trained"] = time.time() - started
        ended.set()
        disk = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
    figures = dict(tokens=sum(plan["tokens"].values()), rows=len(rows), base_mb=base, grew_mb=peaks[0] - base)
    print(json.dumps(figures | dict(disk_mb=disk / 2**20, seconds=seconds)))


def each_alone(script, sizes):
    "The figures of each size, which a script prints as JSON, each in a process of its own."
    found = []
    for size in sizes:
        command = [sys.executable, script, "--one", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10, 200], metavar="N", help="tokens")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given, started = parser.parse_args(), time.time()
    if given.one:
        return measure(given.one)
    found = each_alone(__file__, given.millions)
    print(save_result("rows", dict(sizes=found, length=LENGTH, steps=STEPS), started))


if __name__ == "__main__":
    main()
