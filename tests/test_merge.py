"""Merging tensor by tensor, against peft's own merge of the whole model in memory."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from domain_llm import models
from domain_llm.ship import merge as merging
from domain_llm.ship.merge import merge

LINEAR = dict(target_modules="all-linear")
ROWS = dict(LINEAR, trainable_token_indices={"embed_tokens": [5, 9]})
BOTH_ROWS = dict(LINEAR, trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [5, 9]})
ALONE = {
    "linear": (LINEAR, False),
    "linear, tied": (LINEAR, True),
    "rank-stabilized": (dict(LINEAR, use_rslora=True, rank_pattern={"q_proj": 2}), False),
    "new rows, tied": (ROWS, True),
    "new rows": (BOTH_ROWS, False),
}
TOGETHER = {
    "a retrained head": (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), False),
    "the head, tied": (dict(target_modules=["q_proj", "lm_head"]), True),
    "the embedding": (dict(target_modules=["q_proj", "embed_tokens"]), False),
    "DoRA": (dict(LINEAR, use_dora=True), False),
    "biases": (dict(LINEAR, bias="lora_only"), False),
}


@pytest.fixture(scope="module")
def tok():
    return models.load_tokenizer("small-world")


def fill(model, seed=1):
    "Random numbers in everything that an adapter trains."
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)


def make(root, tok, settings, tied=False, dtype=torch.bfloat16, hidden=32, layers=2, **saved):
    "A base in several files and an adapter of it."
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tok), attention_bias=True, tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(root / "base", **saved)
    tok.save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    fill(adapted)
    adapted.save_pretrained(root / "adapter")
    return root


def held(folder):
    "All tensors in the files of a folder."
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def by_peft(root):
    "The folder of what peft's own merge gives."
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype="auto")
    PeftModel.from_pretrained(base, root / "adapter").merge_and_unload().save_pretrained(root / "peft")
    return root / "peft"


def same(ours, theirs):
    "Whether two folders hold the same model, bit by bit."
    ours, theirs = held(ours), held(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    return True


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_tensor_by_tensor_gives_the_bits_of_peft(name, dtype, tok, tmp_path, monkeypatch):
    settings, tied = ALONE[name]
    make(tmp_path, tok, settings, tied, dtype, max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    theirs = by_peft(tmp_path)
    monkeypatch.setattr(merging, "_FILE", 30_000)
    monkeypatch.setattr(merging, "merge_adapter", lambda *_: pytest.fail("the whole model was loaded"))
    ours = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    assert same(ours, theirs)
    for file in ("config.json", "generation_config.json"):
        assert (ours / file).read_text() == (theirs / file).read_text()
    assert len(list(ours.glob("*.safetensors"))) > 2
    model, _ = models.load(str(ours))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("name", TOGETHER)
def test_what_cannot_be_merged_alone_is_merged_in_memory(name, tok, tmp_path):
    settings, tied = TOGETHER[name]
    make(tmp_path, tok, settings, tied)
    assert same(merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours"), by_peft(tmp_path))


def test_a_head_in_the_file_of_a_tied_model_is_left_out(tok, tmp_path):
    "Some published models hold the tied matrix twice."
    from safetensors.torch import save_file

    make(tmp_path, tok, ROWS, True)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    assert same(merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours"), by_peft(tmp_path))


MEASURE = """
import json, sys
import bitsandbytes, datasets, peft, transformers
from domain_llm.devices import peak_bytes
from domain_llm.ship import merge as merging
merging._FILE = 20_000_000
from peft.tuners.lora.layer import Linear
from transformers import LlamaForCausalLM
from domain_llm.models import load_tokenizer
load_tokenizer(sys.argv[1])
before = peak_bytes()
merging.merge(*sys.argv[1:])
print(json.dumps(peak_bytes() - before))
"""


def test_the_memory_is_that_of_a_few_tensors(tok, tmp_path):
    "Of a model of 200 MB; the whole in memory would take them all."
    make(tmp_path, tok, LINEAR, hidden=1024, layers=10, max_shard_size="40MB")
    weights = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    given = [str(tmp_path / name) for name in ("base", "adapter", "ours")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *given], capture_output=True, text=True, check=True)
    assert weights > 2e8 and json.loads(done.stdout) < 0.6 * weights
