"""Reading and running times of chapters: hand-computed ones, and a record that keeps what it is not told."""

import chapter_times
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from domain_llm.core import read_json


def notebook(*cells):
    return new_notebook(cells=list(cells))


TWO_MINUTES = "# Pumps\n\n> Their pressures.\n\n" + "pump [valve](far/away/from/here.ipynb) " * 199 + "end"
CODE = new_code_cell("\n\n".join(f"x{i} = {i}" for i in range(40)))


@pytest.mark.parametrize(
    "cells, minutes",
    [
        ([new_markdown_cell("word " * 600)], 3),
        ([new_markdown_cell("泵的压力" * 300)], 4),  # no spaces
        ([new_markdown_cell("word " * 400 + "压" * 300)], 3),
        ([CODE], 2),  # blank lines do not count
        ([new_markdown_cell(TWO_MINUTES), CODE], 4),
        ([new_markdown_cell(TWO_MINUTES + "\n\n## Exercises\n\n" + "word " * 5000)], 2),
        ([new_code_cell("#| hide\n" + CODE.source)], 1),
    ],
)
def test_reading_by_hand(cells, minutes):
    assert chapter_times.reading_minutes(notebook(*cells)) == minutes


def test_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter_times, "ROOT", tmp_path)
    monkeypatch.setattr(chapter_times, "RECORD", tmp_path / "nbs" / "results" / "chapters.json")
    (tmp_path / "nbs").mkdir()
    for name, cells in {"10_a": [new_markdown_cell(TWO_MINUTES)], "20_b": [new_markdown_cell("# 泵"), CODE]}.items():
        nbformat.write(notebook(*cells), tmp_path / "nbs" / f"{name}.ipynb")
    nbformat.write(notebook(), tmp_path / "nbs" / "90_appendix.ipynb")
    assert chapter_times.outdated() == ["10_a", "20_b"]
    chapter_times.renew({"10_a": 12.6})
    chapter_times.renew()
    found = read_json(chapter_times.RECORD)["chapters"]
    assert {name: (row["title"], row["reading"], row.get("seconds")) for name, row in found.items()} == {
        "10_a": ("Pumps", 2, 13),
        "20_b": ("泵", 2, None),
    }
    assert chapter_times.outdated() == []
    nbformat.write(notebook(*[CODE] * 3), tmp_path / "nbs" / "20_b.ipynb")  # 6 minutes instead of 2
    (tmp_path / "nbs" / "10_a.ipynb").unlink()
    assert chapter_times.outdated() == ["10_a", "20_b"]
