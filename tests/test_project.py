"""The checkout as a whole: exports in sync, README current, notebooks clean, every notebook runs."""
import ast, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    "In a process of its own, with a time limit, slow and cuda cells left out."
    env = {**os.environ, "MPLBACKEND": "agg"}
    p = subprocess.run(["nbdev_test", "--path", str(path), "--n_workers", "0", "--do_print"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, (p.stdout + p.stderr)[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = nbformat.read(path, 4)
    assert "widgets" not in nb.metadata
    text = json.dumps([c.get("outputs", []) for c in nb.cells])
    assert '"output_type": "error"' not in text
    assert not re.search(r"(/home/|/root/|/work/|/Users/|/tmp/)", text), "a path of a machine in the outputs"
    unrun = [c.source[:60] for c in nb.cells if c.cell_type == "code" and not re.search(r"^#\|\s*(slow|cuda)", c.source, re.M) and re.search(r"\bprint\(", c.source) and "def " not in c.source and not c.outputs]
    assert not unrun, f"cells that print but carry no output: {unrun}"


def test_exports_are_in_sync(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv*"))
    subprocess.run(["nbdev_export"], cwd=copy, check=True, capture_output=True)
    for p in sorted((ROOT / "domain_llm").glob("*.py")): assert p.read_text() == (copy / "domain_llm" / p.name).read_text(), f"{p.name} differs from its notebook: run nbdev_export"


def test_readme_is_current():
    assert subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"]).returncode == 0, "run: python tools/readme.py"


def test_help_is_fast():
    best = min(_seconds(["domain-llm", "--help"]) for _ in range(3))
    assert best < 0.5


def _seconds(command):
    start = time.time()
    subprocess.run(command, check=True, capture_output=True)
    return time.time() - start


def test_modules_import_nothing_heavy():
    code = "import sys, importlib, pkgutil, domain_llm\nfor m in pkgutil.iter_modules(domain_llm.__path__): importlib.import_module('domain_llm.' + m.name)\nprint([m for m in ('torch', 'transformers', 'datasets', 'trl', 'scipy', 'matplotlib', 'xllamacpp') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def imports(path):
    "The modules of the package that a module imports anywhere, also inside functions, however it says so."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("domain_llm.")}
        if isinstance(node, ast.ImportFrom):
            whole = ("." if node.level else "") + (node.module or "")
            if whole in (".", "domain_llm"):
                found |= {alias.name for alias in node.names}
            elif whole.startswith((".", "domain_llm.")):
                found.add(whole.removeprefix("domain_llm").lstrip(".").split(".")[0])
    return found


def test_imports_are_seen_in_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from . import a, b as c\nfrom .d import e\nimport domain_llm.f\nfrom domain_llm import g\ndef h():\n    from domain_llm.i import j\nimport json\n")
    assert imports(path) == {"a", "b", "d", "f", "g", "i"}


def test_modules_depend_downwards_only():
    "As CONTRIBUTING draws them: a module imports from its own line and the lines below."
    drawn = re.search(r"## Layers\n\n((?:    .+\n)+)", (ROOT / "CONTRIBUTING.md").read_text())[1]
    layers = [line.strip().split(", ") for line in reversed(drawn.splitlines())]
    level = {module: i for i, names in enumerate(layers) for module in names}
    modules = {p.stem: p for p in (ROOT / "domain_llm").glob("*.py") if not p.stem.startswith("_")}
    assert set(level) == set(modules)
    for name, path in modules.items():
        for used in imports(path) - {"__version__"}:
            assert level[used] <= level[name], f"{name} imports {used} from a layer above"
