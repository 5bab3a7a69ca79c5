"""Run a shipped experiment on a small demo domain (nbs/recipes/ablate.yaml) and record it in nbs/results/ablate_NAME.json.

    python tools/record_ablate.py mix [--seeds 3] [--tokens 30000]

The runs are kept in runs/ablate/NAME, so that calling it again goes on.
"""
import argparse, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("experiment")
    a.add_argument("--seeds", type=int, default=3)
    a.add_argument("--tokens", type=int)
    a = a.parse_args()
    from domain_llm.core import save_result
    from domain_llm.experiments import ablation, told
    start = time.time()
    result = ablation(a.experiment, ROOT / "nbs" / "recipes" / "ablate.yaml", seeds=a.seeds, tokens=a.tokens, output=ROOT / "runs" / "ablate" / a.experiment)
    print(told(result))
    print(save_result(f"ablate_{a.experiment}", {k: v for k, v in result.items() if k != "folder"}, started=start))


if __name__ == "__main__": main()
