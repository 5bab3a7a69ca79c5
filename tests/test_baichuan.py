"""Baichuan becomes a Llama that computes the same: against a small implementation written from the published
architecture (Baichuan 2's technical report and modeling_baichuan.py): packed attention with rotary positions, SwiGLU,
RMSNorm, and a head whose rows are divided by their lengths."""

import json

import pytest
import sentencepiece
import torch
from fixtures.baichuan import CONFIG, MARKS, call_chat, vocabulary, weights, write
from fixtures.families import BAICHUAN2, LINES

from domain_llm.baichuan import baichuan_to_llama
from domain_llm.core import InputError
from domain_llm.layouts import read_tensors
from domain_llm.model_errors import load_failed
from domain_llm.models import load


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt()


def rotated(x):
    "Rotary positions of (heads, tokens, width): the halves of a head turn by angles that grow with the position."
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half).float() / half)
    angles = torch.arange(x.shape[1]).float()[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def attention(x, w, layer):
    heads, n = CONFIG["num_attention_heads"], len(x)
    q, k, v = (x @ w[layer + "self_attn.W_pack.weight"].T).view(n, 3, heads, -1).permute(1, 2, 0, 3)
    scores = rotated(q) @ rotated(k).transpose(1, 2) / q.shape[-1] ** 0.5
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(n, -1) @ w[layer + "self_attn.o_proj.weight"].T


def baichuan(ids, w, normalized):
    "The logits of a Baichuan."
    x = w["model.embed_tokens.weight"][ids]
    for n in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        x = x + attention(rms(x, w[layer + "input_layernorm.weight"]), w, layer)
        y = rms(x, w[layer + "post_attention_layernorm.weight"])
        gate = y @ w[layer + "mlp.gate_proj.weight"].T
        inner = gate * torch.sigmoid(gate) * (y @ w[layer + "mlp.up_proj.weight"].T)
        x = x + inner @ w[layer + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if normalized:
        head = head / head.pow(2).sum(1, keepdim=True).sqrt()
    return rms(x, w["model.norm.weight"]) @ head.T


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("spm"))


@pytest.fixture
def folder(tmp_path, pieces):
    return write(tmp_path / "baichuan", pieces)


IDS = list(range(3, 43))


@pytest.mark.parametrize("normalized", (False, True))
def test_the_llama_computes_what_baichuan_computes(folder, tmp_path, normalized):
    model, _ = load(str(baichuan_to_llama(folder, tmp_path / "out", normalized)), device="cpu")
    with torch.no_grad():
        got = model(input_ids=torch.tensor([IDS])).logits[0]
    want = baichuan(torch.tensor(IDS), weights(), normalized)
    assert torch.allclose(got, want, atol=1e-4)
    other = baichuan(torch.tensor(IDS), weights(), not normalized)
    assert (got - other).abs().max() > 0.1


def test_the_tokenizer_is_sentencepieces(folder, tmp_path, pieces):
    _, tok = load(str(baichuan_to_llama(folder, tmp_path / "out", True)), device="cpu")
    own = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    for text in [*LINES, "  two  spaces é 😀", "<reserved_106>在四十巴时打开。<reserved_107>40 bar"]:
        assert tok(text).input_ids == own.encode(text)
    assert (tok.bos_token_id, tok.eos_token_id, len(tok)) == (1, 2, 340)
    assert tok.chat_template is None


def test_a_chat_model_gets_the_turns_of_its_own_code(folder, tmp_path, pieces):
    "As vLLM's template for it renders them, and in the ids that the model's own code puts together."
    call_chat(folder, pieces)
    _, tok = load(str(baichuan_to_llama(folder, tmp_path / "out", True)), device="cpu")
    own = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    user, assistant = map(own.piece_to_id, MARKS)
    said = ["At what pressure?", "40 bar.", "然后呢？"]
    talk = [dict(role=role, content=text) for role, text in zip(("user", "assistant", "user"), said)]
    for system in ("", "Be brief."):
        turns = [dict(role="system", content=system)] * bool(system) + talk
        text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == tok.apply_chat_template(
            turns, chat_template=BAICHUAN2, tokenize=False, add_generation_prompt=True
        )
        want = own.encode(system) + [user, *own.encode(said[0]), assistant, *own.encode(said[1])]
        assert tok(text, add_special_tokens=False).input_ids == want + [user, *own.encode(said[2]), assistant]


def test_alibi_is_refused(folder, tmp_path):
    "13B models have no max_position_embeddings."
    config = {name: value for name, value in CONFIG.items() if name != "max_position_embeddings"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="ALiBi"):
        baichuan_to_llama(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_missing_is_named(folder, tmp_path):
    "The other part has the head, without which the model would be loaded with random numbers in its place."
    parts = {name: path.name for path in folder.glob("*.bin") for name in torch.load(path)}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps(dict(weight_map=parts)))
    baichuan_to_llama(folder, tmp_path / "whole")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    for _ in range(2):  # known by the index, and without one by the names of the parts
        with pytest.raises(InputError, match="pytorch_model-00002-of-00002.bin is missing"):
            baichuan_to_llama(folder, tmp_path / "out")
        index.unlink(missing_ok=True)


def test_an_older_pickle_is_read_and_a_pointer_is_no_file(folder, tmp_path):
    path = folder / "pytorch_model-00001-of-00002.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    baichuan_to_llama(folder, tmp_path / "out")
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="no file of SentencePiece"):
        baichuan_to_llama(folder, tmp_path / "again")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="model.safetensors holds more than tensors, or is broken"):
        read_tensors(folder / "model.safetensors")


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="tokenizer.model"):
        baichuan_to_llama(folder, tmp_path / "out")
    with pytest.raises(InputError, match="no config.json"):
        baichuan_to_llama(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_runs_no_code(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(InputError, match="pytorch_model-00001"):
        baichuan_to_llama(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_baichuan_that_was_not_converted_says_how(folder):
    with pytest.raises(InputError, match="baichuan_to_llama writes it in the layout of Llama"):
        load(str(folder))
    error = ValueError("The repository contains custom code; pass trust_remote_code=True to run it.")
    assert "baichuan_to_llama" in str(load_failed("baichuan-inc/Baichuan2-7B-Chat", error))
    assert "baichuan" not in str(load_failed("THUDM/chatglm3-6b", error))
