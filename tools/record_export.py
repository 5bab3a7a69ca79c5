"""Peak memory and time of the export of a model in several files: merge (whole in memory, and tensor by tensor),
conversion to GGUF, quantization; recorded in nbs/results/export.json.

    python tools/record_export.py

The model has random weights of 1.5 GB in 16 bits, in files of 300 MB at most. Every step is a process of its own. The
peak includes the imported packages, whose part is recorded as `program`. Linux only; needs 8 GB of free disk.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from domain_llm.devices import peak_bytes
from domain_llm.models import load_tokenizer
from domain_llm.results import save_result
from domain_llm.ship.gguf import convert, quantize_file
from domain_llm.ship.merge import load_merged, merge
from domain_llm.ship.pieces import for_converter
from domain_llm.train.loop import add_lora

SHAPE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=16)
STEPS = ("program", "in memory", "merge", "convert", "q8_0", "q4_k_m")
ROWS = {"embed_tokens": [5, 9], "lm_head": [5, 9]}  # of tokens, that the adapter changes


def make(root):
    "A base model in several files and an adapter for it, both random."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), num_key_value_heads=8, tie_word_embeddings=False, **SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base", max_shard_size="300MB")
    tok.save_pretrained(root / "base")
    adapted = add_lora(model, 16, 16, ROWS)
    for name, p in adapted.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(p, std=0.02)
    adapted.save_pretrained(root / "adapter")


def run(step, root):
    "Do one step of the export in a folder."
    if step == "program":
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    elif step == "in memory":
        model, _ = load_merged(root / "base", root / "adapter")
        model.save_pretrained(root / "whole")
    elif step == "merge":
        merge(root / "base", root / "adapter", root / "merged")
    elif step == "convert":
        convert(for_converter(root / "merged", root / "seen"), root / "lossless.gguf")
    else:
        from gguf import GGUFReader

        quantize_file(GGUFReader(root / "lossless.gguf"), root / f"{step}.gguf", step, None)


def measured(step, root):
    "Run a step in this process; gives its peak memory in bytes, its seconds, and those of the processor."
    start = time.perf_counter()
    run(step, root)
    seconds = time.perf_counter() - start
    ours, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    busy = sum(used.ru_utime + used.ru_stime for used in (ours, theirs))
    peak = 1024 * theirs.ru_maxrss if step == "convert" else peak_bytes()
    return dict(peak_bytes=peak, seconds=round(seconds, 1), processor_seconds=round(busy, 1))


def weights(folder):
    "Bytes of the files of weights in a folder, by file."
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--step", nargs=2, metavar=("STEP", "FOLDER"), help="(of the tool itself) one step in this process")
    a = p.parse_args()
    if a.step:
        print(json.dumps(measured(a.step[0], Path(a.step[1]))))
        return
    started, steps = time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root)
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            steps[step] = json.loads(done.stdout.strip().splitlines()[-1])
            print(step, steps[step], flush=True)
        files = {path.stem: path.stat().st_size for path in root.glob("*.gguf")}
        base = weights(root / "base")
    found = dict(weights_bytes=sum(base.values()), largest_file_bytes=max(base.values()), gguf_bytes=files)
    print(save_result("export", found | dict(steps=steps), started))


if __name__ == "__main__":
    main()
