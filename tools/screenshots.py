"""Take the pictures of the web pages that the chapters show: nbs/images/review_*.png and nbs/images/text2sql_*.png.

    python tools/screenshots.py

It makes both pages of the demo: a review of two files of answers, and Text-to-SQL by rules. The installed Chromium
shows them, on a desktop and on a phone, in English and in Chinese. On Debian: apt-get install chromium fonts-noto-cjk.
"""

import random
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from browser import Browser

from domain_llm.demo.lab import make_lab, with_wrong_answers
from domain_llm.judge.packet import build_packet
from domain_llm.ship.marks import write_page

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"
MAIN = "import sys; from domain_llm.cli import main; sys.exit(main(sys.argv[1:]))"
MARKED = 4  # items that are marked before the picture is taken
QUESTIONS = dict(en="How many machines does each site have?", zh="每个站点各有多少台机器？")


def make_review(
    lang: str,  # en or zh
    path,  # HTML file to write
):
    "The review page for two made-up models, one of which is right more often."
    questions = make_lab(lang=lang, seed=1, entities=30, renderings=1, wordings=1)["questions"]
    wrong, rng = {q["question"]: q["reference"] for q in with_wrong_answers(questions)}, random.Random(1)
    answers = {
        name: [q["reference"] if rng.random() < share else wrong[q["question"]] for q in questions]
        for name, share in (("file-strong", 0.8), ("file-weak", 0.4))
    }
    write_page(path, build_packet(questions, answers, reviewers=2, seed=7)[0])


def picture_review(size, lang, path):
    "A picture of the review page after a few marks."
    with tempfile.TemporaryDirectory() as folder, Browser(size, lang) as page:
        made = Path(folder) / "review.html"
        make_review(lang, made)
        page.open(made.as_uri())
        page.press("Tab", "Tab", "Enter", *"1" * MARKED)
        page.wait(f"Object.keys(marks).length === {MARKED}")
        page.picture(path)


@contextmanager
def served(lang):
    "The address of a server of answers for the demo's database, which ends with the block."
    with tempfile.TemporaryDirectory() as folder:
        words = ["serve", "--task", "text2sql", "demo", "--lang", lang, "--port", "0"]
        command = [sys.executable, "-c", MAIN, *words, "--store", f"{folder}/feedback.sqlite"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


def picture_answer(size, lang, path):
    "A picture of the Text-to-SQL page with an answer: chart, table and query."
    with served(lang) as address, Browser(size, lang) as page:
        page.open(address)
        page.wait("document.querySelector('#nearest button')")
        page.write(QUESTIONS[lang])
        page.press("Enter")
        page.wait("document.querySelector('#chart svg')")
        page.run("document.activeElement.blur()")  # a caret blinks
        page.picture(path)


if __name__ == "__main__":
    taken = dict(
        review_desktop=(picture_review, "desktop", "en"),
        review_desktop_zh=(picture_review, "desktop", "zh"),
        review_phone=(picture_review, "phone", "zh"),
        review_phone_en=(picture_review, "phone", "en"),
        text2sql_desktop=(picture_answer, "desktop", "en"),
        text2sql_phone=(picture_answer, "phone", "zh"),
    )
    for name, (take, size, lang) in taken.items():
        path = IMAGES / f"{name}.png"
        take(size, lang, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
