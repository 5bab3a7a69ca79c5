"""Reading and running time of every chapter, in nbs/results/chapters.json; the first chapter shows them.

    python tools/chapter_times.py                     (reading time, from the text and code of every chapter)
    python tools/chapter_times.py --check             (only names the chapters whose entry is missing or out of date)
    python tools/refresh.py --record nbs/X.ipynb      (executes a chapter and records its running time, too)

Reading time is words / 200 + Chinese characters / 300 + lines of code / 20, in minutes: a slow reader's rates, chosen
and not measured. Exercises, hidden cells and outputs do not count. Running time is the processor time of the kernel and
of what it started: the time on an idle core, and nearly the same on a busy one. Not so where llama.cpp runs, whose
threads wait busily: record these chapters (51 to 53, 57, 64) on an idle machine. A chapter that was not recorded has
none.
"""

import re
import sys
import time
from pathlib import Path

import nbformat

from domain_llm.core import read_json, write_json
from domain_llm.devices import machine

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "nbs" / "results" / "chapters.json"
WORDS, CHARACTERS, LINES = 200, 300, 20  # a minute
CHINESE = re.compile(r"[\u3400-\u9fff]")
WORD = re.compile(r"[^\W\d_\u3400-\u9fff]+|\d+")
STALE = 2  # minutes by which an entry may be wrong; a quarter where that is more


def chapters():
    "The notebooks of the course, in order; those of the appendix and translations are not among them."
    found = sorted((ROOT / "nbs").glob("[0-6]*.ipynb"))
    return [path for path in found if not path.stem.endswith("_zh")]


def reading_minutes(
    nb,  # a notebook
):
    "Minutes to read the text and the code of a notebook, to a whole one."
    text, lines = "", 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text += cell.source + "\n"
        elif cell.cell_type == "code" and not cell.source.startswith("#| hide"):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    text = re.split(r"^## Exercises", text, flags=re.M)[0]
    text = re.sub(r"\]\([^)]*\)", "]", text)  # the address of a link is not read
    minutes = len(WORD.findall(text)) / WORDS + len(CHINESE.findall(text)) / CHARACTERS + lines / LINES
    return max(1, round(minutes))


def _recorded():
    "The entries so far, by chapter."
    return read_json(RECORD)["chapters"] if RECORD.exists() else {}


def _entry(path, before):
    "An entry with the present title and reading time, and the running time of an earlier one."
    nb = nbformat.read(path, 4)
    title = nb.cells[0].source.splitlines()[0].removeprefix("# ")
    kept = {key: before[key] for key in ("seconds", "recorded") if key in before}
    return dict(title=title, reading=reading_minutes(nb), **kept)


def renew(
    seconds=None,  # chapter -> processor seconds of its run, to be recorded
):
    "Write the record anew; running times stay where none are given."
    before, now = _recorded(), {}
    for path in chapters():
        now[path.stem] = _entry(path, before.get(path.stem, {}))
        if path.stem in (seconds or {}):
            found = dict(date=time.strftime("%Y-%m-%d"), cores=machine()["cores"])
            now[path.stem] |= dict(seconds=round(seconds[path.stem]), recorded=found)
    rates = dict(words=WORDS, characters=CHARACTERS, lines=LINES)
    write_json(RECORD, dict(rates_per_minute=rates, chapters=now))


def outdated():
    "Chapters without an entry, or whose entry is far from their text; entries without a chapter."
    before, paths = _recorded(), {path.stem: path for path in chapters()}
    wrong = [name for name in before if name not in paths]
    for name, path in paths.items():
        minutes = reading_minutes(nbformat.read(path, 4))
        if name not in before or abs(before[name]["reading"] - minutes) > max(STALE, minutes / 4):
            wrong.append(name)
    return wrong


if __name__ == "__main__":
    if "--check" in sys.argv:
        wrong = outdated()
        sys.exit(f"run python tools/chapter_times.py: {', '.join(wrong)}" if wrong else 0)
    renew()
