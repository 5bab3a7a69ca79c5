"""Multiple choice here against lm-evaluation-harness: same questions, model and precision, alternating.

Writes nbs/results/bench_evaluate.json.

    python tools/bench_evaluate.py [--items 200] [--rounds 2] [--threads N] [--dry]

The models are loaded outside the timed part. lm-eval is timed inside its `loglikelihood` (its data loading and
reporting do not count), with the best of its batch sizes 1, 8 and 16 on a sample of the questions. MMLU comes from
shared/data beside the checkout; without it only the demo set is measured.
"""

import argparse
import ast
import logging
import os
import random
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from domain_llm.demo.general import common_questions
from domain_llm.demo.world import make_world
from domain_llm.judge.choice import multiple_choice
from domain_llm.judge.lm_eval import export_lm_eval
from domain_llm.judge.questions import read_questions
from domain_llm.models import load
from domain_llm.results import save_result

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def lm_eval_run(model, tok, rows, batch_size=8, **how):
    """lm-eval's result on question rows as `export_lm_eval` writes them.

    Gives a dict of picks (acc), picks_norm (acc_norm), loglik, prompts, seconds, cpu_seconds.
    """
    import datasets
    import numpy as np
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    disable_progress_bar()

    class Timed(HFLM):
        def loglikelihood(self, requests, disable_tqdm=True):
            start, cpu = time.perf_counter(), time.process_time()
            out = super().loglikelihood(requests, disable_tqdm=True)
            self.seconds, self.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            return out

    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder) / "cache"),
        ):
            export_lm_eval(rows, folder, "local_mcq", **how)
            lm = Timed(pretrained=model, tokenizer=tok, batch_size=batch_size)
            got = simple_evaluate(
                model=lm,
                tasks=["local_mcq"],
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
            )
    finally:
        logging.disable(logging.NOTSET)
        enable_progress_bar()
    samples = sorted(got["samples"]["local_mcq"], key=lambda s: s["doc_id"])
    loglik, options = (
        [[float(r[0][0]) for r in s["resps"]] for s in samples],
        [ast.literal_eval(s["doc"]["options"]) for s in samples],
    )
    picks = [int(np.argmax(x)) for x in loglik]
    norm = [int(np.argmax([v / len(o) for v, o in zip(x, oo)])) for x, oo in zip(loglik, options)]
    assert [p == r["answer"] for p, r in zip(picks, rows)] == [bool(s["acc"]) for s in samples]
    assert [p == r["answer"] for p, r in zip(norm, rows)] == [bool(s["acc_norm"]) for s in samples]
    return dict(
        picks=picks,
        picks_norm=norm,
        loglik=loglik,
        prompts=[s["arguments"][0][0] for s in samples],
        seconds=lm.seconds,
        cpu_seconds=lm.cpu_seconds,
    )


def mmlu(n, seed=0):
    "`n` sound MMLU questions over all subjects in shared/data, or none where it is absent."
    import warnings

    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p in sorted((Path(__file__).resolve().parents[2] / "shared/data/mcq/mmlu").glob("*_test.csv")):
            rows += read_questions(p, skip_faulty=True)
    return random.Random(seed).sample(rows, min(n, len(rows)))


def short(n, seed=0):
    "`n` questions of the demo domain and of common knowledge."
    return random.Random(seed).sample(make_world()["mcq"] + common_questions(), n)


def _disagree(ref, picks, rows, key="picks", size=lambda c: 1):
    "Questions with another pick, and the widest margin in lm-eval's own scores (nats per unit) between the two picks."
    gaps = [
        abs(ll[a] / size(r["choices"][a]) - ll[b] / size(r["choices"][b]))
        for ll, a, b, r in zip(ref["loglik"], ref[key], picks, rows)
        if a != b
    ]
    return dict(n=len(gaps), widest_margin=round(max(gaps, default=0.0), 6))


def cell(model, tok, rows, rounds):
    "One comparison: alternate the two programs and compare the picks."
    sample = rows[:12]
    speed = {b: lm_eval_run(model, tok, sample, b)["seconds"] for b in (1, 8, 16)}
    best, theirs, ours = min(speed, key=speed.get), [], []
    multiple_choice(model, tok, sample[:4])
    for _ in range(rounds):
        theirs.append(lm_eval_run(model, tok, rows, best))
        start, cpu = time.perf_counter(), time.process_time()
        got = multiple_choice(model, tok, rows)
        ours.append((time.perf_counter() - start, time.process_time() - cpu))
        print(f"  lm-eval {theirs[-1]['seconds']:.1f} s (CPU {theirs[-1]['cpu_seconds']:.1f}),", end=" ")
        print(f"ours {ours[-1][0]:.1f} s (CPU {ours[-1][1]:.1f})", flush=True)
    import numpy as np

    ref, n = theirs[0], len(rows)
    norm = [int(np.argmax([v / len(c) for v, c in zip(x, r["choices"])])) for x, r in zip(got["loglik"], rows)]
    ratios = [t["seconds"] / o[0] for t, o in zip(theirs, ours)]
    return dict(
        n=n,
        batch_size=best,
        ratio=sum(t["seconds"] for t in theirs) / sum(o[0] for o in ours),
        ratios=ratios,
        cpu_ratio=sum(t["cpu_seconds"] for t in theirs) / sum(o[1] for o in ours),
        lm_eval=n * rounds / sum(t["seconds"] for t in theirs),
        ours=n * rounds / sum(o[0] for o in ours),
        equal=sum(a == b for a, b in zip(ref["picks"], got["picks"])),
        equal_norm=sum(a == b for a, b in zip(ref["picks_norm"], norm)),
        differing=_disagree(ref, got["picks"], rows),
        differing_norm=_disagree(ref, norm, rows, "picks_norm", len),
        widest_loglik_gap=max(abs(x - y) for a, b in zip(ref["loglik"], got["loglik"]) for x, y in zip(a, b)),
    )


def bench(items=200, rounds=2, dtypes=("float32", "bfloat16"), sets=("mmlu", "short")):
    "All cells as a dict: cells by 'set dtype'."
    import torch

    rows, cells = dict(mmlu=mmlu(items), short=short(items)), {}
    for dtype in dtypes:
        model, tok = load(dtype=getattr(torch, dtype), device="cpu")
        for name in sets:
            if not rows[name]:
                continue
            print(f"{name} {dtype}", flush=True)
            cells[f"{name} {dtype}"] = c = cell(model, tok, rows[name], rounds)
            print(f"  ratio {c['ratio']:.2f} (CPU {c['cpu_ratio']:.2f}),", end=" ")
            print(f"equal picks {c['equal']}/{c['n']} raw, {c['equal_norm']}/{c['n']} chars", flush=True)
    return dict(cells=cells, items=items, rounds=rounds, threads=torch.get_num_threads())


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--items", type=int, default=200)
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--threads", type=int)
    ap.add_argument("--sets", nargs="+", default=["mmlu", "short"])
    ap.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    ap.add_argument("--dry", action="store_true", help="print only, write no record")
    args = ap.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    started = time.time()
    result = bench(args.items, args.rounds, tuple(args.dtypes), tuple(args.sets))
    if not args.dry:
        print(save_result("bench_evaluate", result, started))


if __name__ == "__main__":
    main()
