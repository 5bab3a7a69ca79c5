"""Write README.md and its pictures from nbs/index.ipynb.

With `--check`, only say whether they are current, by the exit status.
"""

import re
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
IMAGES = "nbs/images"


def readme():
    """The text of README.md and the pictures in it, as file -> bytes.

    The index notebook as Markdown, code cells hidden, their outputs kept."""
    nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    pictures = {}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{IMAGES}/readme_{len(pictures) + 1}.png"
                pictures[name] = b64decode(data["image/png"])
                alt = cell.source.split("#| alt: ")[1].split("\n")[0] if "#| alt: " in cell.source else "figure"
                output["data"] = {"text/markdown": f"![{alt}]({name})"}
            elif "text/markdown" in data:
                data.pop("text/plain", None)
    text, _ = MarkdownExporter(
        exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    ).from_notebook_node(nb)
    lines = [from_root(line.rstrip()) for line in text.strip().splitlines()]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(kept) + "\n", pictures


def from_root(line):
    "A line whose links lead from the root of the checkout instead of from nbs/."
    up = re.sub(r"\]\(\.\./", "](", line)
    return re.sub(r"\]\(([\w.-]+\.ipynb)", r"](nbs/\1", up)


def current(text, pictures):
    "Whether README.md and the pictures are those of the notebook."
    same = [(root / name).exists() and (root / name).read_bytes() == raw for name, raw in pictures.items()]
    return (root / "README.md").read_text(encoding="utf-8") == text and all(same)


if __name__ == "__main__":
    text, pictures = readme()
    if "--check" in sys.argv:
        sys.exit(not current(text, pictures))
    (root / "README.md").write_text(text, encoding="utf-8")
    for name, raw in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(raw)
