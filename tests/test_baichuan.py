"""Baichuan becomes a Llama that computes the same: against a small implementation written from the published
architecture (Baichuan 2's technical report and modeling_baichuan.py): packed attention with rotary positions, SwiGLU,
RMSNorm, and a head whose rows are divided by their lengths."""

import json

import pytest
import sentencepiece
import torch
from fixtures.families import LINES

from domain_llm.baichuan import baichuan_to_llama
from domain_llm.core import InputError
from domain_llm.model_errors import load_failed
from domain_llm.models import load

CONFIG = dict(
    architectures=["BaichuanForCausalLM"],
    model_type="baichuan",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    model_max_length=128,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    vocab_size=400,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    torch_dtype="float32",
)


def weights():
    "Random weights in Baichuan's layout."
    generator = torch.Generator().manual_seed(0)
    width, inner, rows = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens": (rows, width), "model.norm": (width,), "lm_head": (rows, width)}
    for n in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        shapes |= {layer + "self_attn.W_pack": (3 * width, width), layer + "self_attn.o_proj": (width, width)}
        shapes |= {layer + "mlp.gate_proj": (inner, width), layer + "mlp.up_proj": (inner, width)}
        shapes |= {layer + "mlp.down_proj": (width, inner)}
        shapes |= {layer + "input_layernorm": (width,), layer + "post_attention_layernorm": (width,)}
    return {f"{k}.weight": 0.3 * torch.randn(s, generator=generator) + (len(s) == 1) for k, s in shapes.items()}


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
def vocabulary(tmp_path_factory):
    "A tokenizer.model as Baichuan's: BPE with bytes, no space put before a text, reserved pieces."
    path = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(path),
        model_type="bpe",
        byte_fallback=True,
        vocab_size=400,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<reserved_106>", "<reserved_107>"],
        minloglevel=2,
    )
    return path.with_suffix(".model").read_bytes()


@pytest.fixture
def folder(tmp_path, vocabulary):
    "A Baichuan as it is published: pickles in two parts, config.json, tokenizer.model."
    made, names = tmp_path / "baichuan", list(weights())
    made.mkdir()
    for n, some in enumerate((names[:7], names[7:]), 1):
        part = {name: weights()[name] for name in some}
        torch.save(part, made / f"pytorch_model-{n:05}-of-00002.bin")
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "tokenizer.model").write_bytes(vocabulary)
    return made


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


def test_the_tokenizer_is_sentencepieces(folder, tmp_path, vocabulary):
    _, tok = load(str(baichuan_to_llama(folder, tmp_path / "out", True)), device="cpu")
    own = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    for text in [*LINES, "  two  spaces é 😀", "<reserved_106>在四十巴时打开。<reserved_107>40 bar"]:
        assert tok(text).input_ids == own.encode(text)
    assert (tok.bos_token_id, tok.eos_token_id, len(tok)) == (1, 2, 400)


def test_alibi_is_refused(folder, tmp_path):
    "13B models have no max_position_embeddings."
    config = {name: value for name, value in CONFIG.items() if name != "max_position_embeddings"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="ALiBi"):
        baichuan_to_llama(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
