"""Training speed beside TRL's SFTTrainer: same model, rows, precision and machine, in one run, arms in turn.

    python tools/bench_train.py [--tokens 12000] [--rounds 3]                # nbs/results/bench_train.json
    python tools/bench_train.py --alpaca FILE [--tokens 12000] [--rounds 3]  # nbs/results/bench_train_alpaca.json

Tasks: continued pre-training (tokens per second) and fine-tuning on conversations (rows per second), the package's
own, which are short and alike; with --alpaca fine-tuning on the rows of a file with instruction, input and output,
of which there are many on the hub. The learning rate is so small that no weight moves, so the mean loss of every
arm is over the same tokens of the same model and must agree; all other work of a step is done.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from domain_llm.core import read_json
from domain_llm.data.mix import tokenize
from domain_llm.demo.general import general_instructions, python_docs
from domain_llm.models import load, load_tokenizer, quiet
from domain_llm.results import save_result
from domain_llm.train.loop import TRAIN_DEFAULTS, settings, train
from domain_llm.train.sft import encode

warnings.filterwarnings("ignore")
RATE = 1e-12
LENGTH = 1024


def conversations(path):
    "The rows of an Alpaca file as conversations."
    turns = [(r["instruction"] + ("\n\n" + r["input"] if r.get("input") else ""), r["output"]) for r in read_json(path)]
    return [
        dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)]) for q, a in turns if a.strip()
    ]


def rows_of(task, tok, tokens):
    """About `tokens` tokens of rows: documents (Python's documentation, of very different lengths, as real
    documents are) or conversations (the package's, or a file's)."""
    import random

    found, coded = (
        list(python_docs() if task == "pretrain" else general_instructions() if task == "sft" else conversations(task)),
        [],
    )
    for r in random.Random(0).sample(found, len(found)):
        coded += tokenize([r], tok, "a", LENGTH) if task == "pretrain" else encode(r["messages"], tok)
        if sum(len(x["input_ids"]) for x in coded) >= tokens:
            break
    return coded


def ours(coded, length):
    model, _ = load()
    cfg = settings(TRAIN_DEFAULTS, dict(length=length, tokens_per_step=length, learning_rate=RATE, probes=1))
    with tempfile.TemporaryDirectory() as d:
        return timed(lambda: train(model, coded, d, cfg))


def timed(run):
    """Seconds in the trainer's loop after its first two steps, as if for all rows, and the mean loss per labelled
    token, caught from the Trainer itself."""
    import transformers

    seen, real = dict(losses=0.0, labels=0, cold=0), transformers.Trainer.train

    def train(self, *a, **kw):
        class Clock(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **k):
                seen["end"] = time.perf_counter()
                if state.global_step == 2:
                    seen["start"], seen["cold"] = seen["end"], seen["labels"]

        self.add_callback(Clock())
        self._save_checkpoint = lambda *a, **k: None
        inner = self.compute_loss

        def compute_loss(model, inputs, *a, **k):
            n = int((inputs["labels"][:, 1:] != -100).sum())
            loss = inner(model, inputs, *a, **k)
            value = (loss[0] if isinstance(loss, tuple) else loss).item()
            items = k.get("num_items_in_batch")
            seen["losses"] += value * (float(items) if items is not None else n)
            seen["labels"] += n
            return loss

        self.compute_loss = compute_loss
        return real(self, *a, **kw)

    transformers.Trainer.train = train
    try:
        run()
    finally:
        transformers.Trainer.train = real
    return dict(
        seconds=(seen["end"] - seen["start"]) * seen["labels"] / (seen["labels"] - seen["cold"]),
        loss=seen["losses"] / seen["labels"],
    )


def trl(coded, best, length):
    """SFTTrainer as it comes, or in the fastest configuration found: packed rows, no checkpointing, bf16, full
    row per step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tok = load()
    data = Dataset.from_list([dict(input_ids=r["input_ids"], labels=r["labels"]) for r in coded])
    kw = (
        dict(
            packing=True,
            packing_strategy="bfd_split",
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            bf16=True,
            max_length=length,
        )
        if best
        else {}
    )
    with tempfile.TemporaryDirectory() as d, quiet():
        args = SFTConfig(
            output_dir=d,
            use_cpu=True,
            learning_rate=RATE,
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
            **kw,
        )
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tok)
        return timed(lambda: trainer.train())


def matmul_peak():
    "Best of several bf16 matrix products, in FLOP/s."
    import torch

    a, b = (torch.randn(4096, 4096, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 4096**3 / best


ARMS = dict(
    ours=lambda coded: ours(coded, LENGTH),
    trl_default=lambda coded: trl(coded, False, LENGTH),
    trl_best=lambda coded: trl(coded, True, LENGTH),
)


def arm(task, name, tokens):
    "One arm in a process of its own, so that nothing that it sets reaches another; gives its figures."
    p = subprocess.run(
        [sys.executable, __file__, "--arm", task, name, "--tokens", str(tokens)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(p.stdout.splitlines()[-1])


def bench(tokens, rounds, alpaca=None):
    model, tok = load()
    parameters = sum(p.numel() for p in model.parameters())
    del model
    result = dict(tasks={}, rounds=rounds)
    for task in [alpaca] if alpaca else ["pretrain", "sft"]:
        coded = rows_of(task, tok, tokens)
        n = sum(len(r["input_ids"]) for r in coded)
        taken = {a: [] for a in ARMS}
        for i in range(rounds):
            for name in ARMS:
                r = arm(task, name, tokens)
                taken[name].append(r)
                print(
                    f"{Path(task).stem} round {i + 1} {name}: {n / r['seconds']:.0f} tokens/s, "
                    f"{len(coded) / r['seconds']:.2f} rows/s, loss {r['loss']:.4f}",
                    flush=True,
                )
        median = {a: statistics.median(r["seconds"] for r in rs) for a, rs in taken.items()}
        result["tasks"]["sft" if alpaca else task] = dict(
            tokens=n,
            rows=len(coded),
            runs=taken,
            tokens_per_second={a: n / s for a, s in median.items()},
            rows_per_second={a: len(coded) / s for a, s in median.items()},
            loss={a: rs[0]["loss"] for a, rs in taken.items()},
            speedup_over_default=median["trl_default"] / median["ours"],
            speedup_over_best=median["trl_best"] / median["ours"],
        )
    peak = matmul_peak()
    if not alpaca:
        result["share_of_peak"] = 6 * parameters * result["tasks"]["pretrain"]["tokens_per_second"]["ours"] / peak
    result.update(bf16_matmul_flops=peak, parameters=parameters)
    return result


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--tokens", type=int, default=12000, help="tokens of each task (%(default)s)")
    a.add_argument("--rounds", type=int, default=3, help="times each arm runs (%(default)s)")
    a.add_argument(
        "--alpaca",
        metavar="FILE",
        help="JSON list of rows with instruction, input and output, to measure fine-tuning on",
    )
    a.add_argument("--arm", nargs=2, metavar=("TASK", "ARM"), help="run one arm and print its figures")
    a = a.parse_args()
    if a.arm:
        return print(json.dumps(ARMS[a.arm[1]](rows_of(a.arm[0], load_tokenizer(), a.tokens))))
    start = time.time()
    result = bench(a.tokens, a.rounds, a.alpaca)
    for task, r in result["tasks"].items():
        print(
            f"{task}: {r['speedup_over_default']:.2f}x TRL's defaults, {r['speedup_over_best']:.2f}x "
            "its best configuration"
        )
    if not a.alpaca:
        print(
            f"{result['share_of_peak']:.0%} of the bf16 matmul peak ({result['bf16_matmul_flops'] / 1e9:.0f} GFLOP/s)"
        )
    print(save_result("bench_train_alpaca" if a.alpaca else "bench_train", result, started=start))


if __name__ == "__main__":
    main()
