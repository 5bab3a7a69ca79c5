"""Families of models, tiny and random, through the package's own steps.

Truths: each document alone by plain attention, transformers' prompts, plain transformers on the saved folder, and
llama.cpp. The recorder (tools/record_families.py) takes every family through every step; here every family takes the
quick ones, and three families the slow ones."""

import json

import pytest
import torch
from fixtures.conformance import STEPS, Case, logits, outcome
from fixtures.small_families import KINDS, LINES, WINDOW

from domain_llm.core import InputError, read_json
from domain_llm.models import load
from domain_llm.results import load_result
from domain_llm.ship.pieces import for_converter, is_sentencepiece, sentencepiece_model
from domain_llm.train.batches import documents_apart

QUICK = ("load", "template", "begin and end", "packed", "LoRA targets")
TRAINED = ("GLM-4", "Gemma 2")  # fused gate and rotation of a part; soft caps, windows and norms on both sides
CHARACTERS = ("Llama 2", "Mistral 0.1", "Gemma 3")  # SentencePiece's tokenizers


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    "The case of a family by its name, made once."
    made = {}

    def named(name):
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp("families") / "case")
        return made[name]

    return named


@pytest.mark.parametrize("name", KINDS)
def test_every_family_takes_the_quick_steps(case, name):
    found = {step: outcome(step, case(name)) for step in QUICK}
    assert {step: o["said"] for step, o in found.items() if o["result"] != "passed"} == {}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("step", ("full", "LoRA", "QLoRA", "merge", "reload"))
def test_a_family_is_trained_merged_and_reloaded(case, name, step):
    STEPS[step](case(name))


def test_new_pieces_where_the_tokenizer_has_bytes(case):
    STEPS["vocabulary"](case("GLM-4"))
    with pytest.raises(InputError, match="byte-level BPE"):
        STEPS["vocabulary"](case("Llama 2"))


@pytest.mark.parametrize("name", ("Gemma 2", "GLM-4", "ChatGLM3"))
def test_a_file_computes_as_transformers(case, name):
    """Soft caps, a window in every other layer, and a tokenizer whose tokenizer.model is made again; a rotation and a
    norm that the converter reads under other names; a GLM whose tokenizer is SentencePiece's."""
    STEPS["llama.cpp"](case(name))


def test_a_file_of_a_converted_model_reads_its_turns(case):
    STEPS["llama.cpp's text"](case("Baichuan 2"))


@pytest.mark.parametrize("name", ("Mistral 0.1", "Gemma 2", "Gemma 3"))
def test_the_window_matters(case, name):
    "Without it the logits differ, but only behind it: so the packed step would see a window that is lost."
    own, ids = case(name), [i for row in case(name).rows for i in row["input_ids"]][: 2 * WINDOW]
    from copy import deepcopy

    wide = deepcopy(own.model)
    wide.config.sliding_window = 10 * WINDOW
    for layer in wide.model.layers:
        if hasattr(layer.self_attn, "sliding_window"):
            layer.self_attn.sliding_window = layer.self_attn.sliding_window and 10 * WINDOW
    gap = (logits(own.model, ids) - logits(wide, ids)).abs().amax(-1)
    assert gap[:WINDOW].max() < 1e-4 < 1e-2 < gap[WINDOW + 1 :].max()


def test_a_window_inside_a_model_of_several_kinds_is_seen(case):
    "Gemma 3 of 4B and more is a model of pictures and text, whose window stands in the configuration of the text."
    from transformers import Gemma3Config, Gemma3TextConfig

    model = case("Gemma 3").model
    text = model.config
    assert isinstance(text, Gemma3TextConfig)
    both = Gemma3Config(text_config=text, attn_implementation="sdpa")
    assert getattr(both, "sliding_window", None) is None and both.get_text_config().sliding_window == WINDOW
    model.config, both._attn_implementation = both, "sdpa"
    try:
        with documents_apart(model):
            assert model.config._attn_implementation == "sdpa"
    finally:
        model.config = text


@pytest.mark.parametrize("name", CHARACTERS)
def test_the_pieces_of_sentencepiece_are_made_again(case, name):
    "The file made of tokenizer.json cuts texts as the one from which the tokenizer came."
    from sentencepiece import SentencePieceProcessor

    spec = read_json(case(name).path / "tokenizer.json")
    first = SentencePieceProcessor(str(case(name).path / "tokenizer.model"))
    again = SentencePieceProcessor(model_proto=sentencepiece_model(spec))
    text = "Open the valve. 潮汐 é 😀 12 Gease  beare" + " ".join(LINES)
    assert again.encode(text, out_type=str) == first.encode(text, out_type=str)
    assert all(again.is_byte(i) == first.is_byte(i) for i in range(400))
    assert again.is_control(spec["model"]["vocab"]["<eos>" if name == "Gemma 3" else "</s>"])


def test_a_file_ends_where_llama_cpp_would_leave_the_window(case, tmp_path):
    view = for_converter(case("Mistral 0.1").path, tmp_path / "a")
    assert read_json(view / "config.json")["max_position_embeddings"] == WINDOW
    assert read_json(case("Mistral 0.1").path / "config.json")["max_position_embeddings"] == 256
    assert for_converter(case("Llama 3").path, tmp_path / "b") == case("Llama 3").path
    assert read_json(for_converter(case("Gemma 2").path, tmp_path / "c") / "config.json")["sliding_window"] == WINDOW
    assert not is_sentencepiece(read_json(case("Qwen3").path / "tokenizer.json"))


def test_a_family_without_a_class_is_refused(case, tmp_path):
    "ChatGLM3 brings code of its own; the sentence says so."
    folder = tmp_path / "chatglm3"
    folder.mkdir()
    config = dict(model_type="chatglm", architectures=["ChatGLMModel"], auto_map={"AutoConfig": "c.ChatGLMConfig"})
    (folder / "config.json").write_text(json.dumps(config))
    case("Llama 3").tok.save_pretrained(folder)
    with pytest.raises(InputError, match="trust_remote_code"):
        load(str(folder), device="cpu")


def test_the_record_holds_every_family_and_step():
    record = load_result("families")["families"]
    assert list(record) == list(KINDS)
    for row in record.values():
        assert list(row["steps"]) == list(STEPS)
        assert all(step["said"] for step in row["steps"].values() if step["result"] != "passed")


def test_a_step_can_fail(case):
    "A model whose packed documents see each other does not pass, and the remark says by how much."
    from copy import copy

    broken = copy(case("Llama 3"))
    broken.model = Blind(broken.model)
    found = outcome("packed", broken)
    assert found["result"] == "failed" and "nats" in found["said"]


class Blind(torch.nn.Module):
    "A model that does not heed where documents begin."

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids, position_ids=None, use_cache=False, **kw):
        return self.inner(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)

    def set_attn_implementation(self, name):
        pass
