"""The most memory that a training of a few steps holds, against `run.plan.memory_parts`; recorded in
nbs/results/memory.json, or memory_bf16.json on a processor that computes in bfloat16.

    python tools/record_memory.py [--only 60M]
    python tools/record_memory.py --fit

Every row is a process of its own: a model, a method, a length, a batch, with or without gradient checkpointing. Rows
whose settings this version of the training does not know are left out. Checkpoints are not written. Linux only.
`--fit` fits the constants of `memory_parts` to each record, and once more without the largest model, and says how near
all rows come. What autograd keeps in 16 bits is counted (a test does it) and not fitted.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import numpy as np
from scipy.optimize import minimize

from domain_llm.devices import peak_memory_gb, reset_peak_memory, trim_memory
from domain_llm.results import load_result, save_result
from domain_llm.run import plan
from domain_llm.run.base_model import sizes
from domain_llm.run.plan import KERNELS, PIECES, PROGRAM, memory_parts, this_device
from domain_llm.run.settings import Method
from domain_llm.train.loop import TRAIN_DEFAULTS, add_lora, train

SHAPES = {
    "8M": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, vocab_size=8192),
    "60M": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=32768),
    "135M": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152
    ),
}
STEPS = 3
RECORDS = {4: "memory", 2: "memory_bf16"}  # by bytes of a weight while it is trained


def config(name):
    "The configuration of one of the models."
    from transformers import LlamaConfig

    shape, tied = SHAPES[name], name == "135M"
    heads = shape["num_attention_heads"]
    return LlamaConfig(num_key_value_heads=heads // 3 if tied else heads // 2, tie_word_embeddings=tied, **shape)


def model_of(name, method):
    "A model with random weights, 4-bit ones for qlora."
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config(name)).float()
    if method != "qlora":
        return model
    from domain_llm.small_world import small_tokenizer
    from domain_llm.train.qlora import load_for

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
        del model
        return load_for("qlora", folder)[0]


def settings_of(given):
    "The settings of a training whose steps are one pass each."
    set_ = {**TRAIN_DEFAULTS, **given, "probes": 1}
    return {**set_, "tokens_per_step": set_["length"] * set_["batch"]}


def short_training(model, set_, vocabulary, steps=STEPS):
    "Train a model for a few steps on made-up rows, and write no checkpoint; gives the time at each step's end."
    from transformers import Trainer

    times, step = [], Trainer.training_step

    def no_checkpoint(self, *args):
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True)

    def timed(self, *args, **named):
        loss = step(self, *args, **named)
        loss.item()  # waits for a GPU
        times.append(time.perf_counter())
        return loss

    n = set_["length"]
    rows = [
        dict(input_ids=[(17 * i + k) % vocabulary for k in range(n)], labels=[1] * n, source="domain")
        for i in range(steps * set_["batch"])
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.multiple(Trainer, _save_checkpoint=no_checkpoint, training_step=timed),
    ):
        train(model, rows, folder, set_)
    return times


def measure(row):
    "Peak and prediction of one row in GB, and what the program holds without a model; printed as JSON."
    set_, size = settings_of(row["settings"]), sizes(config(row["model"]))
    reset_peak_memory()
    program = peak_memory_gb()
    model = model_of(row["model"], set_["method"])
    if set_["method"] != "full":
        model = add_lora(model, set_["rank"], set_["alpha"])
    gc.collect()
    trim_memory()  # what making the model left behind is not the training's
    reset_peak_memory()
    short_training(model, set_, size["vocabulary"])
    parts = memory_parts(set_, size, this_device())
    gb = 2**30 / 1e9  # the system counts in powers of two
    said = dict(peak=gb * peak_memory_gb(), predicted=sum(parts.values()) / 1e9, program=gb * program)
    print(json.dumps({name: round(value, 3) for name, value in said.items()}))


def wanted():
    "The rows, those of settings that the training knows."
    found = []
    ways = product(SHAPES, ("full", "lora", "qlora"), (256, 1024), (1, 2), (False, True))
    for model, method, length, batch, checkpointing in ways:
        settings = dict(method=method, length=length, batch=batch, gradient_checkpointing=checkpointing)
        plain = dict(batch=1, gradient_checkpointing=False)
        settings = {k: v for k, v in settings.items() if k in TRAIN_DEFAULTS or plain.get(k) != v}
        known = settings.keys() <= TRAIN_DEFAULTS.keys() and method in get_args(get_args(Method)[0])
        if known and (batch == 1 or length == 256):
            found.append(dict(model=model, settings=settings))
    return found


def misses(constants, rows, shapes, half):
    "Share by which the prediction of each row misses its peak, with these constants in the formula."
    program, logits, layer, quantized, *kept = constants
    pieces = {half: dict(logits=logits, layer=layer, quantized=quantized)}
    values = dict(PROGRAM={"cpu": 1e9 * program}, KERNELS={half: 0}, PIECES=pieces)
    values["KEPT"] = {half: kept or plan.KEPT[half]}
    device, found = dict(kind="cpu", half=half), []
    with patch.multiple(plan, **values):
        for row in rows:
            parts = memory_parts(settings_of(row["settings"]), shapes[row["model"]], device)
            found.append(sum(parts.values()) / 1e9 / row["peak"] - 1)
    return np.array(found)


def fitted(rows, shapes, half):
    "The constants that come nearest to the peaks of some rows."
    start = [(PROGRAM["cpu"] + KERNELS[half]) / 1e9, *PIECES[half].values(), *(plan.KEPT[half] if half == 4 else ())]

    def worth(x):
        return np.mean(np.abs(misses(x, rows, shapes, half)) ** 3)

    return minimize(worth, start, method="Nelder-Mead", options=dict(maxfev=1500)).x


def fit(name, half):
    "Fit the constants to all rows of a record, and to those without the largest model; prints how near either comes."
    rows = load_result(name)["rows"]
    shapes = {name: sizes(config(name)) for name in SHAPES}
    smaller = [row for row in rows if row["model"] != "135M"]
    for said, some in (("all rows", rows), ("without 135M", smaller)):
        found = fitted(some, shapes, half)
        print(f"{name}, {said}: program, logits, layer, quantized, linear, product: {found.round(2)}")
        for model in SHAPES:
            errors = misses(found, [row for row in rows if row["model"] == model], shapes, half)
            within = sum(np.abs(errors) < 0.05)
            print(f"  {model}: {within} of {len(errors)} within 5%, from {errors.min():+.1%} to {errors.max():+.1%}")


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--only", choices=SHAPES, help="rows of this model")
    a.add_argument("--measure", help=argparse.SUPPRESS)
    a.add_argument("--fit", action="store_true", help="fit the formula's constants to the record")
    a = a.parse_args()
    if a.fit:
        for half, name in RECORDS.items():
            fit(name, half)
        return
    if a.measure:
        return measure(json.loads(a.measure))
    start, rows = time.time(), []
    for row in wanted():
        if a.only in (None, row["model"]):
            command = [sys.executable, __file__, "--measure", json.dumps(row)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            rows.append({**row, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], f"{rows[-1]['predicted'] / rows[-1]['peak']:.2f}", flush=True)
    half = this_device()["half"]
    program = (PROGRAM["cpu"] + KERNELS[half]) / 1e9
    print(save_result(RECORDS[half], dict(program=program, rows=rows), started=start))


if __name__ == "__main__":
    main()
