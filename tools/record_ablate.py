"""Run a shipped experiment on a demo domain (nbs/recipes/ablate.yaml, or the recipe given) and record it in nbs/results/ablate_NAME.json.

    python tools/record_ablate.py mix [--seeds 3] [--tokens 30000] [--recipe nbs/recipes/select.yaml] [--data FOLDER]

The runs are kept in runs/ablate/NAME, so that calling it again goes on. With --data, the recipe's paths are in that folder and NAME is the recipe's.
"""
import argparse, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def in_folder(path, folder):
    "A copy of the recipe whose data lie in `folder`."
    import yaml
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"] = {k: [str(Path(folder).resolve() / p) for p in paths] for k, paths in recipe["data"].items()}
    copy = Path(tempfile.mkdtemp()) / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return copy


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("experiment")
    a.add_argument("--seeds", type=int, default=3)
    a.add_argument("--tokens", type=int)
    a.add_argument("--recipe", type=Path, default=ROOT / "nbs" / "recipes" / "ablate.yaml")
    a.add_argument("--data", help="folder that the paths of the recipe's data are relative to")
    a = a.parse_args()
    from domain_llm.core import results_dir, write_json
    from domain_llm.experiments import ablation, told
    name = a.recipe.stem if a.data else a.experiment
    result = ablation(a.experiment, in_folder(a.recipe, a.data) if a.data else a.recipe, seeds=a.seeds, tokens=a.tokens, output=ROOT / "runs" / "ablate" / name)
    print(told(result))
    path = results_dir() / f"ablate_{name}.json"
    write_json(path, {k: v for k, v in result.items() if k != "folder"})
    print(path)


if __name__ == "__main__": main()
