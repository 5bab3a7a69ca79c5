"""Decoding speed through the package's server beside a bare xllamacpp loop: same file, same prompts, in one run, in
turns; writes nbs/results/bench_server.json.

    python tools/bench_server.py [--repeats 12]

The bare loop asks xllamacpp in this process, without HTTP. Both read a prompt and write 128 tokens; what counts is the
time from the question to the whole answer.
"""

import argparse
import tempfile
import time
from functools import partial
from math import exp, log
from pathlib import Path

import torch
import xllamacpp

from domain_llm.judge.stats import difference
from domain_llm.results import save_result
from domain_llm.ship.gguf import export_gguf
from domain_llm.ship.serve import post, server
from domain_llm.ship.speed import turns

WRITTEN, CONTEXT = 128, 1024  # tokens
PROMPT = "The maintenance of a lock gate begins with"
ASKED = dict(prompt=PROMPT, max_tokens=WRITTEN, temperature=0, ignore_eos=True, cache_prompt=False)
MODEL = "smollm2-135m-instruct"


def bare(file):
    "xllamacpp alone, with one slot and as many threads as the package's server."
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = CONTEXT, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def seconds(ask):
    "Seconds per token of one answer, from the question to its end."
    started = time.perf_counter()
    answer = ask()
    written = answer["usage"]["completion_tokens"]
    assert written == WRITTEN, written
    return (time.perf_counter() - started) / written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    given, started = parser.parse_args(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        file = export_gguf(MODEL, Path(folder) / "gguf", ["q8_0"])["q8_0"]
        alone = bare(file)
        with server(file, port=0, context=CONTEXT) as url:
            through = partial(seconds, lambda: post(url + "/v1/completions", ASKED))
            without = partial(seconds, lambda: alone.handle_completions(ASKED))
            pairs = turns(through, without, given.repeats)
    ours, theirs = ([log(pair[side]) for pair in pairs] for side in (0, 1))
    found = difference([theirs], [ours])
    speeds = {name: exp(-sum(logs) / len(logs)) for name, logs in (("ours", ours), ("bare", theirs))}
    ratio = {end: exp(found[end]) for end in ("diff", "low", "high")}
    print(f"{speeds} tokens per second; {ratio['diff']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    print(
        save_result("bench_server", dict(tokens_per_second=speeds, ratio=ratio, written=WRITTEN, model=MODEL), started)
    )


if __name__ == "__main__":
    main()
