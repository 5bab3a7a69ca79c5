"""The checkout as a whole: what tools make is current; notebooks are clean and run; layers and style hold."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from colab import CELL_ID

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.name[0] in "123456"]
PLACES = ("nbs", "tests", "tools", "setup.py")
IN_ORDER = "one story of a run or a folder, told in order"
LAZY = "a class inside a function, so that its library is imported only when it is needed"
LONG_FUNCTIONS = {
    "domain_llm/train/trainer.py: trainer_class": LAZY,
    "tools/bench_evaluate.py: lm_eval_run": LAZY,
    "tests/test_recipe.py: test_the_trained_model_is_saved_before_it_is_interpolated": IN_ORDER,
    "tests/test_recipe.py: test_exam_questions_are_taken_out_of_everything_that_is_trained_on": IN_ORDER,
    "tests/test_corpus.py: test_every_format_and_kind": IN_ORDER,
    "tests/test_corpus.py: test_copies_go_from_documents_and_conversations": IN_ORDER,
}


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in one process")
def test_a_worker_computes_as_the_processes_that_it_starts():
    "Sums over more threads round otherwise, and more threads than cores are slow."
    import torch

    given = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"], stdout=subprocess.PIPE
    )
    assert torch.get_num_threads() == int(given.stdout)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, runs, tmp_path):
    "In a process of its own, with a time limit, slow and cuda cells left out."
    folder = tmp_path / "files"
    assert runs.notebook(path, folder, seconds=1500) == "exit 0", Path(f"{folder}.log").read_text()[-4000:]


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


@pytest.mark.parametrize("tool", ["readme", "colab", "build_site", "chapter_times"])
def test_what_a_tool_makes_is_current(tool):
    "README.md; the Colab badge and install cell; the links that the site would have; the reading times of chapters."
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"tools/{tool}.py: {done.stdout}{done.stderr}"


def test_help_is_fast(tmp_path):
    "Half a second of a processor, or on a slow machine less than four times what importing its libraries takes."
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}  # compiled once, as pip compiles what it installs
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    best = min(_seconds(["domain-llm", "--help"], env) for _ in range(4))
    libraries = [sys.executable, "-c", "import numpy, pydantic, yaml"]
    assert best < 0.5 or best < 4 * min(_seconds(libraries, env) for _ in range(3))


def _seconds(command, env):
    "Processor time of a command, which other work on the machine lengthens less than the time on the clock."
    before = os.times()
    subprocess.run(command, env=env, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


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
    "The modules of the package that a module imports, anywhere in it, and the names that it takes from them."
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


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run(["ruff", *command.split(), *PLACES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run: make format\n{done.stdout[-4000:]}{done.stderr}"


def scripts():
    "The Python files of tests and tools."
    return sorted((ROOT / "tests").glob("*.py")) + sorted((ROOT / "tools").glob("*.py")) + [ROOT / "setup.py"]


def pieces():
    "Everything written by hand in Python, as (place, lines): a cell of a notebook, or a file of tests or tools."
    for path in NOTEBOOKS:
        if path.stem.endswith("_zh"):  # has the code of the chapter that it translates
            continue
        for i, cell in enumerate(nbformat.read(path, 4).cells):
            if cell.cell_type == "code" and cell.get("id") != CELL_ID:
                yield f"nbs/{path.name}, cell {i}", cell.source.splitlines()
    for path in scripts():
        yield str(path.relative_to(ROOT)), path.read_text().splitlines()


def test_lines_have_at_most_120_columns():
    long = [
        f"{place}, line {number}: {len(line)}"
        for place, lines in pieces()
        for number, line in enumerate(lines, 1)
        if len(line) > 120
    ]
    assert not long, f"{len(long)} lines are too long:\n" + "\n".join(long)


def test_modules_have_fewer_than_400_lines():
    paths = [*modules().values(), *(path for path in scripts() if path.parent.name == "tools")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    long = {name: lines for name, lines in lengths.items() if lines >= 400}
    assert not long, long


def test_functions_have_at_most_40_lines_or_a_reason():
    long = {}
    for path in [*modules().values(), *scripts()]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > 40:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    without_reason = {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS}
    assert not without_reason, without_reason
    assert not LONG_FUNCTIONS.keys() - long.keys(), "these are short by now: take them out of the table"


def logical_lines(lines):
    "The lines that can be a repetition, as (number, text): white space folded; no imports, comments or lone brackets."
    found = []
    for number, line in enumerate(lines, 1):
        text = " ".join(line.split())
        if re.search(r"\w", text) and not re.match(r"(from|import|#)\b|#", text):
            found.append((number, text))
    return found


def repeated_blocks(
    pieces,  # pairs of a place and its lines
    size=6,  # lines of the shortest block that counts
):
    "Blocks of lines that stand twice, as 'place:line ~ place:line'; of a longer repetition its first lines only."
    seen = {}
    found = []
    for place, lines in pieces:
        written = logical_lines(lines)
        free = 0
        for i in range(len(written) - size + 1):
            block = tuple(text for _, text in written[i : i + size])
            here = (place, written[i][0])
            first, position = seen.setdefault(block, (here, i))
            if first == here or (first[0] == place and position + size > i):
                continue
            if i >= free:
                found.append(f"{first[0]}:{first[1]} ~ {place}:{here[1]}")
            free = i + size
    return found


def test_a_repeated_block_is_found():
    block = [f"    step_{i}()" for i in range(6)]
    other = ["", *block[:3], "", "# again", *block[3:], "}"]
    assert repeated_blocks([("a", ["x = 1", *block]), ("b", other)]) == ["a:2 ~ b:2"]
    assert repeated_blocks([("a", block + ["y = 1"] + block)]) == ["a:1 ~ a:8"]
    assert not repeated_blocks([("a", block[:5]), ("b", block[:5])])
    assert not repeated_blocks([("a", ["import os"] * 9), ("b", ["import os"] * 9), ("c", ["a = 1"] * 7)])


def test_no_block_of_six_lines_stands_twice():
    found = repeated_blocks(pieces())
    assert not found, f"{len(found)} blocks stand twice:\n" + "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_begins_with_title_and_subtitle(path):
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n\n?> \S", first.source), "the first cell begins with '# Title' and '> subtitle'"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_ends_with_summary_and_exercises(path):
    "At least three exercises, each with a solution that unfolds."
    text = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    assert re.search(r"^## Summary", text, re.M), "no '## Summary'"
    parts = re.split(r"^## Exercises", text, flags=re.M)
    assert len(parts) == 2, "one part '## Exercises'"
    assert parts[1].count("<details") >= 3, "fewer than three exercises with a solution in <details>"


COURSE = [path for path in NOTEBOOKS if path.name[0] in "0123456" and not path.stem.endswith("_zh")]


@pytest.mark.parametrize("path", COURSE, ids=lambda p: p.stem)
def test_chapter_says_what_it_costs_and_grades_its_exercises(path):
    "The time of a run near the beginning; each exercise is easy, real or open, and they are counted from 1."
    text = "\n\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    cost = re.search(r"^\*\*Cost to run:\*\*.*", text, re.M)
    assert cost and re.search(r"second|minute", cost[0]), "no '**Cost to run:** about N seconds ...'"
    exercises = re.sub(r"<details>.*?</details>", "", text.split("## Exercises")[1], flags=re.S)
    graded = re.findall(r"^\*\*(\d+)\. (?:Easy|Real|Open)\.\*\* ", exercises, re.M)
    assert [int(number) for number in graded] == [*range(1, len(graded) + 1)] and len(graded) >= 3
    assert not re.search(r"^\d+\. |^\*\*\d+\.\*\*", exercises, re.M), "an exercise without '**1. Easy.**' or so"
