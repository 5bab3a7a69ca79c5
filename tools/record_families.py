"""Whether the package serves each family of models, step by step; recorded in nbs/results/families.json.

    python tools/record_families.py [--only "Gemma 2"]

Every family is a tiny model with random weights, shaped by the family's published configuration, and a small tokenizer
of its kind (tests/fixtures/small_families.py); the steps are those of tests/fixtures/conformance.py. A step passes, is
refused by the package with a reason, or fails. The record is written after every family; with --only nothing is.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fixtures.conformance import STEPS, Case, outcome  # noqa: E402
from fixtures.small_families import KINDS  # noqa: E402

from domain_llm.results import save_result  # noqa: E402


def conform(name):
    "The outcome of every step for a family."
    with tempfile.TemporaryDirectory() as folder:
        case, found = Case(name, folder), {}
        for step in STEPS:
            found[step] = outcome(step, case)
            print(f"{name}: {step} {found[step]['result']} {found[step]['said']}", flush=True)
    return found


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--only", choices=KINDS, help="this family alone")
    only, start, rows = a.parse_args().only, time.time(), {}
    for name, (kind, *_) in KINDS.items():
        if only in (None, name):
            rows[name] = dict(model_type=kind, steps=conform(name))
        if not only:
            save_result("families", dict(families=rows), start)


if __name__ == "__main__":
    main()
