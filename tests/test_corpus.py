"What the chapters are the wrong place for: every broken file, properties on random text, real data where it is."

import base64
import csv
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import zipfile
from itertools import combinations, count
from pathlib import Path

import numpy as np
import pytest

from domain_llm.core import InputError
from domain_llm.data import clean as cleaning
from domain_llm.data import dedup, formats, read, reworded
from domain_llm.data.clean import clean
from domain_llm.data.corpus import build_corpus, corpus_report, hold_out
from domain_llm.data.dedup import containment, covered, jaccard, near_duplicates, rank, shingles
from domain_llm.data.formats import MAX_BYTES, decode
from domain_llm.data.leaks import decontaminate, units_of
from domain_llm.data.read import faults, read_documents
from domain_llm.data.reworded import paraphrases, without_leaks
from domain_llm.data.rows import as_dataset, remove_file
from domain_llm.data.scale import datatrove_stages
from domain_llm.demo.facts import demo_strings
from domain_llm.demo.files import write_world
from domain_llm.demo.world import make_world

SHARED = next(
    (p / "shared" / "data" for p in Path(__file__).resolve().parents if (p / "shared" / "data").is_dir()),
    Path("/nowhere"),
)
WORDS = [
    a + b + c
    for a in "bcdfglmnprst"
    for b in ("a", "e", "i", "o", "ou")
    for c in ("ck", "lt", "mber", "nd", "r", "ss", "tion", "ver")
]
HAN = (
    "水闸压力阀门检修工人每天记录数据温度泵站设备安全规程标准钥匙班长通知系统网络密码"
    "学生历史地理海洋河流山脉城市农业工业经济发展政策法律文化教育科学技术"
)


def english(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def chinese(rng, n):
    return "".join(rng.choices(HAN, k=n))


NUMBERS = count(1)


def row(text, kind="web", name=None):
    name = name or f"{next(NUMBERS)}.md"
    return dict(text=text, source=name, kind=kind, id=name)


def pdf(pages, path=None):
    "A minimal PDF with one Helvetica line per text line."
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>"
        % (len(pages), b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(pages)))),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, lines in enumerate(pages):
        show = (
            b"BT /F1 11 Tf 14 TL 60 780 Td "
            + b" ".join(
                b"(%s) Tj T*" % line.replace("\\", "\\\\").replace("(", r"\(").replace(")", r"\)").encode("latin-1")
                for line in lines
            )
            + b" ET"
        )
        objects += [
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Resources<</Font<</F1 3 0 R>>>>/Contents %d 0 R>>"
            % (5 + 2 * i),
            b"<</Length %d>>stream\n%s\nendstream" % (len(show), show),
        ]
    out, at = b"%PDF-1.4\n", []
    for i, o in enumerate(objects, 1):
        at.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (i, o)
    out += (
        b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
        + b"".join(b"%010d 00000 n \n" % a for a in at)
        + b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(out))
    )
    if path:
        path.write_bytes(out)
    return out


def whys(skipped):
    return {s["file"]: s["why"] for s in skipped}


# ---- reading


def test_every_format_and_kind(tmp_path):
    import docx

    for d in ("standards", "handbook", "misc"):
        (tmp_path / d).mkdir()
    (tmp_path / "standards/a.md").write_text("# Valve\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    pdf([["First page of the valve manual."], ["Second page."]], tmp_path / "handbook/b.PDF")
    pdf([["A paper."]], tmp_path / "misc/p.pdf")
    (tmp_path / "misc/c.html").write_text(
        "<title>T</title><nav>Menu</nav><main><h2 id='cookies'>Cookies</h2><p>Main text<br>next <b>bold</b>.</p>"
        "<table><tr><th>k</th><th>v</th></tr><tr><td>x</td><td>1 <i>bar</i></td></tr></table>"
        "<ul><li>one</li><li>two</li></ul><pre>a\n  b</pre></main><footer>Foot</footer><script>var x</script>"
    )
    d = docx.Document()
    d.add_heading("Title", 1)
    d.add_paragraph("Before.")
    t = d.add_table(1, 2)
    t.cell(0, 0).text, t.cell(0, 1).text = "k", "v"
    d.add_paragraph("After.")
    d.save(tmp_path / "e.docx")
    (tmp_path / "misc/f.jsonl").write_text(
        '{"text": "line one"}\n\nnot json\n{"txt": 1}\n[1]\n{"text": "line two", "kind": "news", "source": "wire"}\n'
    )
    (tmp_path / ".hidden.txt").write_text("no")
    rows, skipped = read_documents(tmp_path)
    by = {r["id"]: r for r in rows}
    assert {k: r["kind"] for k, r in by.items()} == {
        "e.docx": "book",
        "handbook/b.PDF": "book",
        "misc/c.html": "web",
        "misc/f.jsonl#1": "book",
        "misc/f.jsonl#6": "news",
        "misc/p.pdf": "paper",
        "standards/a.md": "standard",
    }
    assert "| 1 | 2 |" in by["standards/a.md"]["text"] and by["misc/f.jsonl#6"]["source"] == "wire"
    assert [r["kind"] for r in read_documents(tmp_path / "standards")[0]] == [
        "standard"
    ]  # the folder that is given counts as well
    assert "valve manual" in by["handbook/b.PDF"]["text"] and by["handbook/b.PDF"]["text"].count("\f") == 2
    page = by["misc/c.html"]["text"]
    assert all(
        x in page for x in ("# Cookies", "Main text\nnext bold.", "| x | 1 bar |", "- one\n", "```\na\n  b\n```")
    ) and not any(x in page for x in ("Menu", "Foot", "var x"))
    assert [x for x in by["e.docx"]["text"].split("\n\n")] == ["# Title", "Before.", "| k | v |", "After."]
    assert set(whys(skipped)) == {"misc/f.jsonl, line 3", "misc/f.jsonl, line 4", "misc/f.jsonl, line 5"}


@pytest.mark.parametrize(
    "name, raw, why",
    [
        ("a.pdf", b"%PDF-1.4\nnothing", "broken PDF"),
        ("a.pdf", b"", "empty file"),
        ("a.pdf", pdf([[""]]), "no text in its 1 pages"),
        ("a.docx", b"PK\3\4 broken", "broken DOCX"),
        ("a.docx", b"not a zip", "broken DOCX"),
        ("a.xyz", b"text", "unknown file type .xyz"),
        ("noext", b"text", "unknown file type"),
        ("a.doc", b"x", ".docx"),
        ("a.txt", b"abc\0\1\2", "binary"),
        ("a.txt", b"text".ljust(9).decode().encode("utf-16-le"), "UTF-8"),
        ("a.md", b" \n\t", "empty file"),
        ("a.txt", base64.b64encode(bytes(900_000)), "without a space"),
        ("a.html", b"<html><script>x</script></html>", "no text"),
        ("a.jsonl", b"\n\n", "empty"),
    ],
)
def test_bad_file_is_named_and_the_run_goes_on(tmp_path, name, raw, why):
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "good.txt").write_text("A good document.")
    rows, skipped = read_documents(tmp_path)
    assert (
        rows["id"] == ["good.txt"] and len(skipped) == 1 and skipped[0]["file"] == name and why in skipped[0]["why"]
    ), skipped


def test_encrypted_pdf(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    w = pypdf.PdfWriter(io.BytesIO(pdf([["secret"]])))
    w.encrypt("x", algorithm="RC4-40")
    w.write(tmp_path / "a.pdf")
    (tmp_path / "good.txt").write_text("A good document.")
    assert "password" in whys(read_documents(tmp_path)[1])["a.pdf"]


def test_large_unreadable_and_vanished(tmp_path):
    with open(tmp_path / "big.txt", "wb") as f:
        f.truncate(MAX_BYTES + 1)
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "locked.txt").write_text("x")
    (tmp_path / "locked.txt").chmod(0)
    (tmp_path / "good.txt").write_text("A good document.")
    skipped = whys(read_documents(tmp_path)[1])
    assert "200 MB" in skipped["big.txt"] and "No such file" in skipped["link.txt"]
    if os.geteuid():
        assert "permission" in skipped["locked.txt"]


def test_permission(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("fine")
    real = Path.read_bytes

    def refuse(p):
        if p.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return real(p)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "permission" in whys(read_documents(tmp_path)[1])["a.txt"]


def test_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("word/document.xml", b"0" * (2 << 20))
    (tmp_path / "good.txt").write_text("A good document.")
    assert "unpacks to more" in whys(read_documents(tmp_path)[1])["a.docx"]


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="It is empty"):
        read_documents(tmp_path)
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(InputError, match="a.xyz: unknown file type"):
        read_documents(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_documents(tmp_path / "missing")
    with pytest.raises(InputError, match="no such file or folder"):
        read_documents("missing.txt")
    with pytest.raises(InputError, match="kind 'blog' is not known"):
        read_documents(tmp_path, kind="blog")


def test_many_bad_lines_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 500 + '{"text": "fine"}\n')
    rows, skipped = read_documents(tmp_path)
    assert rows["id"] == ["a.jsonl#501"] and len(skipped) == 21 and skipped[-1]["why"] == "480 more faulty lines"


def test_data_sets(tmp_path, monkeypatch):
    import datasets

    ds = datasets.Dataset.from_list([dict(text="one"), dict(text="two")])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: ds.to_iterable_dataset())
    assert read_documents("owner/name", kind="news")[0]["id"] == ["owner/name#0", "owner/name#1"]
    assert set(read_documents(ds, kind="news")[0]["kind"]) == {"news"}
    assert read_documents([dict(text="one", kind="handbook", id="a"), dict(text="two", kind="web", id="b")])[0][
        "kind"
    ] == ["book", "web"]
    ds.save_to_disk(tmp_path / "saved")
    assert len(read_documents(tmp_path / "saved")[0]) == 2
    with pytest.raises(InputError, match="no column"):
        read_documents(ds.rename_column("text", "body"))

    def fail(name, config, split, streaming):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="no network"):
        read_documents("owner/name")


def test_data_sets_of_the_hub_are_streamed(monkeypatch):
    "Also where the columns are not known beforehand; a cut is named."
    import datasets

    def rows(cut):
        for n in range(3):
            if n == cut:
                raise ConnectionError("no network")
            yield dict(text=f"document {n}", more=n)

    def hub(name, config, split, streaming):
        assert streaming
        return datasets.IterableDataset.from_generator(rows, gen_kwargs=dict(cut=2 if name == "owner/cut" else None))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert list(read_documents("owner/name")[0]["text"]) == ["document 0", "document 1", "document 2"]
    with pytest.raises(InputError, match="owner/cut: reading from the hub broke off .no network.. Try again"):
        read_documents("owner/cut")


def test_odd_but_legal_content(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "half a pair \\ud800 here\\u0000"}\n{"text": "line\\u2028separator"}\n{"text": "raw \u2028 one"}\r\n',
        encoding="utf-8",
    )
    (tmp_path / "deep.html").write_text("<div>" * 5000 + "deep text" + "</div>" * 5000)
    (tmp_path / "open.html").write_text("<p>One<p>Two<table><tr><td>a<td>b</table")
    (tmp_path / "UPPER.TXT").write_text("Upper case name.")
    rows, skipped = read_documents(tmp_path)
    by = {r["id"]: r["text"] for r in rows}
    assert (
        by["a.jsonl#1"] == "half a pair  here"
        and len(by) + len(skipped) == 6
        and "| a | b |" in by["open.html"]
        and "UPPER.TXT" in by
    )


def test_several_sources_keep_ids_apart(tmp_path):
    for d in "xy":
        (tmp_path / d).mkdir()
        (tmp_path / d / "a.txt").write_text(d)
    assert read_documents([tmp_path / "x", tmp_path / "y"])[0]["id"] == ["x/a.txt", "y/a.txt"]
    assert read_documents([tmp_path / "x/a.txt", tmp_path / "y/a.txt"])[0]["id"] == ["a.txt", "a.txt~2"]
    rows = [dict(text="one", id=name) for name in ("a", "a", "a~2", "a", "a~2")]
    assert read_documents(rows)[0]["id"] == ["a", "a~2", "a~2~2", "a~3", "a~2~3"]


def test_many_processes_give_the_same(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i:02d}.html").write_text(f"<p>Document number {i}</p>")
    alone = read_documents(tmp_path)[0].to_list()
    monkeypatch.setattr(os.path, "getsize", lambda p: 10**7)
    assert read_documents(tmp_path)[0].to_list() == alone


ZH = (
    "水闸的安全压力不得超过四巴，检修工人必须每三十天检查一次阀门，并把钥匙交给值班的班长。"
    "本标准适用于所有的泵站和管道系统。"
)


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("Größe – naïve café, élan", "cp1252"),
        ("Größe", "utf-8-sig"),
        ("Größe 水闸", "utf-16"),
        (ZH, "gb18030"),
        (ZH, "gbk"),
        (ZH, "utf-8"),
        (ZH, "utf-16"),
        ("Überdruckventil: Größe 4 prüfen, für öffentliche Häfen", "latin-1"),
        ("Le clapet a été vérifié à l'arrêt après cinq élèves émus", "cp1252"),
        ("Le clapet 水闸", "utf-8"),
    ],
)
def test_encodings(text, encoding):
    assert decode(text.encode(encoding)) == text


def test_one_bad_byte_in_utf8():
    assert (
        decode(("naïve café, élan vital, Größe " * 3).encode() + b"\xe9 end")
        == "naïve café, élan vital, Größe " * 3 + " end"
    )


# ---- documents as they come


def files(folder, **content):
    "Write files into a folder; a name has __ for a slash and _ before its ending."
    for name, raw in content.items():
        path = folder / (name.replace("__", "/")[::-1].replace("_", ".", 1)[::-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())


@pytest.mark.parametrize(
    "label, raw, want",
    [
        ("undefined", b"plain text", "plain text"),
        ("no-such-thing", "naïve".encode(), "naïve"),
        ("idna", b"a" * 100, "a" * 100),
        ("unicode_escape", b"a \\u0041", "a \\u0041"),
        ("iso-8859-1", b"doesn\x92t", "doesn’t"),
        ("latin-1", b"doesn\x92t", "doesn’t"),
        ("latin1", b"10 \x80", "10 €"),
        ("us-ascii", b"doesn\x92t", "doesn’t"),
        ("utf-16", "naïve — 水".encode(), "naïve — 水"),
        ("utf-16le", b"plain", "plain"),
        ("iso-8859-1", "naïve — 水".encode(), "naïve — 水"),
        ("gb2312", "鎔和水闸".encode("gbk"), "鎔和水闸"),
        ("shift_jis", "水門の圧力".encode("cp932"), "水門の圧力"),
        ("windows-1251", "Давление клапана".encode("cp1251"), "Давление клапана"),
        ("iso-2022-jp", "水門".encode("iso-2022-jp"), "水門"),
        ("gbk", ZH.encode("gbk") + b"\xff.", ZH + "."),
    ],
)
def test_the_encoding_that_a_page_names_is_read_as_browsers_do(tmp_path, label, raw, want):
    (tmp_path / "a.html").write_bytes(
        b"<html><head><meta charset='" + label.encode() + b"'></head><body><p>" + raw + b"</p></body></html>"
    )
    (tmp_path / "b.html").write_bytes(
        b'<?xml version="1.0" encoding="' + label.encode() + b'"?><html><head/><body><p>' + raw + b"</p></body></html>"
    )
    rows, skipped = read_documents(tmp_path)
    assert rows["text"] == [want, want] and not skipped


def test_comments_of_a_page_are_no_text(tmp_path):
    (tmp_path / "a.html").write_text("<main><p>One<!-- hidden --> two</p><!-- between --><p>three</p></main>")
    assert clean(read_documents(tmp_path)[0]["text"][0]) == "One two\n\nthree"


def test_any_failure_of_one_file_is_its_own(tmp_path, monkeypatch):
    for name in ("a.html", "b.md", "c.txt"):
        (tmp_path / name).write_text("Some text.")

    def fails(path, raw):
        raise ZeroDivisionError("in the depths\nof a library")

    monkeypatch.setitem(read._READERS, ".md", fails)
    rows, skipped = read_documents(tmp_path)
    assert rows["id"] == ["a.html", "c.txt"] and skipped == [
        dict(file="b.md", why="cannot be read (ZeroDivisionError: in the depths)")
    ]


def test_any_failure_of_one_line_is_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "n": '
        + "1" * 5000
        + '}\n{"text": "two", "source": "half \\ud800 pair"}\n'
        + "[" * 100_000
        + '\n{"text": "three"}\n'
    )
    rows, skipped = read_documents(tmp_path)
    assert (
        rows["id"] == ["a.jsonl#2", "a.jsonl#4"]
        and rows["source"][0] == "half \ufffd pair"
        and set(whys(skipped)) == {"a.jsonl, line 1", "a.jsonl, line 3"}
    )


def test_a_file_name_that_is_not_utf8(tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.txt")).write_text("A green document.")
    except OSError:
        pytest.skip("the file system wants UTF-8")
    assert read_documents(tmp_path)[0]["id"] == ["gr\ufffdn.txt"]


def word_table(tmp_path, edit):
    "The text of a Word file with a table of 3 x 3 cells, changed by `edit`."
    import docx

    d = docx.Document()
    t = d.add_table(3, 3)
    for i in range(9):
        t.cell(i // 3, i % 3).text = f"c{i}"
    edit(t)
    d.save(tmp_path / "a.docx")
    rows, skipped = read_documents(tmp_path)
    assert not skipped
    return rows["text"][0].split("\n")


def test_merged_cells_say_their_text_once(tmp_path):
    def edit(t):
        t.cell(0, 0).merge(t.cell(0, 2)).text = "wide"
        t.cell(1, 0).merge(t.cell(2, 0)).text = "tall"

    assert word_table(tmp_path, edit) == ["wide", "| tall | c4 | c5 |", "|  | c7 | c8 |"]


def test_a_huge_span_costs_nothing(tmp_path):
    import time

    def edit(t):
        t.cell(0, 0)._tc.get_or_add_tcPr().get_or_add_gridSpan().val = 800_000

    began = time.perf_counter()
    assert word_table(tmp_path, edit)[0] == "| c0 | c1 | c2 |" and time.perf_counter() - began < 2


def test_a_table_in_a_cell_is_read(tmp_path):
    def edit(t):
        t.cell(1, 1).add_table(1, 2).cell(0, 1).text = "inner"

    assert word_table(tmp_path, edit)[1] == "| c3 | c4 inner | c5 |"


REPEATED = [
    "a",
    " ",
    "\n",
    "-\n",
    "```\n",
    "``` x\n",
    "~~~\n",
    "\u00ad\n",
    "\f",
    "a\f",
    "a  b   c ",
    "| a |\n",
    "# h\n",
    "?",
    "水",
    "a\u0301\u0316",
    "\u0301\u0316",
    "home | ",
    "<p>",
    "<div>",
    "<br>",
    "a  <br>",
    "<li>",
    "<pre>",
    "<table><tr><td>",
    "<tr><td>x",
    "<script></script>x",
    "<h1>a</h1>",
    "<nav>",
    "<div class=menu>",
    "<div class=menu>a</div>",
    "<a href=x>a</a> ",
    "<!-- x -->",
    "<",
    "&amp;",
    "<b>",
    "<header>",
]
ADVERSE = {
    **{repr(unit): unit for unit in REPEATED},
    "long line of spaces in a page": "." + " " * 200_000 + ".\f",
    "unclosed fence": "```\n" + "x\n" * 100_000,
    "fences of growing length": "".join("`" * (3 + i % 200) + "x\n" for i in range(2000)),
    "a menu line that nearly matches": ("privacy policy" + " terms" * 45 + "!a\n") * 600,
}


@pytest.mark.parametrize("name", ADVERSE)
def test_time_grows_with_the_text_not_with_its_square(tmp_path, name):
    "200 kB take seconds; what grew with the square took minutes. Thousands of short blocks cost justext a square."
    import time

    text = (ADVERSE[name] * (200_000 // len(ADVERSE[name]) + 1))[:200_000]
    (tmp_path / "a.html" if "<" in name or "&" in name else tmp_path / "a.txt").write_text(text)
    (tmp_path / "good.txt").write_text(
        "A good document, long enough to be kept by every rule that the corpus chapter has for the length of a text."
    )
    question = dict(question="Which grease is used for the crane in the yard?", choices=["lard", "tallow"], answer=1)
    began = time.process_time()
    build_corpus(tmp_path, [question], min_chars=50)
    assert time.process_time() - began < (30 if name == repr("<div class=menu>a</div>") else 10)


def test_fences_by_the_rules_of_commonmark():
    assert cleaning._fenced("a\n````\n```\n````\nb") == ["a\n", "````\n```\n````", "\nb"]
    assert cleaning._fenced("~~~ x\n```\n~~~~\n```y\nz") == [
        "",
        "~~~ x\n```\n~~~~",
        "\n```y\nz",
    ]  # the last one has no end
    assert clean("```\na  b\n```\n```\nc  d\n```\n\n\n\n```\ne  f") == "```\na  b\n```\n```\nc  d\n```\n\n```\ne f"


def test_linked_folders_are_read_once(tmp_path):
    inside, outside = tmp_path / "docs", tmp_path / "elsewhere"
    files(inside, book__a_txt="First.", book__deep__b_txt="Second.")
    files(outside, c_txt="Third.", more__d_txt="Fourth.")
    (inside / "standard").symlink_to(outside)
    (inside / "again").symlink_to(inside / "book" / "deep")
    (outside / "more" / "loop").symlink_to(inside)
    (outside / "back").symlink_to(outside)
    rows, skipped = read_documents(inside)
    assert {r["id"]: r["kind"] for r in rows} == {
        "book/a.txt": "book",
        "book/deep/b.txt": "book",
        "standard/c.txt": "standard",
        "standard/more/d.txt": "standard",
    }
    assert whys(skipped) == dict.fromkeys(
        ["again", "standard/back", "standard/more/loop"], "a link to a folder that is read already"
    ) and not faults(skipped)


def test_what_is_no_document_is_counted_by_type(tmp_path):
    files(
        tmp_path, a_txt="A document.", x_png="1", y_PNG="2", deep__z_png="3", font_woff2="4", all_zip="5", plan_xyz="6"
    )
    (tmp_path / "~$report.docx").write_bytes(b"owner")
    rows, skipped = read_documents(tmp_path)
    assert rows["id"] == ["a.txt"] and {s["file"]: s.get("ignored") for s in skipped} == {
        "plan.xyz": None,
        "3 .png files": 3,
        "1 .woff2 file": 1,
        "1 .zip file": 1,
        "1 office lock file": 1,
    }
    assert faults(skipped) == [dict(file="plan.xyz", why="unknown file type .xyz")]
    text = corpus_report(build_corpus(tmp_path, min_chars=1)["report"])
    assert "1 file skipped\n  plan.xyz" in text and "not documents: " in text and "3 .png files (pictures)" in text


def test_names_of_the_hub_and_mistyped_paths(tmp_path, monkeypatch):
    import datasets

    asked = []

    def hub(name, config, split, streaming):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([dict(text="one")])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read_documents("owner/name:config")[0]["id"] == ["owner/name:config#0"] and read_documents("owner/name")[0][
        "id"
    ] == ["owner/name#0"]
    assert asked == [("owner/name", "config", "train"), ("owner/name", None, "train")]
    monkeypatch.chdir(tmp_path)
    files(tmp_path, manuals__standards__a_txt="A standard.")
    with pytest.raises(InputError, match=r"manuals/standrads: no such file or folder \(did you mean 'standards'\?\)"):
        read_documents("manuals/standrads")
    assert len(asked) == 2

    def fail(name, config, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="did you mean 'manuals'"):
        read_documents("manual")


def test_damaged_documents_end_in_the_skipped_list(tmp_path):
    "Three seconds of tools/fuzz_readers.py, from a fixed seed."
    path = Path(__file__).resolve().parents[1] / "tools" / "fuzz_readers.py"
    spec = importlib.util.spec_from_file_location("fuzz_readers", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rounds, found = tool.fuzz(3, 0, tmp_path)
    assert rounds > 5 and found == []


# ---- cleaning


@pytest.mark.parametrize(
    "raw, want",
    [
        ("a  b\tc. \n\n\n\nd.  E.  F", "a b c.\n\nd. E. F"),
        ("Pump   P7   4 bar", "Pump   P7   4 bar"),
        ("e\u0301", "é"),
        ("ze\u00adro", "zero"),
        ("inter\u00ad\nnational", "international"),
        ("a\u200bb\ufeffc\x07", "abc"),
        ("a\u00a0b", "a b"),
        (
            "We use cookies to improve your visit. Accept all\nThe valve opens.\n"
            "© 2024 Valve Ltd. All rights reserved.",
            "The valve opens.",
        ),
        ("Home | Products | Contact us\nText.", "Text."),
        ("Home > Pumps > P7\nText.", "Text."),
        ("Skip to main content\nText.", "Text."),
        ("本网站使用Cookie。\n正文。", "正文。"),
        ("Session cookies must carry the Secure flag.", "Session cookies must carry the Secure flag."),
        ("Contact the supervisor.", "Contact the supervisor."),
        ("| a   | b |\n|-----|---|", "| a   | b |\n|-----|---|"),
        ("```py\nx  =  1\n\n\n\ny\n```", "```py\nx  =  1\n\n\n\ny\n```"),
        ("    code  here", "    code  here"),
        ("压力，不得超过4巴。\n　　第二段", "压力，不得超过4巴。\n　　第二段"),
        ("The valve-\nhead and the valvehead.", "The valvehead and the valvehead."),
        ("a well-\nknown fact", "a well-\nknown fact"),
    ],
)
def test_clean(raw, want):
    assert clean(raw) == want and clean(want) == want


def test_clean_pages():
    rng = random.Random(0)
    body = [
        "The relief valve opens at four bar and must be in-",
        "spected every thirty days by a fitter who is quali-",
        "fied for pressure vessels. A well-known case shows it.",
        "A well-",
        "known case is the second lock.",
    ]
    pages = "".join(
        "\r\n".join(
            [
                "Manual of the lock   Rev. 3",
                *[f"{english(rng, 9)}." for _ in range(3)],
                *body,
                *[f"{english(rng, 9)}." for _ in range(3)],
                f"Page {i} of 12",
            ]
        )
        + "\f"
        for i in range(1, 13)
    )
    text = clean(pages)
    assert (
        "Manual of the lock" not in text
        and "Page" not in text
        and "inspected every thirty days by a fitter who is qualified for" in text
        and "well-known case is" in text
    )
    assert clean(text) == text
    zh = clean("水闸的安全压力不得超过四巴，检修工人\n必须每三十天检查一次阀门。\n12\f")
    assert zh == "水闸的安全压力不得超过四巴，检修工人必须每三十天检查一次阀门。"


def test_clean_is_idempotent_on_random_text():
    rng = random.Random(1)
    bits = [
        "valve",
        "valve-",
        "\n",
        "\n\n\n",
        "  ",
        "\t",
        "```",
        "```\n",
        "~~~\n",
        "\u00ad",
        "\u00ad\n",
        "\u2011\n",
        "Home | News | Contact",
        "We use cookies.",
        "12",
        "\f",
        "\r\n",
        "\u2028",
        "e\u0301",
        "\u200b",
        "| a |",
        "    x",
        "阀门",
        "，",
        "valvehead",
        "head",
        ".",
        "- ",
        "\ufffe\n",
        "\x02\r\n",
        "iv",
    ]
    for _ in range(3000):
        raw = "".join(rng.choices(bits, k=rng.randint(1, 25)))
        once = clean(raw)
        assert clean(once) == once, repr(raw)


# ---- duplicates


def corpus_with_copies(rng, make, n, size, cut=40):
    docs = [make(rng, size) for _ in range(n)]
    for i in range(n // 2):
        parts = docs[i].split() if " " in docs[i] else list(docs[i])
        for _ in range(rng.randint(0, size // cut)):
            parts[rng.randrange(len(parts))] = make(rng, 1)
        docs.append((" " if " " in docs[i] else "").join(parts))
    return docs


@pytest.mark.parametrize("make, size", [(english, 120), (chinese, 300)])
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_near_duplicates_against_brute_force(make, size, threshold):
    docs = corpus_with_copies(random.Random(2), make, 120, size)
    sets = [shingles(d) for d in docs]
    brute = {(i, j): s for i, j in combinations(range(len(docs)), 2) if (s := jaccard(sets[i], sets[j])) >= threshold}
    found = near_duplicates(docs, threshold)
    assert len(brute) > 10 and all(brute.get((i, j)) == s for i, j, s in found)  # nothing invented, true similarity
    assert len(found) >= 0.98 * len(brute)


def test_shingles_ignore_layout_and_work_in_chinese():
    assert np.array_equal(
        shingles("The relief valve, opens at 4 bar!" * 3), shingles("THE RELIEF\nVALVE opens   at 4 **bar**" * 3)
    )
    assert (
        jaccard(shingles(ZH), shingles(ZH.replace("，", " "))) == 1
        and containment(shingles(ZH[:40]), shingles(ZH)) == 1
    )
    assert (
        len(shingles("")) == 0
        and len(shingles("short")) == 1
        and near_duplicates(["", "", "..", "ab", "ab"]) == [(3, 4, 1.0)]
    )
    assert near_duplicates([]) == [] and near_duplicates(["one"]) == []
    with pytest.raises(InputError, match="threshold"):
        near_duplicates(["a"], 0)


def test_a_crowded_bucket_stays_linear():
    assert 19_000 < len(near_duplicates([english(random.Random(0), 60)] * 3000)) < 64 * 3000


def test_priority_and_order_do_not_matter():
    rng = random.Random(3)
    base = [english(rng, 100) for _ in range(8)]
    rows = [
        row(t, k, f"{k}/{i}.{e}")
        for i, t in enumerate(base)
        for k, e in (("web", "html"), ("book", "md"), ("standard", "pdf"), ("standard", "md"))
    ]
    rows += [row(base[0] + " " + base[1], "web", "web/long.html"), row(english(rng, 90), "news", "news/new.txt")]
    kept = []
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        ordered = sorted(rows, key=rank)
        away = {c["index"] for c in covered(ordered)}
        kept.append(sorted(r["id"] for i, r in enumerate(ordered) if i not in away))
    assert kept == [sorted([f"standard/{i}.md" for i in range(8)] + ["news/new.txt"])] * 4


def test_covered_names_the_parts_of_a_whole():
    rng = random.Random(4)
    parts = [english(rng, 150) for _ in range(12)]
    rows = sorted(
        [row(p, "standard", f"s/{i}.md") for i, p in enumerate(parts)]
        + [row("\n".join(parts) + english(rng, 100), "standard", "s/all.pdf")],
        key=rank,
    )
    (found,) = covered(rows)
    assert rows[found["index"]]["id"] == "s/all.pdf" and len(found["by"]) == 12 and 0.9 < found["share"] < 0.97
    assert near_duplicates([r["text"] for r in rows]) == []  # no pair is similar: only coverage sees it


def test_stock_phrases_do_not_add_up():
    rng = random.Random(5)
    phrases = [english(rng, 9) for _ in range(150)]
    rows = [row(" ".join(english(rng, 60) + " " + p for p in rng.sample(phrases, 3)), "book") for _ in range(400)]
    rows.append(row(" ".join(rng.sample(phrases, 40)), "web"))
    assert not [c for c in covered(rows) if c["index"] == 400]


def test_scaled_sketches(monkeypatch):
    docs = corpus_with_copies(random.Random(6), english, 40, 400)
    exact = {p[:2] for p in near_duplicates(docs, 0.6)}
    monkeypatch.setattr(dedup, "sample_scale", lambda texts: 4)
    assert len({p[:2] for p in near_duplicates(docs, 0.6)} ^ exact) <= 4


# ---- decontamination


def questions(rng, make, n, size):
    return [
        dict(
            question=make(rng, size) + "?", choices=[make(rng, 3) for _ in range(4)], answer=rng.randrange(4), group="g"
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    "make, size, doc", [(english, 9, 120), (english, 30, 120), (chinese, 14, 300), (chinese, 60, 300)]
)
def test_planted_leaks(make, size, doc):
    rng = random.Random(7)
    qs = questions(rng, make, 60, size)
    rows = [row(make(rng, doc) + "\n\n" + make(rng, doc)) for _ in range(150)]
    leaks = {}
    for i, q in enumerate(qs[:30]):
        quote = q["question"] if i % 3 else q["question"].replace("?", "") + " " + q["choices"][q["answer"]]
        rows[i]["text"] = rows[i]["text"].replace(
            "\n\n", f"\n\nSomebody asked: {quote.upper() if i % 2 else quote}\n\n"
        )
        leaks[rows[i]["id"]] = quote
    kept, dropped = decontaminate(rows, qs)
    assert (
        {d["id"] for d in dropped} == set(leaks)
        and {d["reason"] for d in dropped} == {"leak removed"}
        and len(kept) == 150
    )
    assert decontaminate(kept, qs)[1] == []
    clean_text = {r["id"]: r["text"] for r in kept}
    assert all(len(clean_text[r["id"]]) > 2 * doc and "asked" not in clean_text[r["id"]] for r in rows[:30])


def test_what_counts_as_a_leak():
    q = dict(question="Which colour does the lockout tag of the Swift 56 carry?", choices=["red", "blue"], answer=1)
    zh = dict(question="水闸安全阀门的压力不得超过多少巴", choices=["三", "四"], answer=1)

    def leak(text, *qs):
        return [d["reason"] for d in decontaminate([row(text)], qs)[1]]

    filler = english(random.Random(8), 60)
    assert leak("Which colour does the lockout tag of the Swift 56 carry?", q) == ["leak"]
    assert leak(
        f"{filler}\n\nQ: which colour does the LOCKOUT tag of the Swift 56 carry\nAnswer: blue\n\n{filler}", q
    ) == ["leak removed"]
    assert leak(f"{filler}\n\nThe lockout tag of the Swift 56 is blue.\n\n{filler}", q) == []  # a fact is no leak
    assert (
        leak(f"{ZH}\n\n问：水闸安全阀门的压力，不得超过多少巴？\n答：四\n\n{ZH * 3}", zh) == ["leak removed"]
        and leak(ZH * 3, zh) == []
    )
    assert leak("What is a valve?", "What is a valve?") == []  # five words or fewer say nothing
    kept, _ = decontaminate(
        [row(f"{filler}\n\nQ: which colour does the lockout tag of the Swift 56 carry\nAnswer: blue\n\n{filler}")], [q]
    )
    assert kept[0]["text"] == f"{filler}\n\n{filler}"
    many = [
        dict(
            question="Read the text about the old harbour and then choose the one best answer to this: "
            + english(random.Random(100 + i), 8)
            + "?"
        )
        for i in range(30)
    ]
    assert (
        leak("Read the text about the old harbour and then choose the one best answer to this: " + filler, *many) == []
    )  # a form of words
    with pytest.raises(InputError, match="has no text under"):
        decontaminate([row("x")], [dict(q="x")])


def test_no_false_positives():
    rng = random.Random(9)
    qs = questions(rng, english, 300, 12) + questions(rng, chinese, 300, 16)
    rows = [row(english(rng, 300)) for _ in range(300)] + [row(chinese(rng, 600)) for _ in range(300)]
    kept, dropped = decontaminate(rows, qs)
    assert dropped == [] and len(kept) == 600 and list(kept["text"]) == [r["text"] for r in rows]


# ---- questions in other words


def rewordings(seed, entities=20):
    "Questions (one wording per fact), pages that ask another wording and answer it, documents that only state facts."
    made, rng, wordings = make_world(seed, entities), random.Random(seed), {}
    for q in made["mcq"]:
        wordings.setdefault(q["fact"], []).append(q)
    leaks = {leak["id"] for leak in made["planted"]["leaks"]}
    asks = [
        w.split("?")[0].replace("{e}", "") for a in demo_strings()["attributes"].values() for w in a["web"] if "?" in w
    ]

    def itself(text):
        return any(all(part in text for part in w.split("  ")) for w in asks)

    stating = [d for d in made["documents"] if d["id"] not in leaks and not itself(d["text"])]
    pages = [
        row(
            f"{stating[i % len(stating)]['text'][:300]}\n\n"
            f"Quiz: {q['question']} It is {q['choices'][q['answer']]}, of course.\n",
            name=f"page-{i}",
        )
        for i, w in enumerate(wordings.values())
        for q in [rng.choice(w[1:])]
    ]
    return [w[0] for w in wordings.values()], pages, stating


@pytest.mark.parametrize("seed", [4, 5])
def test_reworded_questions_are_flagged_and_statements_are_not(seed):
    asked, pages, stating = rewordings(seed)
    assert decontaminate(pages, asked)[1] == []  # what n-grams cannot see
    found = paraphrases(pages + stating, asked)
    hit, true = {f["id"] for f in found}, {p["id"] for p in pages}
    assert len(hit & true) >= 0.95 * len(true) and len(hit & true) >= 0.95 * len(hit)
    assert [f["share"] for f in found] == sorted((f["share"] for f in found), reverse=True) and len(found) == len(hit)


def test_the_index_loses_nothing(monkeypatch):
    asked, pages, stating = rewordings(3)
    for share in (0.3, 0.6):
        quick = paraphrases(pages + stating, asked, share)
        with monkeypatch.context() as m:
            m.setattr(reworded, "_holders", lambda weights, share, having: set(range(len(pages + stating))))
            assert paraphrases(pages + stating, asked, share) == quick and quick


@pytest.mark.parametrize("seed", [4, 5])
def test_reworded_questions_in_conversations_are_flagged(seed):
    "The demo's conversations ask about every fact in words of their own, also without a question mark."
    asked, _, stating = rewordings(seed)
    talk = [
        dict(messages=r["messages"][:2])
        for r in make_world(seed, 20)["instructions"]
        if r["task"] == "domain_qa" and len(r["messages"]) == 8
    ]
    assert sum("?" not in r["messages"][0]["content"] for r in talk) > 20
    hit = {f["id"] for f in paraphrases(talk + stating, asked)}
    assert len(hit & set(range(len(talk)))) >= 0.95 * max(len(talk), len(hit))


def test_share_by_hand():
    q = dict(question="Which grease for the crane?", choices=["lard", "tallow"], answer=1)
    rows = [
        row("Grease on the crane? Tallow, he said."),
        row("The crane stands on the quay."),
        row("Tallow is a grease for the crane."),
    ]
    (got,) = paraphrases(rows, [q], share=0.2)

    def idf(having):
        return math.log(1 + 3 / (1 + having))

    want = (idf(2) + idf(3) + idf(3)) / (
        idf(0) + idf(2) + idf(1) + idf(3) + idf(3)
    )  # grease, crane, the; missing: which, for
    assert (
        got["id"] == rows[0]["id"]
        and got["share"] == round(want, 3)
        and got["excerpt"].startswith("Grease on the crane? Tallow")
    )
    assert paraphrases(rows, [q], share=want + 0.01) == []
    assert paraphrases([row("Grease on the crane? Lard, he said.")], [q], share=0.1) == []  # another answer
    assert paraphrases([], [q]) == []


def test_paraphrases_in_chinese():
    q = dict(question="水闸安全阀门的压力不得超过多少巴", choices=["三", "四", "五", "六"], answer=1)
    other = dict(question="检修工人每隔多少天检查一次泵站", choices=["十天", "三十天"], answer=1)
    rows = [
        row(f"{ZH * 2}\n\n考试时问：安全阀门的压力，水闸里最高可以是多少巴？答案是四。\n"),
        row(ZH * 3),
        row("今天天气怎么样？四月的天气很好。" * 5),
    ]
    assert decontaminate(rows, [q, other])[1] == []
    assert [f["id"] for f in paraphrases(rows, [q, other])] == [rows[0]["id"]]
    blank = row("水闸安全阀门的最高压力是（　）巴。A. 三 B. 四 C. 五 D. 六")
    assert [f["question"] for f in paraphrases([blank], [q])] == [q["question"]]


def test_paraphrases_need_an_answer():
    for bad in (
        "Which colour?",
        dict(question="Which colour?"),
        dict(question="Which colour?", choices=["red"]),
        dict(q="x"),
    ):
        with pytest.raises(InputError, match="has no right answer"):
            paraphrases([row("x")], [bad])
    with pytest.raises(InputError, match="neither 'text' nor 'messages'"):
        paraphrases([dict(id="x")], [dict(question="Which?", reference="x")])
    assert (
        paraphrases([dict(messages=[dict(role="user", content=None)])], [dict(question="Which?", reference="x")]) == []
    )
    with pytest.raises(InputError, match="share 2"):
        paraphrases([row("x")], [dict(question="Which?", reference="x")], share=2)


# ---- all rows of a training

GREASE = dict(question="Which grease is used for the big crane in the yard?", choices=["lard", "tallow"], answer=1)


def talk(*said, name="talk"):
    return dict(messages=[dict(role=role, content=text) for role, text in said], id=name, task="qa")


def test_copies_go_from_documents_and_conversations():
    rows = [
        row(
            "Long enough to stay. " * 12
            + "\n\nQuiz: which grease is used for the BIG crane in the yard? Tallow!\n\nThe end of it.",
            name="doc",
        ),
        row("Which grease is used for the big crane in the yard? tallow", name="quiz"),
        talk(
            ("system", "You are kind."),
            ("user", "Hello."),
            ("assistant", "Good day."),
            ("user", GREASE["question"]),
            ("assistant", "Tallow."),
            ("user", "Thanks."),
            ("assistant", "Welcome."),
            name="long talk",
        ),
        talk(("system", "You are kind."), ("user", GREASE["question"]), ("assistant", "Tallow."), name="short talk"),
        talk(("user", "Is it late?"), ("assistant", "It is."), name="clean talk"),
    ]
    kept, gone = without_leaks(rows, [GREASE])
    assert [(r["id"], r["task"] if "messages" in r else r["kind"]) for r in kept] == [
        ("doc", "web"),
        ("long talk", "qa"),
        ("clean talk", "qa"),
    ]
    assert "Quiz" not in kept[0]["text"] and kept[0]["text"].endswith("The end of it.")
    assert [m["content"] for m in kept[1]["messages"]] == [
        "You are kind.",
        "Hello.",
        "Good day.",
        "Thanks.",
        "Welcome.",
    ]
    assert kept[2] == rows[4] and len(rows[2]["messages"]) == 7  # what was given is left as it is
    assert {g["id"]: g["reason"] for g in gone} == {
        "doc": "leak removed",
        "quiz": "leak",
        "long talk": "leak removed",
        "short talk": "leak",
    }
    assert all(g["question"] == GREASE["question"] and "crane" in g["excerpt"] for g in gone)


def test_reworded_questions_go_from_documents_and_stay_in_conversations():
    asked, pages, stating = rewordings(4)
    talks = [
        talk(
            ("user", f"Tell me: {p['text'].split('Quiz: ')[1].split('?')[0]}."),
            ("assistant", p["text"].split("It is ")[1]),
            name=f"talk-{i}",
        )
        for i, p in enumerate(pages[:30])
    ]
    kept, gone = without_leaks([*talks, *pages, *stating], asked)
    out = {r["id"] for r in pages} - {r["id"] for r in kept if "text" in r and "Quiz:" in r["text"]}
    removed = [g for g in gone if g["reason"].startswith("reworded")]
    assert 0.7 * len(pages) < len(removed) == len(out) and {g["id"] for g in removed} == out
    assert [r for r in kept if "messages" in r] == talks
    suspects = [g for g in gone if g["reason"] == "suspected" and "talk-" in str(g["id"])]
    assert len(suspects) == 5 and suspects[0]["count"] >= 24
    kept, gone = without_leaks(pages, asked, sure=None)
    assert kept == pages and {g["reason"] for g in gone} == {"suspected"}


def test_leaks_of_rows_on_disk_are_those_of_rows_in_memory(tmp_path, monkeypatch):
    asked, pages, stating = rewordings(4)
    talks = [talk(("user", p["text"][:300]), ("assistant", p["text"][300:]), name=f"talk-{p['id']}") for p in pages]
    rows = [*pages[:20], *talks, *stating, *pages[20:]]
    rows.insert(7, row(f"{asked[0]['question']} {asked[0]['choices'][asked[0]['answer']]}", name="copy"))
    kept, gone = without_leaks(rows, asked)
    assert {g["reason"] for g in gone} >= {"leak", "suspected"} and any("reworded" in g["reason"] for g in gone)
    monkeypatch.setattr("domain_llm.data.rows.IN_MEMORY", 1000)
    monkeypatch.setattr("domain_llm.data.rows._scratch", lambda: tmp_path)
    monkeypatch.setattr("domain_llm.data.reworded._BLOCK", 3000)
    on_disk, found = without_leaks(iter(rows), asked)
    assert (list(on_disk), found) == (kept, gone) and len(on_disk) == len(kept)
    assert [*tmp_path.iterdir()] == [on_disk.path]  # what came between is gone
    remove_file(on_disk)
    assert not on_disk.path.exists()


def test_what_is_suspected_beside_a_paragraph_that_goes_is_reported():
    "One paragraph asks surely and goes; another place of the document has a share between the two, and stays."
    asked, pages, stating = rewordings(4)
    both = paraphrases(pages + stating, asked, 0.3)
    sure = next(f for f in both if f["share"] >= 0.6)
    weak = next(f for f in both if 0.3 <= f["share"] < 0.5)
    text = {row["id"]: row["text"] for row in [*pages, *stating]}
    joined = row(f"{text[sure['id']]}\n\n{text[weak['id']]}", name="joined")

    def suspects(rows):
        gone = without_leaks(rows, asked)[1]
        return gone, max((entry["count"] for entry in gone if entry["reason"] == "suspected"), default=0)

    gone, count = suspects([joined, *pages, *stating])
    assert [entry["reason"] for entry in gone if entry["id"] == "joined"][0] == "reworded, removed"
    assert count == suspects([*pages, *stating])[1] + 1


def test_a_full_disk_is_named(monkeypatch):
    import errno

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("domain_llm.data.rows.pickle.dump", full)
    with pytest.raises(InputError, match="No space left.*TMPDIR"):
        without_leaks([row("The crane stands in the yard. " * 10)], [GREASE])


def test_a_paragraph_that_asks_goes_with_its_answer():
    text = (
        "The crane stands in the yard. " * 10
        + "\n\nWhat grease does the big crane of the yard take?\n\nAnswer: tallow\n\nOf the end this is all."
    )
    kept, gone = without_leaks(
        [row(text, name="a"), *[row(f"Words about page {i} of it.") for i in range(20)]], [GREASE]
    )
    assert (
        "grease" not in kept[0]["text"]
        and "tallow" not in kept[0]["text"]
        and kept[0]["text"].endswith("Of the end this is all.")
        and gone[0]["reason"] == "reworded, removed"
    )


def test_leaks_need_sound_input():
    for rows, wrong in (([dict(id="x")], "neither 'text' nor 'messages'"), ([], "no text under")):
        with pytest.raises(InputError, match=wrong):
            without_leaks(rows, [dict(prompt="?")] if not rows else [GREASE])
    with pytest.raises(InputError, match="sure=2"):
        without_leaks([], [], sure=2)
    assert without_leaks([], [GREASE]) == ([], []) and without_leaks([row("a", name="a")], [], min_chars=1)[1] == []
    assert without_leaks([talk(("user", None), ("assistant", "x"))], [GREASE])[1] == []
    assert decontaminate([row("abc"), row("")], [GREASE])[1] == []  # shorter than what is looked up


def test_rows_and_a_thousand_questions_take_seconds():
    import time

    rng = random.Random(15)
    qs = questions(rng, english, 1000, 12)
    rows = [
        row(english(rng, 120) + (f"\n\n{qs[i % 1000]['question']} {qs[i % 1000]['choices'][0]}" if i % 10 == 0 else ""))
        for i in range(1200)
    ]
    rows += [talk(("user", english(rng, 15) + "?"), ("assistant", english(rng, 40)), name=str(i)) for i in range(800)]
    began = time.process_time()
    kept, gone = without_leaks(rows, qs)
    assert sum(g["reason"].startswith("leak") for g in gone) >= 118 and time.process_time() - began < 10


# ---- more than one machine


def test_stages_give_what_one_process_gives(tmp_path):
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    pytest.importorskip("orjson")
    from datatrove.executor import LocalPipelineExecutor

    rng = random.Random(13)
    qs = questions(rng, english, 20, 16)
    rows = [
        row(english(rng, 150) + (f"\n\n{qs[i]['question']}\n" if i < 20 else ""), name=f"d{i}") for i in range(40)
    ] + [row(chinese(rng, 300), name=f"z{i}") for i in range(20)]
    copies = [row(r["text"].upper() + " end", name=f"copy-{r['id']}") for r in (*rows[25:30], *rows[45:50])]
    rows += copies + [row("short", name="short"), row(qs[0]["question"], name="only a leak")]
    (tmp_path / "raw").mkdir()
    for k in range(2):
        (tmp_path / "raw" / f"{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[k::2]))
    for i, (pipeline, tasks) in enumerate(datatrove_stages(tmp_path / "raw", tmp_path / "out", 2, qs)):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(tmp_path / f"logs{i}")).run()

    def texts(name):
        files = (tmp_path / "out" / name).glob("*.gz")
        found = [json.loads(line) for file in files for line in gzip.open(file, "rt")]
        return {r["id"]: r["text"] for r in found}

    long = [{**r, "text": clean(r["text"])} for r in rows if len(clean(r["text"]).encode()) >= 200]
    assert texts("clean") == {r["id"]: r["text"] for r in decontaminate(long, qs)[0]}
    kept = set(texts("kept"))
    assert len(kept) == 60 and all(len(kept & {c["id"], c["id"].removeprefix("copy-")}) == 1 for c in copies)


KILLED = """
import json, os, signal, sys
from datatrove.executor import LocalPipelineExecutor
from domain_llm.data.scale import datatrove_stages

folder, out, dies = sys.argv[1], sys.argv[2], sys.argv[3] == "dies"

def killed(data, rank=0, world_size=1):
    for document in data:
        if rank == 1:
            os.killpg(os.getpgid(0), signal.SIGKILL)  # the workers and who started them
        yield document

for i, (pipeline, tasks) in enumerate(datatrove_stages(folder, out, 2)):
    steps = [*pipeline[:2], killed, *pipeline[2:]] if dies and i == 0 else pipeline
    LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=f"{out}/logs{i}").run()
"""


def test_stages_that_were_killed_lose_nothing(tmp_path):
    "The same command goes on: finished shards stay, the cut one is done again."
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    rng = random.Random(14)
    rows = [row(english(rng, 150), name=f"d{n}") for n in range(24)]
    rows += [row(r["text"].upper(), name=f"copy-{r['id']}") for r in rows[:6]]
    files(tmp_path, **{f"raw__{k}_jsonl": "".join(json.dumps(r) + "\n" for r in rows[k::2]) for k in range(2)})

    def run(out, how):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "raw"), str(tmp_path / out), how]
        return subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)

    def kept(out):
        lines = (line for file in (tmp_path / out / "kept").glob("*.gz") for line in gzip.open(file, "rt"))
        return sorted((r["id"], r["text"]) for r in map(json.loads, lines))

    assert run("cut", "dies").returncode == -9
    done = sorted(path.name for path in (tmp_path / "cut" / "logs0" / "completions").iterdir())
    assert done == ["00000"]
    again, whole = run("cut", "lives"), run("whole", "lives")
    assert again.returncode == whole.returncode == 0, again.stderr[-2000:]
    assert len(kept("whole")) == 24 and kept("cut") == kept("whole")
    assert "Skipping" in again.stderr or "already" in again.stderr  # the shard that was finished


def test_stages_without_datatrove(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.dedup", None)
    with pytest.raises(InputError, match="datatrove is missing"):
        datatrove_stages(tmp_path, tmp_path / "out", 1)


# ---- the benchmark's own truth


def test_planted_pairs_of_the_benchmark():
    path = Path(__file__).resolve().parents[1] / "tools" / "bench_dedup.py"
    spec = importlib.util.spec_from_file_location("bench_dedup", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    texts, planted = bench.corpus(1200)
    assert (
        len(texts) == 1200
        and len({i for p in planted.values() for pair in p for i in pair}) == 2 * sum(map(len, planted.values())) == 240
    )
    for level, spans in bench.similarity(texts, planted).items():
        low, high = zip(*spans.values())
        assert min(low) > 0.75 if level in bench.COPIES else max(high) < 0.6, (level, spans)
    assert bench.ours(texts) == {pair for level in bench.COPIES for pair in planted[level]}


# ---- everything together


def test_build_on_the_demo(tmp_path):
    for seed, entities in ((0, 20), (1, 40)):
        files = write_world(tmp_path / f"d{seed}", seed, entities)
        (Path(files["docs"]) / "web" / "broken.pdf").write_bytes(b"%PDF-1.4")
        truth = json.loads(Path(files["truth"]).read_text())
        made = build_corpus(files["docs"], make_world(seed, entities)["mcq"])
        report, short = made["report"], lambda f: f.removeprefix("docs/")
        copies, leaks = {short(b) for _, b in truth["duplicates"]}, {short(leak["file"]) for leak in truth["leaks"]}
        assert copies <= {c["id"] for c in report["covered"]}
        assert not {c["id"] for c in report["covered"]} & {d["source"] for d in made["rows"]}
        assert not [c for c in report["covered"] if c["id"].startswith(("standard", "book"))]
        hit = {leak["id"] for leak in report["leaks"]}
        assert len(hit & leaks) >= 0.95 * len(leaks - {c["id"] for c in report["covered"]}) and len(
            hit & leaks
        ) >= 0.95 * len(hit)
        text = corpus_report(report)
        assert "1 file skipped" in text and "broken PDF" in text and "leak" in text
        json.dumps(report)


def test_build_is_deterministic_and_counts_everything(tmp_path):
    rng = random.Random(10)
    (tmp_path / "web").mkdir()
    (tmp_path / "standard").mkdir()
    docs = [english(rng, 80) for _ in range(6)]
    for i, d in enumerate(docs):
        (tmp_path / "standard" / f"{i}.md").write_text(d)
    (tmp_path / "web/twin.html").write_text(f"<p>{docs[0].upper()}</p>")
    (tmp_path / "web/near.txt").write_text(docs[1] + " and a tail")
    (tmp_path / "web/short.txt").write_text("tiny")
    (tmp_path / "web/zh.txt").write_text(ZH + chinese(rng, 60))
    a, b = build_corpus(tmp_path), build_corpus(tmp_path)
    assert a["rows"].to_list() == b["rows"].to_list()
    assert a["report"]["dropped"] == {"too short": 1, "exact duplicate": 1, "near-duplicate": 1} and len(a["rows"]) == 7
    assert [s["documents"] for s in a["report"]["steps"]] == [10, 10, 9, 8, 7, 7] and a["report"]["examples"][
        "exact duplicate"
    ][0]["by"] == [("standard/0.md", 1.0)]
    assert all(s["documents"] == sum(k["documents"] for k in s["kinds"].values()) for s in a["report"]["steps"])
    with pytest.raises(InputError, match="no document is left: 10 too short"):
        build_corpus(tmp_path, min_chars=10**6)
    with pytest.raises(InputError, match="threshold"):
        build_corpus(tmp_path, threshold=2)


def test_a_corpus_on_disk_is_the_one_in_memory(tmp_path, monkeypatch):
    files = write_world(tmp_path / "world", 0, 20)
    questions = make_world(0, 20)["mcq"]
    memory = build_corpus(files["docs"], questions)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("domain_llm.data.rows.IN_MEMORY", 1000)
    monkeypatch.setattr("domain_llm.data.rows._scratch", lambda: scratch)
    disk = build_corpus(files["docs"], questions)
    assert not memory["rows"].cache_files
    (file,) = (Path(file["filename"]) for file in disk["rows"].cache_files)
    assert [*scratch.iterdir()] == [file]  # what came between is gone
    assert disk["rows"].to_list() == memory["rows"].to_list()
    assert disk["report"] | dict(seconds=None) == memory["report"] | dict(seconds=None)
    for ours, theirs in zip(hold_out(disk["rows"]), hold_out(memory["rows"].to_list())):
        assert ours.to_list() == theirs.to_list()


def test_sampled_shingles_drop_what_all_of_them_drop(monkeypatch):
    rng = random.Random(3)
    docs = [english(rng, 200) for _ in range(300)]
    rows = [row(text, name=f"d{n}") for n, text in enumerate(docs + [f"{text} and so on" for text in docs[:20]])]
    exact = covered(rows)
    monkeypatch.setattr(dedup, "sample_scale", lambda texts: 10)
    assert covered(as_dataset(rows)) == covered(rows) == exact and len(exact) == 20


def test_documents_on_disk_go_with_the_process():
    code = """
from domain_llm.data import rows as stored
stored.IN_MEMORY = 10
rows = [dict(text="a lock and a gate " * 9, source="x", kind="web", id=str(n), more=1) for n in range(300)]
found = stored.as_dataset(iter(rows))
assert found.to_list() == [{name: row[name] for name in ("text", "source", "kind", "id")} for row in rows]
import os, sys
if child := os.fork():
    os.waitpid(child, 0)
else:
    sys.exit()
assert os.path.exists(found.cache_files[0]["filename"])
print(found.cache_files[0]["filename"])"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert said.endswith(".arrow") and not Path(said).parent.exists()


def test_hold_out():
    rng = random.Random(11)
    rows = [
        row(english(rng, 20), k, f"{k}{i}") for k, n in (("standard", 40), ("web", 100), ("news", 1)) for i in range(n)
    ]
    train, held = hold_out(rows, 0.1, seed=1)
    ids = set(train["id"]), set(held["id"])
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {r["id"] for r in rows}
    assert [sum(r["kind"] == k for r in held) for k in ("standard", "web", "news")] == [4, 10, 0]
    assert set(hold_out(rows[::-1], 0.1, seed=1)[1]["id"]) == ids[1] != set(hold_out(rows, 0.1, seed=2)[1]["id"])
    assert len(hold_out(rows[:2])[1]) == 1 and len(hold_out([row("a", "web"), row("b", "news")])[1]) == 1
    for bad in (dict(share=0), dict(share=1)):
        with pytest.raises(InputError, match="share"):
            hold_out(rows, **bad)
    with pytest.raises(InputError, match="at least 2"):
        hold_out(rows[:1])


# ---- real data, where it is


@pytest.mark.skipif(not (SHARED / "security/standard").is_dir(), reason="needs shared/data")
def test_pdf_repeats_the_chapters():
    made = build_corpus(SHARED / "security/standard")
    (found,) = [c for c in made["report"]["covered"] if c["id"].endswith(".pdf")]
    assert found["share"] > 0.85 and len(found["by"]) >= 20 and len(made["report"]["covered"]) == 1


@pytest.mark.skipif(not (SHARED / "mcq/cmmlu").is_dir(), reason="needs shared/data")
def test_chinese_questions():
    qs = [
        dict(question=r["Question"], choices=[r[c] for c in "ABCD"], answer="ABCD".index(r["Answer"]))
        for f in sorted((SHARED / "mcq/cmmlu").glob("*_test.csv"))
        for r in csv.DictReader(open(f, encoding="utf-8-sig"))
    ]
    rng = random.Random(12)
    long = [q for q in qs if len(q["question"]) >= 14][:200]
    rows = [
        row(
            chinese(rng, 200)
            + "\n\n"
            + (f"考题：{q['question']}\n答案：{q['choices'][q['answer']]}" if i % 2 else chinese(rng, 60))
            + "\n\n"
            + chinese(rng, 200)
        )
        for i, q in enumerate(long)
    ]
    _, dropped = decontaminate(rows, qs)
    assert [d["id"] for d in dropped] == [r["id"] for r in rows[1::2]]
    if (f := SHARED / "general/alpaca_zh_demo.json").exists():
        general = [
            row(x["instruction"] + "\n" + x["output"], "general") for x in json.loads(f.read_text(encoding="utf-8"))
        ]
        assert len(decontaminate(general, qs)[1]) <= 2
        assert len(near_duplicates([r["text"] for r in general])) < 20


def mmlu():
    return [
        dict(question=r["question"], choices=[r[f"choice{i}"] for i in range(4)], answer=int(r["answer"]))
        for f in sorted((SHARED / "mcq/mmlu").glob("*_test.csv"))
        for r in csv.DictReader(open(f, encoding="utf-8-sig"))
    ]


def real_text():
    "C4 and Wikipedia pages, and the OWASP documents where they are."
    c4 = [json.loads(line)["text"] for line in open(SHARED / "general/c4_demo.jsonl", encoding="utf-8")]
    wiki = re.split(r"\n \n(?= = [^=])", (SHARED / "general/wikitext2_test.txt").read_text(encoding="utf-8"))
    return [
        row(t)
        for t in [
            *c4,
            *wiki,
            *(
                f.read_text(encoding="utf-8")
                for d in ("web", "book")
                for f in sorted((SHARED / "security" / d).glob("*.md"))
            ),
        ]
        if len(t) > 600
    ]


needs_mmlu = pytest.mark.skipif(
    not ((SHARED / "mcq/mmlu").is_dir() and (SHARED / "general").is_dir()), reason="needs shared/data"
)


@needs_mmlu
def test_real_questions_in_real_text():
    rng, qs = random.Random(14), mmlu()
    asked = rng.sample(
        [q for q in qs if len(units_of(q["question"])) >= 6], 200
    )  # shorter stems are no evidence, see the chapter
    change = [
        lambda q, a: q,
        lambda q, a: q.upper(),
        lambda q, a: re.sub(r"[,.;:?!'\"]", " ", q),
        lambda q, a: q.replace(" ", "\n", 3),
        lambda q, a: f"Question: {q}\nAnswer: {a}",
        lambda q, a: f"{q} {a}",
    ]
    rows = rng.sample(real_text(), 400)
    for i, q in enumerate(asked):
        lines = rows[i]["text"].split("\n")
        lines.insert(
            rng.randrange(len(lines) + 1), "\n" + change[i % 6](q["question"], q["choices"][q["answer"]]) + "\n"
        )
        rows[i] = {**rows[i], "text": "\n".join(lines)}
    planted, found = {r["id"] for r in rows[:200]}, {d["id"] for d in decontaminate(rows, qs)[1]}
    assert len(found & planted) >= 0.95 * len(planted) and len(found & planted) >= 0.95 * len(found)


@needs_mmlu
def test_paraphrases_are_quiet_on_real_text():
    rows = real_text()
    assert len(rows) > 300 and len(paraphrases(rows, mmlu())) <= 3


def test_a_question_in_a_pdf_of_prose_costs_its_paragraph_only():
    "Pages without blank lines: every line of the cleaned text is a paragraph, and only that of the leak goes."
    question = "Which hydraulic fluid must the keeper of the northern lock pour into the old sluice drive?"
    paragraph = "The crew walks the wall at dawn and writes down what the gauges say, one after the other, in ink."
    lines = [f"{paragraph} This is remark {n} of the log." for n in range(40)]
    lines[20] = f"{question} It is castor oil."
    row = dict(text="\n".join(lines), source="a.pdf", kind="book", id="book-0")
    kept, found = decontaminate([row], [dict(question=question, choices=["castor oil", "palm oil"], answer=0)])
    assert [f["reason"] for f in found] == ["leak removed"]
    assert kept[0]["text"] == "\n".join(lines[:20] + lines[21:])


@pytest.mark.parametrize("scale", [1, 200])
def test_a_footer_makes_no_duplicates_however_thin_the_sample(monkeypatch, scale):
    "3,000 short documents with nothing but a footer in common, and a copy of every hundredth with one word changed."
    rng = random.Random(4)
    footer = " Contact the sales department of the Northern Seal Company for prices, delivery and terms of payment."
    texts = [" ".join(english(rng, 60)) + footer for _ in range(3000)]
    copies = [text.replace(text.split()[30], "changed", 1) for text in texts[::100]]
    monkeypatch.setattr(dedup, "sample_scale", lambda texts: scale)
    rows = [row(text, "web") for text in texts + copies]
    dropped = {d["index"]: d["share"] for d in covered(rows)}
    assert not [i for i in dropped if i < len(texts)]
    assert len(dropped) >= (len(copies) if scale == 1 else 0.7 * len(copies))
    assert all(0.7 <= share < 1 for share in dropped.values())
    similar = near_duplicates(texts + copies)
    assert all(j == len(texts) + i // 100 for i, j, _ in similar)
