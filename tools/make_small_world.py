"""Train the tokenizers of the small world on the made-up industry, one a language, and write them into the package.

    python tools/make_small_world.py

The same demo strings give the same files; tests/test_lab.py compares.
"""

import random
from pathlib import Path

from domain_llm.demo.lab import make_lab
from domain_llm.small_world import train_pieces

PIECES = 1024
ASSETS = Path(__file__).resolve().parent.parent / "domain_llm" / "assets"
FILES = {"en": ASSETS / "small_world_tokenizer.json", "zh": ASSETS / "small_world_tokenizer_zh.json"}


def texts(lang):
    "Documents and conversations of a world that no experiment uses."
    lab = make_lab(seed=999, entities=200, renderings=4, wordings=8, lang=lang)
    said = [turn["content"] for row in lab["instructions"] for turn in row["messages"]]
    return random.Random(0).sample([d["text"] for d in lab["documents"]] + said, k=len(lab["documents"]) + len(said))


def train(lang):
    "The trained tokenizer of a language as JSON text."
    return train_pieces(texts(lang), PIECES).to_str()


if __name__ == "__main__":
    for lang, path in FILES.items():
        path.write_text(train(lang) + "\n", encoding="utf-8")
        print(f"wrote {path.name}, {path.stat().st_size:,} bytes")
