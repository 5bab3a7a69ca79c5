"""Run the demo in a fresh folder and record its figures in nbs/results/demo.json.

    python tools/record_demo.py [--kills 10]

With --kills N a second run is killed with SIGKILL at N points spread over it and started again each time; its figures are recorded beside the first's.
"""
import argparse, os, signal, subprocess, sys, tempfile, time
from pathlib import Path


def run(out, kill_after=None):
    "Run the demo into `out`; with `kill_after`, SIGKILL it after so many seconds. Gives whether it ended by itself."
    p = subprocess.Popen([str(Path(sys.executable).parent / "domain-llm"), "run", "--output", str(out)], start_new_session=True)
    try: p.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        return False
    assert p.returncode == 0
    return True


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--kills", type=int, default=0)
    a = a.parse_args()
    from domain_llm.core import read_json, save_result
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as d:
        start = time.time()
        run(Path(d) / "whole")
        wall, out = time.time() - start, Path(d) / "whole"
        metrics = read_json(out / "metrics.json")
        result = {**metrics, "seed": 0, "wall_seconds": round(wall, 1), "stages": {s: {k: m[k] for k in ("seconds", "peak_memory_gb", "metrics")} for s in ("corpus", "baseline", "pretrain", "sft", "evaluate", "quantize") for m in [read_json(out / s / "manifest.json")]},
                  "histories": {s: read_json(out / s / "history.json") for s in ("pretrain", "sft")}, "corpus": {k: read_json(out / "corpus" / "report.json")[k] for k in ("steps", "dropped")},
                  "items": {when: {k: {x: read_json(out / s / "measured.json")[k][x] for x in ("picks", "correct", "groups")} for k in ("domain_mcq", "general_mcq")} for when, s in (("before", "baseline"), ("after", "evaluate"))},
                  "answers": {"before": read_json(out / "baseline" / "measured.json")["answers"], "after": read_json(out / "evaluate" / "measured.json")["answers"], "gguf": read_json(out / "quantize" / "checks.json")["answers"]},
                  "quantized": read_json(out / "quantize" / "checks.json")["checks"]}
        if a.kills:
            killed = Path(d) / "killed"
            points = [run(killed, wall / a.kills) for _ in range(a.kills)]
            while not run(killed): pass
            same = {k: v for k, v in read_json(killed / "metrics.json").items() if k != "seconds"} == {k: v for k, v in metrics.items() if k != "seconds"}
            result["killed"] = dict(times=points.count(False), every_seconds=round(wall / a.kills, 1), same_metrics=same)
            print(f"killed {points.count(False)} times: metrics {'equal' if same else 'DIFFER'}")
        print(save_result("demo", result, started=start))


if __name__ == "__main__": main()
