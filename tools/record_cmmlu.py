"""Record how the demo model does on a subset of CMMLU, with and without permuted options, in nbs/results/cmmlu.json.

    python tools/record_cmmlu.py PATH/TO/CMMLU [--each 40] [--subjects nutrition computer_security]

The folder is data/test of https://github.com/haonan-li/CMMLU (CC BY-NC-SA 4.0), with SUBJECT.csv or SUBJECT_test.csv;
files that end in _dev.csv are left out. So many questions of each subject are drawn. The record says which question was
answered how, and holds no text of the questions.
"""

import argparse
import random
import time
from pathlib import Path

from scipy.stats import binom

from domain_llm.core import InputError
from domain_llm.judge.choice import circular, multiple_choice
from domain_llm.judge.questions import read_questions
from domain_llm.judge.stats import wilson
from domain_llm.models import load
from domain_llm.results import save_result

CLOZE = "问题：{question}\n答案："
LETTER = "以下是单项选择题，请选出正确答案。\n问题：{question}\n{choices}\n答案："
CHANCE, POWER = 0.25, 0.8


def told_from_chance(questions):
    "The smallest true accuracy, to a point, at which an exam of this size has its 95% interval above chance in 80%."
    enough = next(k for k in range(questions + 1) if wilson(k, questions)[0] > CHANCE)
    return next(p / 100 for p in range(25, 101) if binom.sf(enough - 1, questions, p / 100) >= POWER)


def subset(folder, subjects, each):
    "Question rows, so many of each subject; a row's group is the subject and the number of the question in its file."
    files = {path.stem.removesuffix("_test"): path for path in sorted(folder.glob("*.csv"))}
    files = {name: path for name, path in files.items() if not name.endswith("_dev")}
    missing = [name for name in subjects if name not in files]
    if not files or missing:
        raise InputError(f"{folder} holds no {', '.join(missing) or 'SUBJECT.csv'}. Name the folder of CMMLU's files.")
    rows = []
    for name in subjects or files:
        found = read_questions(files[name], skip_faulty=True)
        drawn = random.Random(name).sample(found, min(each, len(found)))
        rows += [dict(row, group=f"{name}:{row['group'].rpartition(':')[2]}") for row in drawn]
    return rows


def kept(found):
    "The figures of a score, and of each question whether it was right."
    names = ("accuracy", "low", "high", "n", "chance", "chance_one", "mean", "single", "positions")
    right = "".join("1" if one else "0" for one in found["correct"])
    return {name: found[name] for name in names if name in found} | dict(right=right)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--subjects", nargs="+", default=[])
    given, started = parser.parse_args(), time.time()
    rows = subset(given.folder, given.subjects, given.each)
    model, tok = load()
    cloze = multiple_choice(model, tok, rows, norm="bytes", template=CLOZE)
    letters = multiple_choice(model, tok, rows, style="letter", template=LETTER)
    rotated = circular(model, tok, rows, template=LETTER)
    found = dict(cloze=kept(cloze), letter=kept(letters), rotated=kept(rotated))
    asked = dict(questions=[row["group"] for row in rows], told_from_chance=told_from_chance(len(rows)))
    templates = dict(cloze=CLOZE, letter=LETTER)
    print(save_result("cmmlu", asked | dict(templates=templates, found=found), started))


if __name__ == "__main__":
    main()
