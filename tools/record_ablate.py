"""Run an experiment on a demo domain (nbs/recipes/ablate.yaml, or the recipe given) and record it.

The record is nbs/results/ablate_NAME.json; the experiment is one of the package's, or a YAML file.

    python tools/record_ablate.py mix [--seeds 3] [--tokens 30000] [--recipe nbs/recipes/select.yaml] [--data FOLDER]
    python tools/record_ablate.py my-experiment.yaml --plan
    python tools/record_ablate.py --again nbs/results/ablate_*.json

The runs are kept in runs/ablate/NAME, so that calling it again resumes. With --data, the recipe's paths are in that
folder and NAME is the recipe's. With --plan nothing is trained: the plan is printed.
With --again nothing is trained: the verdicts of recorded files are computed again from their runs, by today's rules.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

from domain_llm.core import read_json, write_json
from domain_llm.judge.ablate import verdict
from domain_llm.results import results_dir
from domain_llm.run.experiments import ablation, planned_ablation, told

ROOT = Path(__file__).resolve().parent.parent
STATED = (
    "text",
    "metric",
    "arm",
    "base",
    "more",
    "margin",
    "matters",
    "control",
)  # what a claim says before the experiment
FACT = re.compile(r"F(\d{5})")
FACTS_OF_A_MACHINE = 4  # of the demo, whose facts are numbered machine by machine


def by_machine(metrics):
    "The metrics of a run; questions on the demo's facts are grouped by machine, whose documents state its four facts."

    def machine(group):
        number = FACT.fullmatch(str(group))
        return f"machine {int(number[1]) // FACTS_OF_A_MACHINE}" if number else group

    return {
        name: dict(m, groups=[machine(g) for g in m["groups"]]) if m.get("groups") else m for name, m in metrics.items()
    }


def again(path):
    "Compute the verdicts of a recorded experiment again and write them into its file, with the day."
    result = read_json(path)
    result["before"] = by_machine(result["before"])
    result["runs"] = {arm: {seed: by_machine(m) for seed, m in seeds.items()} for arm, seeds in result["runs"].items()}
    stated = [{k: c[k] for k in STATED if k in c} for c in result["claims"]]
    result["claims"] = verdict(result["runs"], stated)
    result["recomputed"] = dict(
        date=time.strftime("%Y-%m-%d"),
        what="claims, from the recorded runs; questions on the demo's facts grouped by machine",
    )
    write_json(path, result)
    return result


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
    a.add_argument("experiment", nargs="?", help="name or YAML file of the experiment to run")
    a.add_argument("--plan", action="store_true", help="print what it will cost and tell, and train nothing")
    a.add_argument(
        "--again",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="recorded experiments whose verdicts are computed again, without training",
    )
    a.add_argument("--seeds", type=int)
    a.add_argument("--tokens", type=int)
    a.add_argument("--recipe", type=Path, default=ROOT / "nbs" / "recipes" / "ablate.yaml")
    a.add_argument("--data", help="folder that the paths of the recipe's data are relative to")
    a = a.parse_args()
    if a.again:
        for path in a.again:
            print(path, *[f"{c['verdict']}: {c['text']}" for c in again(path)["claims"]], sep="\n  ")
        return
    if not a.experiment:
        raise SystemExit("name an experiment, or recorded files with --again.")
    name = a.recipe.stem if a.data else Path(a.experiment).stem
    recipe = in_folder(a.recipe, a.data) if a.data else a.recipe
    size = dict(seeds=a.seeds, tokens=a.tokens, output=ROOT / "runs" / "ablate" / name)
    if a.plan:
        print(planned_ablation(a.experiment, recipe, **size))
        return
    result = ablation(a.experiment, recipe, **size)
    print(told(result))
    path = results_dir() / f"ablate_{name}.json"
    write_json(path, {k: v for k, v in result.items() if k != "folder"})
    print(path)


if __name__ == "__main__":
    main()
