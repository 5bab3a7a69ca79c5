"""The checkout as a whole: exports in sync, README current, notebooks clean, every notebook runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    "In a process of its own, with a time limit, slow and cuda cells left out."
    env = {**os.environ, "MPLBACKEND": "agg"}
    p = subprocess.run(
        ["nbdev_test", "--path", str(path), "--n_workers", "0", "--do_print"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert p.returncode == 0, (p.stdout + p.stderr)[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = nbformat.read(path, 4)
    assert "widgets" not in nb.metadata
    text = json.dumps([c.get("outputs", []) for c in nb.cells])
    assert '"output_type": "error"' not in text
    assert not re.search(r"(/home/|/root/|/work/|/Users/|/tmp/)", text), "a path of a machine in the outputs"
    unrun = [
        c.source[:60]
        for c in nb.cells
        if c.cell_type == "code"
        and not re.search(r"^#\|\s*(slow|cuda)", c.source, re.M)
        and re.search(r"\bprint\(", c.source)
        and "def " not in c.source
        and not c.outputs
    ]
    assert not unrun, f"cells that print but carry no output: {unrun}"


def test_exports_are_in_sync(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv*"))
    shutil.rmtree(copy / "domain_llm")
    shutil.copytree(ROOT / "domain_llm" / "assets", copy / "domain_llm" / "assets")
    shutil.copy(ROOT / "domain_llm" / "__init__.py", copy / "domain_llm")
    subprocess.run(["nbdev_export"], cwd=copy, check=True, capture_output=True)
    ours, exported = (
        {str(p.relative_to(root)): p.read_text() for p in (root / "domain_llm").rglob("*.py")} for root in (ROOT, copy)
    )
    differing = {name for name in ours.keys() | exported.keys() if ours.get(name) != exported.get(name)}
    assert not differing, "these differ from their notebooks: run nbdev_export"


def test_readme_is_current():
    assert subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"]).returncode == 0, (
        "run: python tools/readme.py"
    )


def test_help_is_fast():
    best = min(_seconds(["domain-llm", "--help"]) for _ in range(3))
    assert best < 0.5


def _seconds(command):
    start = time.time()
    subprocess.run(command, check=True, capture_output=True)
    return time.time() - start


def test_modules_import_nothing_heavy():
    code = (
        "import sys, importlib, pkgutil, domain_llm\n"
        "for m in pkgutil.walk_packages(domain_llm.__path__, 'domain_llm.'): importlib.import_module(m.name)\n"
        "heavy = ('torch', 'transformers', 'datasets', 'trl', 'scipy', 'matplotlib', 'xllamacpp')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def modules():
    "The package's modules by name, such as data.read."
    package = ROOT / "domain_llm"
    paths = [p for p in package.rglob("*.py") if not p.stem.startswith("_")]
    return {".".join(p.relative_to(package).with_suffix("").parts): p for p in paths}


def imports(name, text, known):
    "The modules of the package that a module imports, at its top or inside a function, and the names that it takes from them."
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            around = ["domain_llm", *name.split(".")]
            room = ".".join(around[: -node.level]) + "." if node.level else ""
            wanted = [((room + (node.module or "")).rstrip("."), alias.name) for alias in node.names]
        else:
            continue
        for module, part in wanted:
            module = module.removeprefix("domain_llm").lstrip(".")
            whole = f"{module}.{part}".lstrip(".")
            if whole in known:
                found.setdefault(whole, set())
            elif module in known:
                found.setdefault(module, set()).update([part] if part else [])
    return found


def test_imports_are_seen_in_every_form():
    text = """
from . import b as c
from .d import e
from ..core import f, _g
import domain_llm.judge.h
def i():
    from domain_llm.data import j
import json
"""
    known = {"run.b", "run.d", "core", "judge.h", "data.j"}
    assert imports("run.a", text, known) == {
        "run.b": set(),
        "run.d": {"e"},
        "core": {"f", "_g"},
        "judge.h": set(),
        "data.j": set(),
    }


def graph():
    "For each module the modules that it imports, with the names."
    all_of_them = modules()
    return {name: imports(name, path.read_text(), all_of_them) for name, path in all_of_them.items()}


def test_modules_depend_downwards_only():
    "As CONTRIBUTING draws the rooms: a module imports from its own room and from the lines below."
    drawn = re.search(r"## Rooms\n\n((?:    .+\n)+)", (ROOT / "CONTRIBUTING.md").read_text())[1]
    lines = [re.split(r"\s{2,}", line.strip())[0].split(", ") for line in reversed(drawn.splitlines())]
    level = {room: i for i, rooms in enumerate(lines) for room in rooms}
    for name, used in graph().items():
        room = name.split(".")[0]
        for other in used:
            below = other.split(".")[0]
            assert below == room or level[below] < level[room] or "." not in name + other, f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    left = {name: set(used) for name, used in graph().items()}
    while left:
        free = [name for name, used in left.items() if not used & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_no_module_uses_private_names_of_another():
    for name, used in graph().items():
        private = [part for parts in used.values() for part in parts if part.startswith("_")]
        assert not private, f"{name} imports {private}"
        brought = {module.split(".")[-1] for module, parts in used.items() if not parts}
        for node in ast.walk(ast.parse(modules()[name].read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in brought:
                assert not node.attr.startswith("_"), f"{name} uses {node.value.id}.{node.attr}"
