"A model that is larger than the GPU: a part of it stays in main memory."

import gc
import sys
import types
import weakref

import pytest
import torch

from domain_llm import placing
from domain_llm.judge.choice import multiple_choice
from domain_llm.judge.score import bits_per_byte
from domain_llm.models import greedy, load, tiny
from domain_llm.placing import FILLED, dispatched, make_room, placed
from domain_llm.run.families import family_size, known_model
from domain_llm.run.plan import GB, GPU
from domain_llm.run.planner import measured_in_parts, measuring_findings
from domain_llm.run.proposal import proposal
from domain_llm.train.loop import add_lora
from domain_llm.train.qlora import load_for


@pytest.fixture
def gpu(monkeypatch):
    "A GPU: the bytes that are free on it, the models that were moved to it, and the room in which others were placed."
    found = types.SimpleNamespace(free=0, dispatched=[], moved=[])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (found.free, 16 * GB))
    monkeypatch.setattr(placing, "dispatched", lambda model, room: found.dispatched.append(room) or model)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *to, **kw: found.moved.append(*map(str, to)) or model)
    return found


def bytes_of(model):
    return sum(p.nbytes for p in model.parameters())


def test_a_model_with_room_goes_to_the_gpu_whole(gpu, tok, capsys):
    model = tiny(tok)
    gpu.free = bytes_of(model) / FILLED + 1
    placed(model, "cuda")
    assert gpu.moved == ["cuda"] and not gpu.dispatched and not capsys.readouterr().out


def test_a_model_without_room_is_dispatched_and_that_is_said(gpu, tok, capsys):
    model = tiny(tok)
    gpu.free = int(bytes_of(model) / FILLED) - 100
    placed(model, "cuda:1")
    assert not gpu.moved and gpu.dispatched == [{1: int(FILLED * gpu.free), "cpu": sys.maxsize}]
    assert "layers stay in main memory" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_dispatched(tok):
    model = tiny(tok)
    assert placed(model, "cpu") is model


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_wants_the_whole_model_on_the_gpu(gpu, monkeypatch, tiny_folder, method):
    for module in ("models", "train.qlora"):
        monkeypatch.setattr(f"domain_llm.{module}.default_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    load_for(method, str(tiny_folder))
    assert gpu.moved == ["cuda"] and not gpu.dispatched
    load(str(tiny_folder), in_parts=True)
    assert len(gpu.dispatched) == 1


def test_a_dispatched_model_scores_and_answers_as_a_whole_one(tiny_folder, tmp_path):
    "The disk stands for main memory, and main memory for the GPU."
    whole, tok = load(str(tiny_folder), device="cpu")
    parts = load(str(tiny_folder), device="cpu")[0]
    room = bytes_of(parts) - 1000  # too little for its last layer
    parts = dispatched(parts, {"cpu": room, "disk": sys.maxsize}, tmp_path)
    assert set(parts.hf_device_map.values()) == {"cpu", "disk"}
    docs = [dict(id="a", text="The valve opens at 40 bar. " * 5)]
    assert bits_per_byte(parts, tok, docs)["bpb"] == bits_per_byte(whole, tok, docs)["bpb"]
    exam = [dict(question="At what pressure?", choices=["40 bar", "9 bar"], answer=0)]
    assert multiple_choice(parts, tok, exam)["loglik"] == multiple_choice(whole, tok, exam)["loglik"]
    asked = ["The valve", "A pump of the kind"]
    assert greedy(parts, tok, asked, 5) == greedy(whole, tok, asked, 5)


def test_a_dispatched_model_is_let_go_before_the_next_is_loaded(monkeypatch, tiny_folder, tmp_path):
    "Its layers refer to each other, so it stays until somebody collects."
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    parts = load(str(tiny_folder), device="cpu")[0]
    parts = dispatched(parts, {"cpu": bytes_of(parts) - 1000, "disk": sys.maxsize}, tmp_path)
    gone = weakref.ref(parts)
    del parts
    gc.disable()
    try:
        assert gone() is not None
        make_room("cuda")
        assert gone() is None
    finally:
        gc.enable()


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    add_lora(load(str(tiny_folder), device="cpu")[0], 4, 8).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_before_the_model_is_dispatched(adapter, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    model, _ = load(str(adapter), device="cuda", in_parts=True)
    assert not hasattr(model, "peft_config") and len(gpu.dispatched) == 1


def test_the_plan_says_when_the_exam_does_not_fit():
    seven = family_size(known_model("Qwen/Qwen2.5-7B"))
    for gb, fits in ((16, False), (24, True)):
        made = proposal(dict(model="Qwen/Qwen2.5-7B"), seven, {**GPU, "free": gb * GB})
        said = [one["said"] for one in made["lines"] if one["about"] == "exam"]
        assert bool(said) != fits and all("15.2 GB" in text for text in said)
    assert measured_in_parts(seven, dict(kind="cpu", half=2, free=8 * GB)) is None


def test_the_check_compares_the_exam_with_main_memory():
    seven, card = family_size(known_model("Qwen/Qwen2.5-7B")), {**GPU, "free": 16 * GB}
    (found,) = measuring_findings(seven, card, memory=64 * GB)
    assert found["level"] == "note"
    (found,) = measuring_findings(seven, card, memory=12 * GB)
    assert found["level"] == "warning" and "12.0 GB are free" in found["said"]
    assert measuring_findings(seven, {**GPU, "free": 24 * GB}, memory=1 * GB) == []
