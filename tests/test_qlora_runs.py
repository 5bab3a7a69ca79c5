"""Runs with weights of 4 bits: what they write, what a kill changes, what is refused before they start."""

import os
import signal
import subprocess
import time
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from domain_llm.core import read_json, write_json
from domain_llm.models import base_of, load, tiny
from domain_llm.run import training
from domain_llm.run.base_model import sizes
from domain_llm.run.pipeline import final_model, run_recipe
from domain_llm.run.plan import CPU, GPU, memory_parts
from domain_llm.run.preflight import extras_findings, method_findings, settings_findings, with_checkpointing
from domain_llm.run.recipe import check_recipe
from domain_llm.run.settings import identifying
from domain_llm.run.training import Job, checkpointing_of, texts_of
from domain_llm.small_world import small_tokenizer
from domain_llm.train.loop import TRAIN_DEFAULTS, add_lora
from domain_llm.train.pretrain import make_probe
from domain_llm.train.qlora import load_for

SMALL = dict(method="qlora", length=128, tokens_per_step=256, probes=3, learning_rate=3e-3, rank=4)
SMALL["forgetting_budget"] = 100


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    "A random model over the tokenizer of the small world."
    folder, tok = tmp_path_factory.mktemp("small") / "model", small_tokenizer()
    tiny(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def recipe(model, **more):
    return (
        dict(
            name="small",
            demo=8,
            model=str(model),
            mix=dict(parts=dict(domain=1), tokens=2000),
            pretrain=SMALL,
            sft=dict(SMALL, length=256, probes=2, epochs=0.5),
            evaluate=dict(questions=8, probe_tokens=100),
            quantize=dict(types=["q8_0"]),
        )
        | more
    )


def run(folder, given):
    "The folder of a run of a recipe."
    path, out = folder / "r.yaml", folder / "out"
    path.write_text(yaml.safe_dump(given))
    run_recipe(path, out)
    return out


@pytest.fixture(scope="module")
def whole(small_folder, tmp_path_factory):
    "A run with qlora in both stages, to a GGUF file."
    pytest.importorskip("bitsandbytes")
    return run(tmp_path_factory.mktemp("whole"), recipe(small_folder))


def update_of(adapter):
    "What an adapter adds to each weight, by the weight's name, from its files alone."
    saved, said = load_file(adapter / "adapter_model.safetensors"), read_json(adapter / "adapter_config.json")
    out = {}
    for name, a in saved.items():
        if "lora_A" in name:
            b = saved[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            out[weight] = said["lora_alpha"] / said["r"] * b @ a
    return out


def is_merged(folder, base, adapter):
    "Whether a folder holds the base model's own, unrounded weights with what an adapter adds to them."
    found, exact = (load_file(p / "model.safetensors") for p in (folder, base))
    update = update_of(adapter)
    assert update.keys() < found.keys() == exact.keys()
    return all(torch.allclose(w, exact[n] + update.get(n, 0), atol=1e-5) for n, w in found.items())


def test_every_adapter_is_merged_into_unrounded_weights(whole, small_folder):
    pretrained, tuned, between = whole / "pretrain/model", final_model(whole), whole / "sft/base"
    assert base_of(pretrained) == str(small_folder) and base_of(tuned) == str(between)
    assert "quantization_config" not in read_json(between / "config.json")
    assert is_merged(between, small_folder, pretrained)
    merged, exact = load(str(tuned), device="cpu")[0].state_dict(), load_file(between / "model.safetensors")
    update = update_of(tuned)
    assert any(u.abs().max() > 1e-3 for u in update.values())
    for name, u in update.items():
        assert torch.allclose(merged[name], exact[name] + u, atol=1e-5)


def test_the_run_measures_and_writes_the_merged_model_and_says_its_method(whole):
    made = read_json(whole / "quantize" / "manifest.json")["metrics"]
    (file,) = (whole / "quantize").rglob("*.gguf")
    assert made["q8_0_mb"] > 0 and file.name in (file.parent / "SERVE.md").read_text()
    assert f"FROM ./{file.name}" in file.with_suffix(".Modelfile").read_text()
    card = (whole / "MODEL_CARD.md").read_text()
    assert "Continued pre-training (qlora" in card and "Supervised fine-tuning (qlora" in card and "4 bits" in card


def test_probes_measure_the_rounded_model(whole, small_folder):
    read = dict(held_out=whole / "corpus/held_out.jsonl", general_probe=whole / "inputs/general_probe/rows.jsonl")
    probe = make_probe(small_tokenizer(), **texts_of({}, read, 100)[0])
    rounded, exact = (probe(load_for(method, str(small_folder))[0]) for method in ("qlora", "full"))
    history = read_json(whole / "pretrain" / "history.json")
    assert history[0]["domain_bpb"] == pytest.approx(rounded["domain_bpb"], rel=1e-6) != exact["domain_bpb"]
    assert history[-1]["domain_bpb"] < history[0]["domain_bpb"]


def figures(out):
    return {k: v for k, v in read_json(out / "metrics.json").items() if k != "seconds"}


def killed_after_a_checkpoint(path, out, stage):
    "Start a run, and SIGKILL it once a checkpoint of a stage is whole; gives what it had printed."
    with open(out.parent / "log", "w") as log:
        command = ["domain-llm", "run", str(path), "--output", str(out)]
        p = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        ended = time.time() + 200
        while not list((out / stage / "checkpoints").glob("checkpoint-*/seal.json")):
            assert p.poll() is None and time.time() < ended, (out.parent / "log").read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()


def test_a_run_that_is_killed_in_both_trainings_ends_as_one_that_was_not(whole, tmp_path):
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(yaml.safe_load((whole.parent / "r.yaml").read_text()) | dict(quantize=False)))
    for stage in ("pretrain", "sft"):
        killed_after_a_checkpoint(path, out, stage)
        assert not (out / stage / "manifest.json").exists()
    run_recipe(path, out)
    assert figures(out) == figures(whole)
    for stage in ("pretrain", "sft"):
        one, other = (load_file(o / stage / "model" / "adapter_model.safetensors") for o in (out, whole))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_rows_of_new_pieces_are_trained_beside_rounded_weights(small_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    given = recipe(small_folder, vocab=dict(pieces=40), sft=False, quantize=False)
    out = run(tmp_path, given)
    before = AutoModelForCausalLM.from_pretrained(out / "vocab/model").model.embed_tokens.weight
    after = load(str(final_model(out)), device="cpu")[0].model.embed_tokens.weight
    moved = (before != after).any(1).nonzero()[:, 0].tolist()
    assert moved and set(moved) <= set(range(1024, 1064))


def test_the_merged_model_between_two_stages_keeps_the_numbers_of_its_base(small_folder, tmp_path):
    "Files in bfloat16 stay in bfloat16, half the size of 32 bits."
    half, tok = tmp_path / "half", small_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.bfloat16)
    for folder in (half, tmp_path / "adapter"):
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        model = add_lora(load(str(half))[0], 2, 2)
    cfg = check_recipe(recipe(half))
    base = training._start_of_sft(cfg, dict(start=tmp_path / "adapter"), tmp_path)
    assert {w.dtype for w in load_file(f"{base}/model.safetensors").values()} == {torch.bfloat16}


def test_rounding_does_not_count_as_forgetting(tmp_path):
    "After full tuning to 1.10 bits from 1.00, a start that rounding puts at 1.21 has the base model at 1.10."
    (tmp_path / "checkpoints").mkdir()
    history = tmp_path / "history.json"
    write_json(history, [dict(general_bpb=1.00), dict(loss=2.0), dict(general_bpb=1.10)])
    read = dict(history=history)
    for method, reference in (("lora", 1.00), ("qlora", 1.10)):
        job = Job({}, dict(method=method), read, tmp_path, "x")
        assert training._reference(job, lambda: 1.21) == pytest.approx(reference)
    write_json(tmp_path / "vocab.json", dict(before=dict(general_bpb=0.90), after=dict(general_bpb=0.99)))
    job = Job({}, dict(method="qlora"), dict(vocab=tmp_path / "vocab.json"), tmp_path, "x")
    assert training._reference(job, lambda: 1.10) == pytest.approx(1.00)
    assert training._reference(Job({}, dict(method="qlora"), {}, tmp_path, "x"), lambda: 1 / 0) is None


# Gradient checkpointing in a run

SEVEN = dict(parameters=7.6e9, embedding=1e9, vocabulary=152_064, layers=28, heads=28)
SEVEN["matrices"] = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584)] * 28
SEVEN["matrices"] += [(3584, 18944), (3584, 18944), (18944, 3584)] * 28


def test_checkpointing_is_on_where_nine_tenths_of_the_memory_do_not_suffice():
    set_ = {**TRAIN_DEFAULTS, "method": "lora"}
    device = dict(kind="cuda", half=2)
    need = sum(memory_parts({**set_, "gradient_checkpointing": False}, SEVEN, {**device, "free": 1}).values())
    for free, on in ((need / 0.89, False), (need / 0.91, True)):
        device["free"] = free
        assert checkpointing_of(set_, SEVEN, device) is on
        cfg = with_checkpointing(check_recipe(dict(demo=8, sft=False, pretrain=dict(method="lora"))), SEVEN, device)
        assert cfg["pretrain"]["gradient_checkpointing"] is on
    for said in (True, False):
        assert checkpointing_of({**set_, "gradient_checkpointing": said}, SEVEN, dict(device, free=1)) is said


@pytest.mark.parametrize("free, on", [(1, True), (1e15, False)])
def test_a_stage_decides_by_the_memory_of_its_device(small_folder, monkeypatch, free, on):
    model = load(str(small_folder))[0]
    monkeypatch.setattr(training, "this_device", lambda: dict(kind="cpu", half=4, free=free))
    assert training._checkpoints(TRAIN_DEFAULTS, model) is on
    model.supports_gradient_checkpointing = False
    assert training._checkpoints(TRAIN_DEFAULTS, model) is False
    assert training._checkpoints({**TRAIN_DEFAULTS, "gradient_checkpointing": True}, model) is True


def test_a_result_does_not_depend_on_checkpointing_and_older_results_stand():
    cfg = check_recipe(dict(demo=8))
    for stage in ("pretrain", "sft"):
        old = {
            k: v for k, v in cfg[stage].items() if k not in ("gradient_checkpointing", "batch", "optimizer", "start")
        }
        for said in (True, False, "auto"):
            now = identifying({stage: {**cfg[stage], "gradient_checkpointing": said}})
            assert now == {stage: old}
        assert identifying({stage: {**cfg[stage], "batch": 2}}) == {stage: {**old, "batch": 2}}


# Before a run


def said(found, level):
    return [f["said"] for f in found if f["level"] == level]


def test_qlora_without_bitsandbytes_is_an_error_with_the_command(small_folder):
    cfg = check_recipe(recipe(small_folder, pretrain=False, quantize=False))
    with patch("domain_llm.run.base_model.find_spec", lambda m: None if m == "bitsandbytes" else True):
        (error,) = said(extras_findings(cfg), "error")
    assert "bitsandbytes" in error and 'pip install -e ".[gpu]"' in error and "method: qlora" in error


def test_qlora_of_weights_that_no_file_holds_is_an_error(small_folder, tmp_path):
    small = sizes(tiny(small_tokenizer()).config)
    drawn = check_recipe(recipe("small-world"))
    assert "drawn by the seed" in said(method_findings(drawn, small, CPU), "error")[0]
    add_lora(load(str(small_folder))[0], 2, 2).save_pretrained(tmp_path / "adapter")
    on_adapter = check_recipe(recipe(tmp_path / "adapter"))
    assert "is an adapter" in said(method_findings(on_adapter, small, CPU), "error")[0]
    later = check_recipe(recipe(tmp_path / "adapter", pretrain=dict(SMALL, method="lora")))
    assert method_findings(later, small, CPU) == []  # fine-tuning starts from files that pre-training wrote
    assert method_findings(check_recipe(recipe(small_folder)), small, CPU) == []


def test_full_tuning_of_a_large_model_is_a_warning_with_the_line_to_write(small_folder):
    cfg = check_recipe(dict(demo=8, model=str(small_folder)))
    (warned,) = said(method_findings(cfg, SEVEN, GPU), "warning")
    assert "7.6 billion" in warned and "pretrain: {method: lora}" in warned and "qlora" in warned
    assert method_findings(cfg, dict(SEVEN, parameters=0.9e9), GPU) == []


def test_a_batch_that_does_not_divide_a_step_is_an_error_with_what_to_write(small_folder):
    for batch, tokens, write in ((3, 512, 768), (8, 512, 1024)):
        set_ = dict(length=128, tokens_per_step=tokens, batch=batch)
        cfg = check_recipe(dict(demo=8, model=str(small_folder), pretrain=set_, sft=False))
        assert f"tokens_per_step: {write}," in said(settings_findings(cfg), "error")[0]
    cfg = check_recipe(dict(demo=8, pretrain=dict(length=128, tokens_per_step=512, batch=4), sft=False))
    assert said(settings_findings(cfg), "error") == []


def test_the_optimizer_of_8_bits_is_refused_on_a_cpu_before_the_run(small_folder):
    small = sizes(tiny(small_tokenizer()).config)
    cfg = check_recipe(dict(demo=8, model=str(small_folder), pretrain=dict(optimizer="adamw8bit"), sft=False))
    assert "Write adamw" in said(method_findings(cfg, small, CPU), "error")[0]
    assert method_findings(cfg, small, GPU) == []
    with patch("domain_llm.run.base_model.find_spec", lambda m: None if m == "bitsandbytes" else True):
        assert "adamw8bit needs bitsandbytes" in said(extras_findings(cfg), "error")[0]
