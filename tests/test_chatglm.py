"""ChatGLM3 becomes a GLM that computes the same: against a small implementation written from the published architecture
(ChatGLM's modeling_chatglm.py): grouped attention, of which half of each head is rotated in neighbouring pairs, SwiGLU
from one matrix, RMSNorm; and its tokens against SentencePiece and the numbers that its own code gives to marks."""

import json

import pytest
import sentencepiece
import torch
from fixtures.chatglm import CONFIG, PIECES, vocabulary, weights, write
from fixtures.families import LINES

from domain_llm.chatglm import chatglm_to_glm
from domain_llm.core import InputError
from domain_llm.models import load
from domain_llm.train.format import stop_tokens
from domain_llm.train.sft import encode

IDS = list(range(3, 43))
MARKS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["layernorm_epsilon"]).sqrt()


def rotated(x):
    "Of (heads, tokens, width): in the first half of the width each pair of neighbours turns."
    turned = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(0, turned, 2).float() / turned)
    angles = torch.arange(x.shape[1]).float()[:, None] * rates
    a, b = x[..., 0:turned:2], x[..., 1:turned:2]
    pairs = torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
    return torch.cat([pairs.flatten(-2), x[..., turned:]], -1)


def attention(x, w, layer):
    width, heads, groups = CONFIG["kv_channels"], CONFIG["num_attention_heads"], CONFIG["multi_query_group_num"]
    name = layer + "self_attention.query_key_value"
    packed = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    q, k, v = packed.split([heads * width, groups * width, groups * width], -1)
    q = q.view(len(x), heads, width).transpose(0, 1)
    k, v = (t.view(len(x), groups, width).transpose(0, 1).repeat_interleave(heads // groups, 0) for t in (k, v))
    scores = rotated(q) @ rotated(k).transpose(1, 2) / width**0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(len(x), -1) @ w[layer + "self_attention.dense.weight"].T


def chatglm(ids, w):
    "The logits of a ChatGLM3."
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for n in range(CONFIG["num_layers"]):
        layer = f"transformer.encoder.layers.{n}."
        x = x + attention(rms(x, w[layer + "input_layernorm.weight"]), w, layer)
        y = rms(x, w[layer + "post_attention_layernorm.weight"])
        gate, up = (y @ w[layer + "mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[layer + "mlp.dense_4h_to_h.weight"].T
    return rms(x, w["transformer.encoder.final_layernorm.weight"]) @ w["transformer.output_layer.weight"].T


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("spm"))


@pytest.fixture
def folder(tmp_path, pieces):
    return write(tmp_path / "chatglm", pieces)


def test_the_glm_computes_what_chatglm_computes(folder, tmp_path):
    model, _ = load(str(chatglm_to_glm(folder, tmp_path / "out")), device="cpu")
    with torch.no_grad():
        got = model(input_ids=torch.tensor([IDS])).logits[0]
    assert torch.allclose(got, chatglm(torch.tensor(IDS), weights()), atol=1e-4)


def test_texts_and_turns_become_the_ids_of_its_own_code(folder, tmp_path, pieces):
    _, tok = load(str(chatglm_to_glm(folder, tmp_path / "out")), device="cpu")
    own = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    mark = {name: PIECES + n for n, name in enumerate(MARKS)}
    first = [mark["[gMASK]"], mark["sop"]]
    for text in [*LINES, "  two  spaces é 😀"]:
        assert tok(text).input_ids == first + own.encode(text)
    talk = [("system", "Be brief."), ("user", "At what pressure?"), ("assistant", "40 bar."), ("user", "然后呢？")]
    want = list(first)
    for role, text in talk:
        want += [mark[f"<|{role}|>"], *own.encode("\n"), *own.encode(text)]
    turns = [dict(role=role, content=text) for role, text in talk]
    got = tok.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert got == [*want, mark["<|assistant|>"]]
    assert (tok.eos_token_id, tok.unk_token_id) == (2, 0)


@pytest.mark.parametrize(
    "wrong",
    (
        dict(rmsnorm=False),
        dict(add_bias_linear=True),
        dict(padded_vocab_size=None),
        dict(kv_channels=None),
        dict(model_type="glm"),
    ),
)
def test_what_is_built_otherwise_is_refused(folder, tmp_path, wrong):
    config = {name: value for name, value in (CONFIG | wrong).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="built otherwise|not 'chatglm'"):
        chatglm_to_glm(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_token_that_is_trained_as_the_end_stops_the_model(folder, tmp_path):
    out = chatglm_to_glm(folder, tmp_path / "out")
    model, tok = load(str(out), device="cpu")
    talk = [("user", "Which?"), ("assistant", "40 bar."), ("user", "And then?"), ("assistant", "Tallow.")]
    row = encode([dict(role=role, content=text) for role, text in talk], tok)[0]
    ends = [now for now, after in zip(row["labels"], [*row["labels"][1:], -100]) if now != -100 and after == -100]
    assert len(ends) == 2 and set(ends) <= set(model.generation_config.eos_token_id)
    assert set(ends) <= set(stop_tokens(str(out), model.config))


def test_a_tokenizer_of_another_kind_is_refused(folder, tmp_path):
    path = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_prefix=str(path), vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    (folder / "tokenizer.model").write_bytes(path.with_suffix(".model").read_bytes())
    with pytest.raises(InputError, match="no BPE of SentencePiece"):
        chatglm_to_glm(folder, tmp_path / "out")


def test_a_chatglm_that_was_not_converted_says_how(folder):
    with pytest.raises(InputError, match="chatglm_to_glm writes it in the layout of GLM-4"):
        load(str(folder))
