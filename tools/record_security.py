"""Run the security recipe on real documents and record its figures in nbs/results/security.json.

    python tools/record_security.py ../shared/data [--keep FOLDER]

The folder holds security/{standard,book,web} (OWASP, PDF and Markdown) and general/ (WikiText-2, C4).
nbs/recipes/security.yaml says what is done with them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import yaml

from domain_llm.core import read_json
from domain_llm.results import save_result
from domain_llm.run.pipeline import run_recipe

ROOT = Path(__file__).resolve().parent.parent


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("data", help="folder with security/ and general/")
    a.add_argument("--keep", help="folder of the run, kept afterwards")
    a = a.parse_args()
    data = Path(a.data).resolve()
    recipe = yaml.safe_load((ROOT / "nbs" / "recipes" / "security.yaml").read_text())
    recipe["data"] = {
        k: [str(data / p) for p in v] if isinstance(v, list) else str(data / v)
        for k, v in recipe["data"].items()
        if k != "ask"
    } | {"ask": recipe["data"]["ask"]}
    with tempfile.TemporaryDirectory() as d:
        path, start, out = Path(d) / "security.yaml", time.time(), Path(a.keep or Path(d) / "run")
        path.write_text(yaml.safe_dump(recipe))
        metrics = run_recipe(path, out)
        report = read_json(out / "corpus" / "report.json")
        pdf = [c for c in report["covered"] if c["id"].endswith(".pdf")]
        result = {
            **metrics,
            "seed": recipe.get("seed", 0),
            "corpus": {k: report[k] for k in ("steps", "dropped")},
            "pdf_covered": [{**c, "by": c["by"][:30]} for c in pdf],
            "stages": {
                m["stage"]: {k: m[k] for k in ("seconds", "peak_memory_gb", "metrics")}
                for p in sorted(out.glob("*/manifest.json"))
                for m in [read_json(p)]
            },
            "histories": {
                s: read_json(out / s / "history.json")
                for s in ("pretrain", "sft")
                if (out / s / "history.json").exists()
            },
        }
        print(save_result("security", result, started=start))


if __name__ == "__main__":
    main()
