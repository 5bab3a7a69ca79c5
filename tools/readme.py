"""Write README.md from nbs/index.ipynb (`--check`: only say whether it is current, by the exit status)."""
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def readme():
    "The text of README.md: the index notebook as Markdown, code cells hidden, their outputs kept."
    nb = nbformat.read(root / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    for c in nb.cells:
        for o in c.get("outputs", []): o.get("data", {}).pop("text/plain", None) if "text/markdown" in o.get("data", {}) else None
    text, _ = MarkdownExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(nb)
    lines = [l.rstrip() for l in text.strip().splitlines()]
    return "\n".join(l for i, l in enumerate(lines) if l or (i and lines[i - 1])) + "\n"


if __name__ == "__main__":
    path, text = root / "README.md", readme()
    if "--check" in sys.argv: sys.exit(path.read_text(encoding="utf-8") != text)
    path.write_text(text, encoding="utf-8")
