"""Execute the solutions of the exercises, each in its chapter, and show what they print.

    python tools/solutions.py nbs/21_data.dedup.ipynb ...     (no argument: every chapter)

A chapter is executed without its `#| slow` and `#| cuda` cells, then the Python blocks of its solutions in their order,
in the same kernel. Nothing is written. Exit status 1 where a solution fails.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from chapter_times import chapters
from refresh import LIMIT, NEVER, SkippingClient

SOLUTION = re.compile(r"<details>(.*?)</details>", re.S)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def solutions(nb):
    "The Python blocks of a notebook's solutions."
    texts = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    return [code for text in texts for solution in SOLUTION.findall(text) for code in PYTHON.findall(solution)]


def executed(path):
    "The cells of the solutions after their execution, behind those of the chapter that failed."
    nb = nbformat.read(path, 4)
    own, added = list(nb.cells), [nbformat.v4.new_code_cell(code) for code in solutions(nb)]
    if not added:
        return []
    nb.cells += added
    resources = {"metadata": {"path": str(Path(path).parent)}}
    client = SkippingClient(nb, timeout=LIMIT, kernel_name="python3", resources=resources, allow_errors=True)
    client.skipped = (*NEVER, "slow")
    client.execute()
    return [cell for cell in own if failed(cell)] + added


def failed(cell):
    "Whether a cell ended with an error."
    return any(out.output_type == "error" for out in cell.get("outputs", ()))


def said(cell):
    "What a cell printed, and its error."
    lines = []
    for out in cell.outputs:
        if out.output_type == "stream" and out.name == "stdout":
            lines.append(out.text.rstrip())
        elif out.output_type == "error":
            lines.append(f"FAILED: {out.ename}: {out.evalue}")
        elif "data" in out:
            lines.append(out.data.get("text/plain", "").rstrip())
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", help="notebooks (default: every chapter)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    bad = 0
    for path in p.parse_args().notebooks or chapters():
        for n, cell in enumerate(executed(path), 1):
            print(f"{path}, block {n}:\n{cell.source.rstrip()}\n-->\n{said(cell)}\n", flush=True)
            bad += failed(cell)
    print(f"{bad} blocks failed" if bad else "no block failed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
