"""The contributors' commands: the Colab cells and the links of the site."""

import sys

import build_site
import colab
import nbformat
import pytest
import record_format
import torch

from domain_llm.devices import half_dtype

# For each instruction of the format recording one answer that does it and one that does not.
DONE = [
    ("The sea is salty. It", "The sea is salty. It is deep, about 3.7 km."),
    ("Bread is baked. We eat it.", "Bread is baked."),
    ("word " * 31, "word " * 30),
    ("Is the sea deep?", "Is the sea deep? It is."),
    ("Today it rains.", "It rains today."),
    ("The River is wide.", "The sea is wide."),
    ("I know much about rain.", "I know nothing about rain."),
    ("Once upon a time it rained.", "It was once upon a time."),
    ("Dear Ann,\nit rains.", "It rains, dear Ann."),
    ("a\nb\nc\nd", "a\nb\nc"),
    ("1. Wet.\n2) Cold.\n3: Deep.", "1. Wet.\n2. Cold."),
    ("salt, wind, ship", "salt, wind"),
]


def notebook(first):
    cells = [nbformat.v4.new_markdown_cell(first), nbformat.v4.new_code_cell("#| default_exp a")]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.parametrize(
    "text",
    [
        "# Clean",
        "# Clean\n\n> What a page is made of.",
        "# Clean\n> What a page\n> is made of.\n\n\nThen this.\n\nAnd that.",
    ],
)
def test_badge_and_install_cell_are_put_once(text):
    nb = notebook(text)
    assert colab.renew(nb, "20_data.clean.ipynb")
    written = nbformat.writes(nb)
    assert not colab.renew(nb, "20_data.clean.ipynb")
    assert nbformat.writes(nb) == written
    first, install, last = nb.cells
    assert install.id == colab.CELL_ID and last.source == "#| default_exp a"
    assert [line for line in first.source.splitlines() if line and "[![" not in line] == [
        line for line in text.splitlines() if line
    ]
    head = first.source.split("[![")[0]
    assert "Then" not in head and ("made of" in head) == ("made of" in text)
    assert first.source.count("/blob/main/nbs/20_data.clean.ipynb)") == 1


def test_badge_of_an_old_name_and_place_is_replaced():
    nb = notebook(f"# Clean\n\nText.\n\n{colab.badge('03_corpus.ipynb')}\n\n> no subtitle, a quotation")
    colab.renew(nb, "20_data.clean.ipynb")
    expected = f"# Clean\n\n{colab.badge('20_data.clean.ipynb')}\n\nText.\n\n> no subtitle, a quotation"
    assert nb.cells[0].source == expected


def test_notebook_without_title_is_refused():
    with pytest.raises(SystemExit, match="x.ipynb: the first cell must be"):
        colab.renew(notebook("Clean"), "x.ipynb")


def test_install_cell_does_nothing_elsewhere(tmp_path, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    shell = InteractiveShell()
    done = shell.run_cell(colab.install_cell().source)
    assert done.success and sys.path == before and not list(tmp_path.iterdir())
    assert "Path" not in shell.user_ns and "sys" not in shell.user_ns


def test_cleaning_keeps_what_hides_the_install_cell():
    assert colab.settings()["allowed_cell_metadata_keys"].split() == list(colab.CELL_METADATA)


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_without_bfloat16_gets_float32(major, expected, monkeypatch):
    "A T4, which Colab lends, has compute capability 7.5 and emulates bfloat16; an A100 has 8.0."
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Gpu", (), dict(major=major)))
    assert half_dtype("cuda") == expected


@pytest.fixture
def links(tmp_path, monkeypatch):
    "The links of a chapter in a small repository."
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    monkeypatch.setattr(build_site, "SOURCE", tmp_path / "_docs")
    for name in ("nbs/index.ipynb", "nbs/20_data.clean.ipynb", "nbs/images/a.png", "tools/readme.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return build_site.Links("nbs/20_data.clean.ipynb")


GITHUB = "https://github.com/domain-llm/domain_llm/blob/main"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see [it](20_data.clean.ipynb#Web-Pages).", "see [it](20_data.clean.ipynb#web-pages)."),
        ("[start](../README.md)", "[start](index.ipynb)"),
        (f"[x]({GITHUB}/nbs/20_data.clean.ipynb)", "[x](20_data.clean.ipynb)"),
        ('[tool](../tools/readme.py "a tool")', f'[tool]({GITHUB}/tools/readme.py "a tool")'),
        ("[tools](../tools)", f"[tools]({GITHUB.replace('blob', 'tree')}/tools)"),
        ("![a [b] c](images/a.png)", "![a [b] c](pictures/nbs/images/a.png)"),
        ('<a href="20_data.clean.ipynb">x</a>', '<a href="20_data.clean.html">x</a>'),
        ("[out](https://example.org/a.ipynb) [here](#there)", "[out](https://example.org/a.ipynb) [here](#there)"),
        ("`[code](none)` and\n\n```python\na[0](none)\n```", "`[code](none)` and\n\n```python\na[0](none)\n```"),
        (
            '```mermaid\nflowchart LR\n  a --> b\n  click a "20_data.clean.ipynb"\n```',
            '```mermaid\nflowchart LR\n  a --> b\n  click a "20_data.clean.html"\n```',
        ),
    ],
)
def test_links_lead_to_pages_and_github(links, text, expected):
    assert links.rewrite(text) == expected
    assert not links.broken


@pytest.mark.parametrize(
    "target", ["03_corpus.ipynb", "../../etc/passwd", f"{GITHUB}/nbs/03_corpus.ipynb", "README.md", "images/b.png"]
)
def test_links_that_lead_nowhere_are_named(links, target):
    links.rewrite(f"[x]({target})")
    assert links.broken == [f"nbs/20_data.clean.ipynb: {target}"]


def test_ids_and_targets_of_a_page():
    page = build_site.Page('<a href="b.html#c"><img src="d.png"></a><h2 id="e"></h2>\nimport m from "./_static/m.mjs";')
    assert page.targets == {"b.html#c", "d.png", "./_static/m.mjs"}
    assert "e" in page.ids


def test_checkable_instructions_are_checked():
    assert len(record_format.TOLD) == len(DONE)
    for (told, check), (done, missed) in zip(record_format.TOLD.items(), DONE):
        assert check(done) and not check(missed), told


def test_format_recording_renders_all_formats(tok):
    turns = [dict(role="user", content="Q"), dict(role="assistant", content="A")]
    shown = {
        name: record_format.render(turns, record_format.in_format(tok, name), "a test") for name in record_format.TUNED
    }
    assert shown["own"].endswith(shown["no system prompt"]) and shown["own"].startswith("<|im_start|>system\n")
    assert shown["no system prompt"] == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert shown["foreign"] == "### Question:\nQ\n\n### Answer:\nA<|im_end|>\n"
    assert shown["plain"] == "Q\nA<|im_end|>\n"
