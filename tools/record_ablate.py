"""Run a shipped experiment on a demo domain (nbs/recipes/ablate.yaml, or the recipe given) and record it in nbs/results/ablate_NAME.json.

    python tools/record_ablate.py mix [--seeds 3] [--tokens 30000] [--recipe nbs/recipes/select.yaml] [--general TEXTS]

The runs are kept in runs/ablate/NAME, so that calling it again goes on.
"""
import argparse, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_general(path, texts):
    "A copy of the recipe with `texts` (files or folders) as its general text."
    import yaml
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    recipe.setdefault("data", {})["general"] = [str(Path(t).resolve()) for t in texts]
    copy = Path(tempfile.mkdtemp()) / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return copy


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("experiment")
    a.add_argument("--seeds", type=int, default=3)
    a.add_argument("--tokens", type=int)
    a.add_argument("--recipe", type=Path, default=ROOT / "nbs" / "recipes" / "ablate.yaml")
    a.add_argument("--general", nargs="+", help="general text to replay, instead of the recipe's")
    a = a.parse_args()
    from domain_llm.core import save_result
    from domain_llm.experiments import ablation, told
    start = time.time()
    recipe = with_general(a.recipe, a.general) if a.general else a.recipe
    result = ablation(a.experiment, recipe, seeds=a.seeds, tokens=a.tokens, output=ROOT / "runs" / "ablate" / a.experiment)
    print(told(result))
    print(save_result(f"ablate_{a.experiment}", {k: v for k, v in result.items() if k != "folder"}, started=start))


if __name__ == "__main__": main()
