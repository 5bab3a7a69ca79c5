"""Chat or base: the sum of weights by hand, pairs that are none, the recipe's keys end to end, the rule of thumb."""

import copy
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from domain_llm import cli
from domain_llm.core import InputError, read_json
from domain_llm.models import is_adapter, load, tiny
from domain_llm.run import keep, training
from domain_llm.run.pipeline import final_model, run_recipe
from domain_llm.run.plan import GPU, disk_parts
from domain_llm.run.preflight import preflight_of, start_findings
from domain_llm.run.recipe import check_recipe, model_stages
from domain_llm.run.stages import identities, marks, stages
from domain_llm.train.loop import add_lora
from domain_llm.train.start import add_chat_vector, advise, check_pair, crossover, described, in_chat_format


def moved(model, seed, size=0.02):
    "A copy of a model whose every weight is moved at random."
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw))
    return other


def saved(model, tok, folder, **kw):
    "A model and a tokenizer in a folder."
    model.save_pretrained(folder, **kw)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_tok(tok):
    "The demo model's tokenizer as that of a base model: no template, another end of text."
    plain = copy.deepcopy(tok)
    plain.chat_template = None
    plain.eos_token = "<|endoftext|>"
    return plain


@pytest.fixture(scope="session")
def pair(tok, base_tok, tmp_path_factory):
    "A base model without a chat template and a chat model that was made of it, as folders."
    made, model = tmp_path_factory.mktemp("pair"), tiny(tok)
    model.generation_config.eos_token_id = base_tok.eos_token_id
    chat = moved(model, 1)
    chat.generation_config.eos_token_id = tok.eos_token_id
    return dict(base=saved(model, base_tok, made / "base"), chat=saved(chat, tok, made / "chat"))


def weights(folder):
    "The weights of a model, or of an adapter's model with the adapter in it, as 64-bit numbers by name."
    if is_adapter(folder):
        model = load(str(folder), device="cpu")[0]
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: p.detach().double() for name, p in model.named_parameters()}


def is_sum(folder, tuned, pair, eps=1e-6):
    "Whether a folder holds tuned + chat - base, computed here by hand."
    found, one, base, chat = (weights(f) for f in (folder, tuned, pair["base"], pair["chat"]))
    assert found.keys() == one.keys()
    return all(torch.allclose(found[n], one[n] + chat[n] - base[n], atol=eps, rtol=0) for n in found)


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
    assert theirs.chat_template == tok.chat_template and model.generation_config.eos_token_id == tok.eos_token_id
    several = shutil.copytree(pair["chat"], tmp_path / "several")
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(several)
    in_chat_format(model, str(several))
    assert model.generation_config.eos_token_id == [2, 0]
    (several / "generation_config.json").unlink()
    in_chat_format(model, str(several))
    assert model.generation_config.eos_token_id == tok.eos_token_id


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
    quantize="25080ff3f701bf0c",
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


def recipe(pair, **more):
    "A small recipe of the demo for a pair."
    small = dict(length=128, tokens_per_step=256, probes=1, learning_rate=3e-3, rank=4, forgetting_budget=100)
    return (
        dict(
            name="small",
            demo=8,
            model=str(pair["base"]),
            chat_model=str(pair["chat"]),
            mix=dict(parts=dict(domain=1), tokens=1500),
            pretrain=dict(small, method="full"),
            sft=dict(small, method="lora", length=256, epochs=0.3),
            evaluate=dict(questions=8, probe_tokens=100),
            quantize=False,
        )
        | more
    )


def run(folder, given, out="out"):
    "Run a recipe; gives the folder of the run."
    (folder / "r.yaml").write_text(yaml.safe_dump(given))
    run_recipe(folder / "r.yaml", folder / out)
    return folder / out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_start_from_the_chat_model_brings_what_pretraining_changed(pair, tok, tmp_path, method):
    given = recipe(pair)
    given["pretrain"]["method"] = method
    given["sft"]["start"] = "chat"
    out = run(tmp_path, given)
    assert is_sum(out / "sft" / "base", out / "pretrain" / "model", pair)
    assert read_json(final_model(out) / "adapter_config.json")["base_model_name_or_path"] == str(out / "sft" / "base")
    assert AutoTokenizer.from_pretrained(final_model(out)).chat_template == tok.chat_template
    reads = read_json(out / "sft" / "manifest.json")["reads"]
    assert "history" not in reads  # general text is compared with the chat model, where this training starts
    start = read_json(out / "sft" / "history.json")[0]
    assert start["step"] == 0 and start["general_bpb"] != read_json(out / "pretrain" / "history.json")[0]["general_bpb"]


def test_without_pretraining_the_chat_model_itself_is_the_start(pair, tmp_path):
    given = recipe(pair, pretrain=False)
    given["sft"]["start"] = "chat"
    out = run(tmp_path, given)
    assert not (out / "sft" / "base").exists()
    assert read_json(final_model(out) / "adapter_config.json")["base_model_name_or_path"] == str(pair["chat"])


@pytest.mark.parametrize(
    "more, last",
    [
        (dict(), "sft"),
        (dict(sft=dict(method="full", length=256, tokens_per_step=256, epochs=0.3), pretrain=False), "sft"),
        (dict(sft=False), "pretrain"),
    ],
)
def test_the_chat_vector_is_added_to_what_was_trained_last(pair, tmp_path, capsys, more, last):
    given = recipe(pair, chat_vector=True, **more)
    out = run(tmp_path, given)
    assert final_model(out) == out / "chat_vector" / "model" and is_sum(final_model(out), out / last / "model", pair)
    assert read_json(out / "evaluate" / "manifest.json")["reads"]["model"] == "chat_vector/model"
    assert "chat vector was added" in (out / "MODEL_CARD.md").read_text()
    capsys.readouterr()
    run(tmp_path, given)
    said = capsys.readouterr().out
    assert said.count("unchanged, skipped") == len(stages(check_recipe(given | dict(output=str(out)))))
    assert not list(Path(out).rglob("*.part")) and model_stages(check_recipe(given))[-1] == "chat_vector"


def tree(folder):
    "The files of a run, but for its private folder."
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if keep.PRIVATE not in p.parts}


@pytest.mark.parametrize("key", ["chat_vector", "start"])
def test_killed_at_random_moments_it_ends_the_same(pair, runs, tmp_path, key):
    given = recipe(pair, **(dict(chat_vector=True) if key == "chat_vector" else {}))
    if key == "start":
        given["sft"]["start"] = "chat"
    whole, rng = run(tmp_path, given, "whole"), random.Random(key)
    for _ in range(4):
        runs.run(tmp_path / "r.yaml", tmp_path / "cut", rng.uniform(0.5, 5))
    ended = runs.run(tmp_path / "r.yaml", tmp_path / "cut")
    assert ended == "exit 0", Path(f"{tmp_path / 'cut'}.log").read_text()[-2000:]
    one, other = (weights(final_model(out)) for out in (whole, tmp_path / "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one) and tree(whole) == tree(tmp_path / "cut")


def test_cut_in_the_middle_of_a_sum_it_begins_that_again(pair, tmp_path, monkeypatch):
    real = training.add_chat_vector

    def cut(tuned, base, chat, out, trust):
        (Path(out).parent / "model.abc.part").mkdir()  # what a killed process leaves
        raise KeyboardInterrupt

    given = recipe(pair, chat_vector=True, sft=False)
    monkeypatch.setattr(training, "add_chat_vector", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, given)
    monkeypatch.setattr(training, "add_chat_vector", real)
    monkeypatch.setattr(training, "train", lambda *args, **kw: pytest.fail("trained again"))
    out = run(tmp_path, given)
    assert is_sum(final_model(out), out / "pretrain" / "model", pair) and not list(out.rglob("*.part"))


@pytest.fixture
def hub(pair, tmp_path):
    "A hub cache that holds the pair as owner/base and owner/chat; gives its environment."
    for name, folder in pair.items():
        made = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, made / "snapshots" / "abc")
        (made / "refs").mkdir()
        (made / "refs" / "main").write_text("abc")
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_a_pair_on_the_hub_runs_by_its_names(pair, hub, tmp_path):
    given = recipe(dict(base="owner/base", chat="owner/chat"), pretrain=False, chat_vector=True)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    for command in ("check", "run"):
        argv = ["domain-llm", command, str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")]
        done = subprocess.run(argv, env=hub, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    adapter = tmp_path / "out" / "sft" / "model"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == "owner/base"
    local = shutil.copytree(adapter, tmp_path / "adapter")
    said = read_json(local / "adapter_config.json") | dict(base_model_name_or_path=str(pair["base"]))
    (local / "adapter_config.json").write_text(json.dumps(said))
    assert is_sum(tmp_path / "out" / "chat_vector" / "model", local, pair)


def test_the_three_starts_are_compared_by_the_shipped_experiment(pair, tmp_path, capsys):
    given = recipe(pair, evaluate=dict(questions=40, probe_tokens=100))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    argv = ["ablate", "start", "--recipe", tmp_path / "r.yaml", "--seeds", "1", "--output", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 0, capsys.readouterr().err[-2000:]
    result = read_json(tmp_path / "out" / "result.json")
    assert list(result["runs"]) == ["base", "chat", "chat vector"] and result["chat_model"] == "chat"
    figures = [result["runs"][arm]["0"]["general_bpb"]["values"] for arm in result["runs"]]
    assert figures[0] != figures[1] != figures[2] and result["arms"]["chat"]["sft"]["start"] == "chat"
    assert not [name for name in ("sft", "chat_vector") if (tmp_path / "out" / name).exists()]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({k: v for k, v in given.items() if k != "chat_model"}))
    assert cli.main([str(a) for a in argv]) == 2 and "names no chat model" in capsys.readouterr().err


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
    (said,) = errors(check_recipe(alone | dict(chat_model=str(tmp_path / "none"))), tmp_path)
    assert "none" in said


def test_the_note_names_the_start_and_the_rule():
    cfg = check_recipe(PAIR | dict(demo=8, sft=dict(start="chat")))
    gpu, size = dict(kind="cuda", free=80e9), dict(parameters=1e9)
    (note,) = start_findings(cfg, 300, size, gpu)
    assert note["level"] == "note" and "starts from owner/chat" in note["said"] and "a chat model" in note["said"]
    (note,) = start_findings(check_recipe(PAIR | dict(demo=8)), 200_000, size, gpu)
    assert "starts from owner/base" in note["said"] and "would start from a base model" in note["said"]
    assert start_findings(check_recipe(dict(demo=8, sft=False)), 300, size, gpu) == []


def test_the_disk_holds_the_sums_too():
    size = dict(parameters=1e9, embedding=1e8, matrices=[(100, 100)])
    plain = PAIR | dict(demo=8, quantize=False, pretrain=dict(method="full"), sft=dict(method="full"))

    def final(**more):
        return disk_parts(check_recipe(plain | more), size, GPU)["final models"]

    models = 2e9  # bytes of one model of 16 bits
    assert final(sft=dict(method="full", start="chat")) == final() + models
    added = disk_parts(check_recipe(plain | dict(chat_vector=True, quantize=dict(types=["q8_0"]))), size, GPU)
    assert added["final models"] == 3 * models  # of pre-training, of fine-tuning, and with the vector


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
        (dict(samples=200_000, parameters=7e9, memory=80), "either", "lora"),  # 140 GB do not fit
        (dict(samples=200_000, parameters=7e9, memory=141), "base", "full"),
        (dict(samples=200_000, parameters=7e9, memory=80, gpus=8), "either", "lora"),  # a training uses one GPU
        (dict(samples=2_000, parameters=7e9, memory=16), "chat", "none"),
        (dict(samples=2_000, parameters=1e9, memory=80), "chat", "lora"),  # not all weights of a chat model
    ],
)
def test_the_rule_by_samples_and_machine(asked, start, method):
    found = advise(**asked)
    assert (found["start"], found["method"]) == (start, method)
    text = " ".join(found["reasons"])
    assert "No published experiment was found" in text and "domain-llm ablate start" in text
    assert ("Biderman" in text) == (method == "lora") and ("Shadow-FT" in text) == (start != "base")


def test_reasons_name_the_machine():
    text = " ".join(advise(2_000, parameters=7e9, memory=24, gpus=4)["reasons"])
    assert "about 140 GB" in text and "LoRA about 21 GB" in text and "the other 3 can run" in text
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
        ([0.5, 0.6, 0.7], [0.3, 0.5, 0.7], 256),
        ([0.5, 0.6, 0.7], [0.5, 0.7, 0.8], 16),
        ([0.5, 0.6, 0.7], [0.3, 0.5, 0.6], None),
    ],
)
def test_crossovers_by_hand(ahead, behind, at):
    assert crossover([16, 64, 256], ahead, behind) == (at if at is None else pytest.approx(at))
