"""Time and memory of building a corpus, for several sizes; recorded in nbs/results/scale.json.

    python tools/record_scale.py [--megabytes 1 10 100 1000 5000]

Each size is a process of its own, and sizes that are not named stay as they were recorded. The documents are those of
bench_dedup.py, in files of 10,000, with edited copies: one in twenty repeats another one and has to go, one in twenty
is edited heavily and has to stay. One in a thousand holds a question of an exam. `grew_mb` is the largest growth of
anonymous memory, which the system cannot take back, over that of the program before it reads; `disk_mb` the most that
the build has in the system's temporary folder. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

from bench_dedup import COPIES, corpus

from domain_llm.core import write_jsonl
from domain_llm.data.corpus import build_corpus
from domain_llm.demo.world import make_world
from domain_llm.devices import file_lines
from domain_llm.results import load_result, results_dir, save_result

PART = 10_000  # documents of a file
DOCUMENT = 1200  # bytes, about
ASKED = 1000  # one document in so many holds a question


def anonymous_mb(process="self"):
    "Anonymous memory of a process, in MB."
    (line,) = (line for line in file_lines(f"/proc/{process}/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def write_part(folder, number, size, questions):
    "Write a file of so many documents; gives how many of them repeat another one."
    texts, planted = corpus(size, seed=number)
    for n in range(0, size, ASKED):
        texts[n] += "\n\n" + questions[(number + n) % len(questions)]["question"]
    write_jsonl(folder / f"{number:05}.jsonl", (dict(text=text, kind="web") for text in texts))
    return sum(len(planted[level]) for level in COPIES)


def write_documents(folder, megabytes, questions, first=0):
    """Write documents of about so many megabytes in all, the files numbered from `first`; gives how many there are, and
    how many repeat another one."""
    documents, repeated = int(megabytes * 10**6) // DOCUMENT, 0
    for number, start in enumerate(range(0, documents, PART), first):
        repeated += write_part(folder, number, min(PART, documents - start), questions)
    return documents, repeated


def size_of(path):
    "Bytes of a file, 0 where it has gone meanwhile."
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def watch(folder, most, ended):
    "Keep the largest anonymous memory, and the largest size of the files in a folder, both in MB, in `most`."
    while not ended.wait(0.1):
        most["memory"] = max(most["memory"], anonymous_mb())
        most["disk"] = max(most["disk"], sum(map(size_of, folder.rglob("*"))) / 1e6)


def measure(megabytes):
    "Figures of one size, printed as JSON."
    questions = make_world(seed=0)["mcq"]
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as scratch:
        documents, repeated = write_documents(Path(name), megabytes, questions)
        tempfile.tempdir = scratch
        build_corpus([dict(text="nothing " * 100)])  # what is loaded at the first call belongs to the program
        base, most, ended = anonymous_mb(), dict(memory=0, disk=0), threading.Event()
        watching = threading.Thread(target=watch, args=(Path(scratch), most, ended))
        watching.start()
        started = time.time()
        report = build_corpus(name, questions)["report"]
        seconds = time.time() - started
        ended.set()
        watching.join()
    figures = dict(documents=documents, megabytes=report["steps"][0]["bytes"] / 1e6, seconds=seconds)
    figures |= dict(steps=report["seconds"], grew_mb=most["memory"] - base, disk_mb=most["disk"])
    figures |= dict(repeated=repeated, dropped=report["dropped"])
    print(json.dumps(dict(figures, recorded=date.today().isoformat())))


def each_alone(sizes):
    "The figures of each size, measured in a process of its own."
    found = []
    for size in sizes:
        command = [sys.executable, __file__, "--one", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    return found


def recorded():
    "The figures recorded before, each with its date; none where there is no record."
    if not (results_dir() / "scale.json").exists():
        return []
    found = load_result("scale")
    return [dict(recorded=found["provenance"]["date"]) | size for size in found["sizes"]]


def together(old, new):
    "The figures of both, the smallest first; of a size that is in both the new ones."
    return sorted(({size["documents"]: size for size in [*old, *new]}).values(), key=lambda size: size["documents"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[1, 10, 100, 1000, 5000], metavar="N", help="of text"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given, started = parser.parse_args(), time.time()
    if given.one:
        return measure(given.one)
    old = recorded()
    print(save_result("scale", dict(sizes=together(old, each_alone(given.megabytes))), started))


if __name__ == "__main__":
    main()
