"""Chat or base: the sum of weights by hand, pairs that are none, the recipe's keys, the rule of thumb."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures.pairs import is_sum, moved, saved, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from domain_llm import cli
from domain_llm.core import InputError, read_json
from domain_llm.models import is_adapter, load, tiny
from domain_llm.run import keep
from domain_llm.run.families import family_size, known_model
from domain_llm.run.plan import GPU, disk_parts
from domain_llm.run.preflight import preflight_of, start_findings
from domain_llm.run.recipe import check_recipe
from domain_llm.run.stages import identities, marks, stages
from domain_llm.train.loop import add_lora
from domain_llm.train.start import add_chat_vector, advise, check_pair, crossover, described, in_chat_format

# The sum


@pytest.mark.parametrize("shard", ["5GB", "2MB"])
def test_the_sum_is_that_by_hand_and_loads_in_plain_transformers(pair, tok, tmp_path, shard):
    chat = load(str(pair["chat"]), device="cpu")[0]
    mine = dict(pair, chat=saved(chat, tok, tmp_path / "chat", max_shard_size=shard))
    tuned = saved(moved(load(str(pair["base"]), device="cpu")[0], 2), tok, tmp_path / "tuned")
    out = add_chat_vector(tuned, mine["base"], mine["chat"], tmp_path / "out")
    assert is_sum(out, tuned, mine)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in mine["chat"].iterdir())
    model, theirs = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight and theirs.chat_template == tok.chat_template
    assert model.generation_config.eos_token_id == tok.eos_token_id == theirs.eos_token_id


def test_what_training_left_alone_is_the_chat_models_to_the_bit(pair, tmp_path):
    out = add_chat_vector(pair["base"], pair["base"], pair["chat"], tmp_path / "out")
    one, other = weights(out), weights(pair["chat"])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_is_merged_first(pair, tok, tmp_path):
    model = add_lora(load(str(pair["base"]), device="cpu")[0], rank=4, alpha=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    tuned = saved(model, tok, tmp_path / "tuned")
    assert is_adapter(tuned) and not is_adapter(add_chat_vector(tuned, *pair.values(), tmp_path / "out"))
    assert is_sum(tmp_path / "out", tuned, pair) and not is_sum(tmp_path / "out", pair["base"], pair)
    assert not (tmp_path / "out" / "whole").exists()


def test_weights_of_16_bits_are_summed_in_32_and_stay_16(pair, tok, tmp_path):
    half = {name: load(str(f), device="cpu")[0].bfloat16() for name, f in pair.items()}
    made = {name: saved(model, tok, tmp_path / name) for name, model in half.items()}
    tuned = saved(moved(half["base"], 3), tok, tmp_path / "tuned")
    out = add_chat_vector(tuned, made["base"], made["chat"], tmp_path / "out")
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    found, one, base, chat = (weights(f) for f in (out, tuned, made["base"], made["chat"]))
    for name in found:
        assert torch.equal(found[name], (chat[name] + (one[name] - base[name])).float().bfloat16().double())


def test_nothing_is_overwritten_and_nothing_half_done_is_left(pair, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists already"):
        add_chat_vector(pair["base"], *pair.values(), tmp_path / "mine")
    with pytest.raises(InputError, match="no model"):
        add_chat_vector(tmp_path / "nothing", *pair.values(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# Pairs that are none


def other_model(tok, **changed):
    "A random model like `tiny` but for some settings."
    config = LlamaConfig.from_dict(tiny(tok).config.to_dict() | changed)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "changed, says",
    [
        (dict(num_hidden_layers=3), "num_hidden_layers is 2 in one and 3 in the other"),
        (dict(hidden_size=32, head_dim=16), "hidden_size is 64 in one and 32 in the other"),
        (dict(num_attention_heads=8, head_dim=8, num_key_value_heads=4), "num_attention_heads is 4 in one and 8"),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), "rope_parameters is"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is True in one and False"),
        (dict(vocab_size=49160), r"49,152 and 49,160 rows.*resize_token_embeddings\(49160\)"),
    ],
)
def test_the_first_difference_is_named(pair, tok, tmp_path, changed, says):
    other = saved(other_model(tok, **changed), tok, tmp_path / "other")
    with pytest.raises(InputError, match=says):
        add_chat_vector(pair["base"], pair["base"], other, tmp_path / "out")
    with pytest.raises(InputError, match=says):
        check_pair(described(str(pair["base"])), described(str(other)))
    assert not (tmp_path / "out").exists()


def test_the_shorter_embedding_is_the_one_to_resize_and_then_the_two_fit(pair, tok, tmp_path):
    longer = saved(other_model(tok, vocab_size=49160), tok, tmp_path / "longer")
    with pytest.raises(InputError, match=f"load {pair['base']}, call"):
        check_pair(described(str(pair["base"])), described(str(longer)))
    model = load(str(pair["base"]), device="cpu")[0]
    model.resize_token_embeddings(49160)
    resized = saved(model, tok, tmp_path / "resized")
    out = add_chat_vector(resized, resized, longer, tmp_path / "out")
    assert weights(out)["model.embed_tokens.weight"].shape == (49160, 64)


def test_tokens_with_other_numbers_are_no_pair(pair, tmp_path):
    other = shutil.copytree(pair["chat"], tmp_path / "other")
    words = read_json(other / "tokenizer.json")
    vocab = words["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=r"the token 'Ġthe' is number \d+ in one and number \d+ in the other"):
        check_pair(described(str(pair["base"])), described(str(other)))


def test_a_tensor_that_one_model_lacks_or_has_in_another_shape_is_named(pair, tok, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pair["chat"], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for broken, says in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks the tensor {name}"),
        (tensors | {name: tensors[name][:-1].contiguous()}, rf"{name} has the shape \(159, 64\)"),
        (tensors | {"extra": tensors[name].clone()}, "has the tensor extra"),
    ):
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=says):
            add_chat_vector(pair["base"], pair["base"], folder, tmp_path / "out")


def test_buffers_and_a_tied_head_in_an_older_file_are_no_difference(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pair["chat"], tmp_path / "older")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = add_chat_vector(pair["base"], pair["base"], folder, tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == load_file(pair["chat"] / "model.safetensors").keys()


# The format


def test_a_base_model_stops_where_its_chat_model_stops(pair, tok, tmp_path):
    model, own = load(str(pair["base"]), device="cpu")
    assert not own.chat_template and model.generation_config.eos_token_id != tok.eos_token_id
    theirs = in_chat_format(model, str(pair["chat"]))
    assert theirs.chat_template == tok.chat_template and model.generation_config.eos_token_id == [tok.eos_token_id]
    several = shutil.copytree(pair["chat"], tmp_path / "several")
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(several)
    in_chat_format(model, str(several))
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2, 0]
    (several / "generation_config.json").unlink()
    said = read_json(several / "config.json") | dict(eos_token_id=None)
    (several / "config.json").write_text(json.dumps(said))
    in_chat_format(model, str(several))
    assert model.generation_config.eos_token_id == [tok.eos_token_id]


def test_an_adapter_that_brings_the_chat_tokenizer_stops_at_its_end(pair, tok, tmp_path):
    model = add_lora(load(str(pair["base"]), device="cpu")[0], rank=2, alpha=2)
    found, own = load(str(saved(model, tok, tmp_path / "adapter")), device="cpu")
    assert own.eos_token_id == tok.eos_token_id and tok.eos_token_id in found.generation_config.eos_token_id


# The recipe's keys

PAIR = dict(model="owner/base", chat_model="owner/chat")


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(sft=dict(start="chat")), "sft.start is chat, but it names no chat model"),
        (dict(chat_vector=True), "chat_vector is true, but it names no chat model"),
        (PAIR | dict(sft=dict(start="chat"), chat_vector=True), "would add it twice"),
        (PAIR | dict(chat_model="owner/base"), "are both owner/base"),
        (PAIR | dict(demo=None, data=dict(documents="."), sft=dict(start="chat")), "there is no fine-tuning"),
        (dict(model="small-world", chat_model="owner/chat"), "drawn by the seed"),
        (dict(sft=dict(start="chta")), "must be base or chat.*did you mean 'chat'"),
        (dict(chat_modle="x"), "did you mean 'chat_model'"),
        (dict(chat_vector="yes"), "must be true or false"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(given, says, tmp_path):
    with pytest.raises(InputError, match=says):
        check_recipe(dict(demo=8, output=str(tmp_path / "out")) | given)


OF_OLD = dict(  # of a recipe without the keys, computed by the code before there were such keys
    baseline="36137ce79dd472d0",
    pretrain="8c7f9dd0e9e44ca1",
    sft="b165b5c16906b0c4",
    evaluate="9c5e60b2e04b46fe",
    screen="2c05f71a75e80078",
    answers="558971f86ef0d9f6",
    quantize="005c24457b39ca2c",
)


def test_a_recipe_without_the_keys_has_the_fingerprints_of_old(monkeypatch):
    monkeypatch.setattr(keep, "content", lambda out, path: "x")
    old = dict(demo=8, model="owner/name", evaluate=dict(screen=True))

    def fingerprints(**more):
        cfg = check_recipe(old | more)
        plan, models = stages(cfg), identities(cfg)
        return {n: marks(cfg, n, stage, cfg["output"], models)[0] for n, stage in plan.items() if n != "report"}

    found = fingerprints()
    assert {name: found[name] for name in OF_OLD} == OF_OLD
    assert fingerprints(chat_model="owner/chat")["pretrain"] != OF_OLD["pretrain"]
    with_pair = fingerprints(chat_model="owner/chat")
    from_chat = fingerprints(chat_model="owner/chat", sft=dict(start="chat"))
    assert [n for n in with_pair if with_pair[n] != from_chat[n]] == ["sft"]
    added = fingerprints(chat_model="owner/chat", chat_vector=True)
    assert [n for n in added if added[n] != with_pair.get(n)] == ["chat_vector"]


# Before a run


def errors(cfg, folder):
    for name in ("questions", "instructions"):
        (folder / "inputs" / name).mkdir(parents=True, exist_ok=True)
        (folder / "inputs" / name / "rows.jsonl").write_text("")
    return [f["said"] for f in preflight_of(cfg, folder) if f["level"] == "error"]


def test_a_base_model_without_a_template_asks_for_its_chat_model(pair, tok, tmp_path):
    alone = dict(demo=8, model=str(pair["base"]), output=str(tmp_path / "out"), quantize=False)
    (said,) = errors(check_recipe(alone), tmp_path)
    assert "has no chat template" in said and "write chat_model: NAME" in said
    assert errors(check_recipe(alone | dict(chat_model=str(pair["chat"]))), tmp_path) == []
    wide = saved(other_model(tok, hidden_size=32, head_dim=16), tok, tmp_path / "wide")
    (said,) = errors(check_recipe(alone | dict(chat_model=str(wide))), tmp_path)
    assert "hidden_size is 64 in one and 32 in the other" in said
    (said,) = errors(check_recipe(alone | dict(chat_model="nobody/nothing")), tmp_path)
    assert "nobody/nothing is not in the cache" in said


def test_the_note_names_the_start_and_the_rule():
    cfg = check_recipe(PAIR | dict(demo=8, sft=dict(start="chat")))
    gpu, size = dict(kind="cuda", free=80e9, half=2), family_size(known_model("Qwen/Qwen3-1.7B"))
    (note,) = start_findings(cfg, 300, size, gpu)
    assert note["level"] == "note" and "starts from owner/chat" in note["said"] and "a chat model" in note["said"]
    (note,) = start_findings(check_recipe(PAIR | dict(demo=8)), 200_000, size, gpu)
    assert "starts from owner/base" in note["said"] and "would start from a base model" in note["said"]
    assert start_findings(check_recipe(dict(demo=8, sft=False)), 300, size, gpu) == []


def test_the_disk_holds_the_sums_too():
    size = dict(parameters=1e9, embedding=1e8, matrices=[(100, 100)])
    model = 2e9  # bytes of 16 bits a parameter

    def most(**more):
        return sum(disk_parts(check_recipe(PAIR | dict(demo=8, quantize=False) | more), size, GPU).values())

    lora, full = dict(method="lora"), dict(method="full")
    assert most(sft=full | dict(start="chat")) == most(sft=full) + model
    assert most(pretrain=False, sft=full | dict(start="chat")) == most(pretrain=False, sft=full)
    with_vector = most(pretrain=False, sft=lora, chat_vector=True)
    assert with_vector == pytest.approx(most(pretrain=False, sft=lora) + 2 * model, rel=1e-3)  # an adapter is merged


# The rule of thumb


@pytest.mark.parametrize(
    "asked, start, method",
    [
        (dict(samples=1), "chat", "lora"),
        (dict(samples=5_000), "chat", "lora"),
        (dict(samples=5_001), "either", "lora"),
        (dict(samples=99_999), "either", "lora"),
        (dict(samples=100_000), "base", "full"),
        (dict(samples=100_000, known=True), "either", "lora"),
        (dict(samples=5_000, known=True), "chat", "lora"),
        (dict(samples=200_000, parameters=7e9, memory=80), "either", "lora"),  # 112 GB do not fit
        (dict(samples=200_000, parameters=7e9, memory=113), "base", "full"),
        (dict(samples=200_000, parameters=7e9, memory=80, gpus=8), "base", "full"),  # 14 GB on each
        (dict(samples=200_000, parameters=70e9, memory=80, gpus=8), "either", "none"),  # 140 GB on each, LoRA 210
        (dict(samples=2_000, parameters=7e9, memory=16), "chat", "none"),
        (dict(samples=2_000, parameters=1e9, memory=80), "chat", "lora"),  # not all weights of a chat model
    ],
)
def test_the_rule_by_samples_and_machine(asked, start, method):
    found = advise(**asked)
    assert (found["start"], found["method"]) == (start, method)
    text = " ".join(found["reasons"])
    assert "No published experiment was found" in text and "domain-llm ablate start" in text
    assert ("Biderman" in text) == (method == "lora") and "Shadow-FT" in text


def test_reasons_name_the_machine():
    text = " ".join(advise(2_000, parameters=7e9, memory=24, gpus=4)["reasons"])
    assert "about 28 GB" in text and "LoRA about 21 GB" in text and "divided among 4 GPUs" in text
    assert "the machine has 24 GB" in " ".join(advise(2_000, parameters=7e9, memory=24, gpus=0)["reasons"])
    for wrong in (
        dict(samples=0),
        dict(samples=10, gpus=-1),
        dict(samples=10, memory=0),
        dict(samples=10, parameters=-1),
    ):
        with pytest.raises(InputError, match="no advice for"):
            advise(**wrong)


def test_the_command_counts_a_file(tmp_path, capsys):
    row = json.dumps(dict(instruction="问：液压油？", output="菜籽油。"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{row}\n" * 3, encoding="utf-8")
    assert cli.main(["chat-or-base", str(tmp_path / "a.jsonl")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("start from the chat model\ntrain: an adapter") and "3 samples" in said
    assert cli.main(["chat-or-base", "100k", "--parameters", "1B", "--memory", "80"]) == 0
    assert capsys.readouterr().out.startswith("start from the base model\ntrain: all weights")
    for wrong in (["chat-or-base", "many"], ["chat-or-base", "5k", "--parameters", "x"], ["chat-or-base", "0.0"]):
        assert cli.main(wrong) == 2


@pytest.mark.parametrize(
    "ahead, behind, at",
    [
        ([0.5, 0.6, 0.7], [0.3, 0.5, 0.8], 128),  # 0.1 ahead at 64, 0.1 behind at 256: half way in the logarithm
        ([0.5, 0.6, 0.7], [0.3, 0.5, 0.7], None),  # level is no lead
        ([0.5, 0.6, 0.7], [0.5, 0.7, 0.8], 16),
        ([0.5, 0.6, 0.7], [0.3, 0.5, 0.6], None),
    ],
)
def test_crossovers_by_hand(ahead, behind, at):
    assert crossover([16, 64, 256], ahead, behind) == (at if at is None else pytest.approx(at))


def test_the_advice_quotes_the_record():
    "Its points and intervals are those of the recorded experiment."
    claims = read_json(Path(__file__).parent.parent / "nbs" / "results" / "start.json")["claims"]
    said = "\n".join(advise(100)["reasons"])
    for samples in (16, 64):
        claim = next(c for c in claims if c["text"] == f"{samples} samples teach a chat model more than its base")
        points, low, high = (round(100 * claim[key]) for key in ("diff", "low", "high"))
        assert f"{points} points ({low} to {high}) with {samples}" in said
