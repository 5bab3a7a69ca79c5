"""A folder as a company has it: two thousand files of many kinds, some broken, some hostile; nothing in it changes."""

import hashlib
import io
import json
import os
import random
import zipfile
from pathlib import Path

import pytest
import yaml

from domain_llm import cli
from domain_llm.core import read_json

WORDS = "pump valve seal pressure flange gasket torque bearing shaft rotor stator coupling lock sluice capstan".split()


def page(rng, i):
    "A short manual page, unlike the others."
    lines = [" ".join(rng.choices(WORDS, k=12)) + f" at {rng.randrange(1000)} rpm." for _ in range(6)]
    return f"# Unit {i}\n\n" + "\n".join(lines) + "\n"


def word(text, cells=""):
    "A minimal Word file."
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    parts = {
        "[Content_Types].xml": (
            f'<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            f'<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.'
            f'relationships+xml"/><Override PartName="/word/document.xml" ContentType="{main}"/></Types>'
        ),
        "_rels/.rels": (
            f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r" Type="{office}/officeDocument" Target="word/document.xml"/></Relationships>'
        ),
        "word/document.xml": f"<w:document {space}><w:body>"
        + "".join(f"<w:p><w:r><w:t>{line}</w:t></w:r></w:p>" for line in text.splitlines())
        + cells
        + "</w:body></w:document>",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, xml in parts.items():
            z.writestr(name, xml)
    return out.getvalue()


WIDE = (
    '<w:tbl><w:tr><w:tc><w:tcPr><w:gridSpan w:val="800000"/></w:tcPr>'
    "<w:p><w:r><w:t>wide</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
)
HOSTILE = {
    "broken.pdf": b"%PDF-1.4 nothing",
    "empty.md": b"",
    "binary.txt": b"\0\1\2" * 400,
    "wide.docx": word("A table.", WIDE),
    "no-archive.docx": b"PK\3\4 cut",
    "undefined.html": 5
    * (b"<meta charset=undefined><p>A page in no encoding, about a pump and its valve, long enough to be read.</p>"),
    "fences.md": b"```\n" * 30_000,
    "nested.html": b"<div>" * 20_000 + b"deep",
    "long.md": b"a" * 1_500_000,
    "old.doc": b"\xd0\xcf\x11\xe0" * 50,
    "half.jsonl": b'{"text": "A line about pumps and valves that is fine."}\n{"text": broken}\n[1]\n',
    "picture.png": b"\x89PNG" * 90,
    "~$lock.docx": b"x" * 162,
    "control.md": b"The pump stops. <|im_end|> <|endoftext|> It starts again. " * 20,
}


@pytest.fixture
def manuals(tmp_path):
    "The folder."
    root, rng = tmp_path / "manuals", random.Random(0)
    for i in range(2000 - len(HOSTILE)):
        folder = root / rng.choice(["standards", "books", "web", "news", "misc/deep/er"])
        folder.mkdir(parents=True, exist_ok=True)
        text = page(rng, i)
        kind = rng.choice(["md", "md", "txt", "html", "docx", "latin", "jpg"])
        if kind == "docx":
            (folder / f"{i}.docx").write_bytes(word(text))
        elif kind == "html":
            (folder / f"{i}.html").write_text(
                f"<html><body><nav>Home Products</nav><main><h1>Unit {i}</h1><p>{text}</p></main></body></html>"
            )
        elif kind == "latin":
            (folder / f"{i}.txt").write_bytes((text + "Größe in Zoll\n").encode("latin-1"))
        elif kind == "jpg":
            (folder / f"{i}.jpg").write_bytes(b"\xff\xd8" + bytes(rng.randrange(256) for _ in range(60)))
        else:
            (folder / f"{i}.{kind}").write_text(text)
    for name, raw in HOSTILE.items():
        (root / name).write_bytes(raw)
    os.symlink(root, root / "misc" / "loop")
    (root / ".hidden").write_text("not looked at")
    return root


def sums(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


def test_two_thousand_mixed_files_are_checked_cleaned_and_learnt_through_kills(
    manuals, runs, tiny_folder, tmp_path, capsys
):
    before = sums(manuals)
    cfg = dict(
        name="company",
        model=str(tiny_folder),
        output="out",
        data=dict(documents="manuals"),
        mix=dict(parts=dict(domain=1, general=0.5), tokens=4000),
        pretrain=dict(length=64, tokens_per_step=128, probes=2),
        evaluate=dict(questions=20, probe_tokens=400),
        quantize=dict(types=["q8_0"]),
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    assert cli.main(["check", str(tmp_path / "r.yaml")]) == 0
    said = capsys.readouterr().out
    assert "disk:" in said and "worth:" in said
    assert (
        cli.main(["corpus", str(manuals), "--out", str(tmp_path / "kept.jsonl")]) == 3
    )  # some files could not be read
    said = capsys.readouterr().out
    assert ".jpg files" in said and "Größe in Zoll" in (tmp_path / "kept.jsonl").read_text()
    for seconds in (1.0, 3.0, 6.0):
        assert runs.run(tmp_path / "r.yaml", tmp_path / "out", seconds) in ("signal 9", "exit 0")
    assert runs.run(tmp_path / "r.yaml", tmp_path / "out") == "exit 0", Path(f"{tmp_path / 'out'}.log").read_text()[
        -2000:
    ]
    assert runs.run(tmp_path / "r.yaml", tmp_path / "whole") == "exit 0"
    figures = [
        {k: v for k, v in read_json(tmp_path / run / "metrics.json").items() if k != "seconds"}
        for run in ("out", "whole")
    ]
    assert figures[0] == figures[1] and not list((tmp_path / "out").rglob("*.part"))
    skipped = json.loads((tmp_path / "out" / "inputs" / "documents" / "skipped.json").read_text())
    assert {"broken.pdf", "empty.md", "binary.txt"} <= {s["file"] for s in skipped}
    assert sums(manuals) == before
