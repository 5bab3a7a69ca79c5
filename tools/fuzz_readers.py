"""Damaged documents for every reader: what cannot be read is named, nothing is raised, a MB takes 5 s at most.

    python tools/fuzz_readers.py --seconds 600    # prints each case that fails, keeps its bytes in fuzz_failures/

Each round takes a real document (the demo's, and those of ../shared/data where they are), damages it, and reads it.
A DOCX is damaged in the XML inside its ZIP as well.
"""

import argparse
import io
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from domain_llm.data.read import read_documents
from domain_llm.demo.files import write_world

SECONDS_PER_MB = 5
PIECES = [
    b"<",
    b">",
    b"</p>",
    b"<table>",
    b"<td colspan=99999999>",
    b"<pre>",
    b"<meta charset=undefined>",
    b"&#x110000;",
    b"&#0;",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"```\n",
    b"\f",
    b"\r",
    b"\xcc\x81" * 40,
    b"{",
    b'"text":',
    b'{"text": 1}\n',
    b'{"text": "a"}\n',
    b"\\ud800",
    b"9" * 5000,
    b"[" * 3000,
    b"endobj",
    b"/Length 0",
    b"/Kids[3 0 R]",
    b"<<",
    b">>",
    b'w:val="-1"',
    b'w:val="800000"',
    b"<w:tbl>",
    b"</w:tc>",
    b"<w:p/>",
    b"PK\3\4",
    b"]]>",
    b"<!--",
]


def seeds(folder):
    "Real documents: (ending, bytes)."
    docs = Path(write_world(folder, seed=0, entities=10)["docs"])
    paths = [p for kind in (".html", ".docx", ".md", ".txt") for p in sorted(docs.rglob(f"*{kind}"))[:4]]
    shared = next(
        (
            p / "shared" / "data" / "security"
            for p in Path(__file__).resolve().parents
            if (p / "shared" / "data" / "security").is_dir()
        ),
        None,
    )
    paths += sorted(shared.rglob("*.pdf"))[:1] + sorted(shared.glob("web/*.md"))[:2] if shared else []
    out = [(p.suffix, p.read_bytes()) for p in paths]
    out.append(
        (
            ".jsonl",
            b"".join(b'{"text": "Line %d of a dump", "kind": "web", "source": "forum"}\n' % i for i in range(30)),
        )
    )
    out.append(
        (
            ".html",
            b'<?xml version="1.0" encoding="iso-8859-1"?><html><body><main><h1>A</h1>'
            b"<table><tr><td>1<td>2</table><pre>x</pre><ul><li><p>y</ul></main></body></html>",
        )
    )
    return [*out, (".pdf", small_pdf())]


def small_pdf():
    "A PDF of one page."
    show = b"BT /F1 11 Tf 60 780 Td (A page of text.) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count 1/Kids[4 0 R]>>",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Resources<</Font<</F1 3 0 R>>>>/Contents 5 0 R>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(show), show),
    ]
    return (
        b"%PDF-1.4\n"
        + b"".join(b"%d 0 obj\n%s\nendobj\n" % (i, o) for i, o in enumerate(objects, 1))
        + b"trailer<</Size 6/Root 1 0 R>>\n%%EOF"
    )


def damaged(raw, rng):
    "The bytes with one to eight places changed, cut, repeated, moved or filled with a piece of mark-up."
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        a = rng.randrange(len(raw) + 1)
        b = min(len(raw), a + rng.choice((1, 4, 40, 400)))
        how = rng.randrange(6)
        if how == 0:
            raw[a:b] = bytes(rng.randrange(256) for _ in range(b - a))
        elif how == 1:
            del raw[a:b]
        elif how == 2:
            raw[a:a] = raw[a:b] * rng.choice((1, 2, 50, 1000))
        elif how == 3:
            raw[a:a] = rng.choice(PIECES) * rng.choice((1, 1, 1, 30))
        elif how == 4:
            raw[a:b] = rng.choice(PIECES)
        elif rng.random() < 0.2:
            del raw[a:]
    return bytes(raw[:3_000_000])


def damaged_docx(raw, rng):
    "A Word file with one of its members damaged, doubled or left out."
    out, chosen = io.BytesIO(), None
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        members = old.namelist()
        chosen = rng.choice(members + ["word/document.xml"] * 6)
        for name in members:
            data = old.read(name)
            if name == chosen and rng.random() < 0.05:
                continue
            new.writestr(name, damaged(data, rng) if name == chosen else data)
    return out.getvalue()


def fuzz(seconds, seed, folder, keep=None):
    "Read damaged documents for a time: (number of rounds, list of failures)."
    rng, found, rounds, until = random.Random(seed), [], 0, time.monotonic() + seconds
    all_seeds, place = seeds(folder / "demo"), folder / "docs"
    place.mkdir()
    (place / "good.txt").write_text("A good document.")
    while time.monotonic() < until:
        suffix, raw = rng.choice(all_seeds)
        case = damaged_docx(raw, rng) if suffix == ".docx" and rng.random() < 0.8 else damaged(raw, rng)
        path = place / f"case{suffix}"
        path.write_bytes(case)
        began = time.process_time()
        try:
            ids, why = read_documents(place)[0]["id"], None
        except Exception as e:
            ids, why = ["good.txt"], f"{type(e).__name__}: {e}"
        took, rounds = time.process_time() - began, rounds + 1
        if why is None and "good.txt" not in ids:
            why = "the good document is lost"
        if why is None and took > SECONDS_PER_MB * max(1, len(case) / 1e6):
            why = f"{took:.1f} s for {len(case):,} bytes"
        if why:
            found.append((suffix, why))
            if keep:
                Path(keep).mkdir(exist_ok=True)
                (Path(keep) / f"{len(found)}{suffix}").write_bytes(case)
        path.unlink()
    return rounds, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as t:
        rounds, found = fuzz(a.seconds, a.seed, Path(t), keep="fuzz_failures")
    for suffix, why in found:
        print(suffix, why)
    print(f"{rounds:,} damaged documents, {len(found)} failures")
    sys.exit(bool(found))
