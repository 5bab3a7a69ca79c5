"""Training speed in the small world beside a bare PyTorch loop: same model, same packed rows, in one run, in turns;
writes nbs/results/bench_small_world.json.

    python tools/bench_small_world.py [--rounds 3]

The bare loop is what a tutorial writes: the model's own loss, backward, AdamW, one row a step. The package's training
keeps documents apart, takes the loss of each source, clips, and logs. Both times begin after the second step.
"""

import argparse
import statistics
import tempfile
import time

import torch
from bench_train import timed

from domain_llm.data.mix import tokenize
from domain_llm.demo.lab import make_lab
from domain_llm.results import save_result
from domain_llm.small_world import small_model, small_tokenizer
from domain_llm.train.batches import pack
from domain_llm.train.loop import TRAIN_DEFAULTS, train

LENGTH, RATE = 512, 1e-4
SETTINGS = {**TRAIN_DEFAULTS, "learning_rate": RATE, "length": LENGTH, "tokens_per_step": LENGTH, "probes": 1}


def ours(tok, rows):
    "Seconds of the package's training, as if for all rows."
    with tempfile.TemporaryDirectory() as folder:
        return timed(lambda: train(small_model(tok, 0), rows, folder, SETTINGS))["seconds"]


def bare(tok, rows):
    "Seconds of a plain loop over the packed rows, as if for all of them."
    model = small_model(tok, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    packed = [(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in pack(rows, LENGTH)[0]]
    for step, (ids, labels) in enumerate(packed):
        if step == 2:
            started = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) * len(packed) / (len(packed) - 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given, started = parser.parse_args(), time.time()
    tok = small_tokenizer()
    rows = tokenize(make_lab(seed=0)["documents"], tok, "domain", LENGTH)
    tokens = sum(len(row["input_ids"]) for row in rows)
    seconds = dict(ours=[], bare=[])
    for _ in range(given.rounds):
        for name, arm in (("ours", ours), ("bare", bare)):
            seconds[name].append(arm(tok, rows))
            print(f"{name}: {tokens / seconds[name][-1]:,.0f} tokens/s", flush=True)
    rates = {name: tokens / statistics.median(those) for name, those in seconds.items()}
    parameters = small_model(tok, 0).num_parameters()
    figures = dict(parameters=parameters, tokens=tokens, threads=torch.get_num_threads(), seconds=seconds)
    figures |= dict(tokens_per_second=rates, ratio=rates["ours"] / rates["bare"])
    print(f"{figures['ratio']:.2f} of the bare loop; {save_result('bench_small_world', figures, started)}")


if __name__ == "__main__":
    main()
