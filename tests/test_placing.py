"A model that is larger than the GPU: a part of it stays in main memory."

import sys
import types

import pytest
import torch

from domain_llm import placing
from domain_llm.judge.score import bits_per_byte
from domain_llm.models import greedy, load, tiny
from domain_llm.placing import FILLED, divided, placed
from domain_llm.run.plan import GB, GPU
from domain_llm.run.planner import measured_in_parts
from domain_llm.train.loop import add_lora


@pytest.fixture
def gpu(monkeypatch):
    "A function that sets how many bytes are free on a GPU; the moves of models to it are listed."
    found = types.SimpleNamespace(free=0, divided=[], moved=[])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (found.free, 16 * GB))
    monkeypatch.setattr(placing, "divided", lambda model, room: found.divided.append(room) or model)
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, *to, **kw: found.moved.append(*map(str, to)) or model)
    return found


def bytes_of(model):
    return sum(p.nbytes for p in model.parameters())


def test_a_model_with_room_goes_to_the_gpu_whole(gpu, tok, capsys):
    model = tiny(tok)
    gpu.free = bytes_of(model) / FILLED + 1
    placed(model, "cuda")
    assert gpu.moved == ["cuda"] and not gpu.divided and not capsys.readouterr().out


def test_a_model_without_room_is_divided_and_that_is_said(gpu, tok, capsys):
    model = tiny(tok)
    gpu.free = int(bytes_of(model) / FILLED) - 100
    placed(model, "cuda:1")
    assert not gpu.moved and gpu.divided == [{1: int(FILLED * gpu.free), "cpu": sys.maxsize}]
    assert "a part of them stays in main memory" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_divided(tok):
    model = tiny(tok)
    assert placed(model, "cpu") is model


def test_training_does_not_divide(gpu, monkeypatch, tiny_folder):
    monkeypatch.setattr("domain_llm.models.default_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    load(str(tiny_folder))
    assert gpu.moved == ["cuda"] and not gpu.divided
    load(str(tiny_folder), divided=True)
    assert len(gpu.divided) == 1


def test_a_divided_model_scores_and_answers_as_a_whole_one(tiny_folder, tmp_path):
    "The disk stands for main memory, and main memory for the GPU."
    whole, tok = load(str(tiny_folder), device="cpu")
    parts = load(str(tiny_folder), device="cpu")[0]
    room = bytes_of(parts) - 1000  # too little for its last layer
    parts = divided(parts, {"cpu": room, "disk": sys.maxsize}, offload_dir=tmp_path)
    assert set(parts.hf_device_map.values()) == {"cpu", "disk"}
    docs = [dict(id="a", text="The valve opens at 40 bar. " * 5)]
    assert bits_per_byte(parts, tok, docs)["bpb"] == bits_per_byte(whole, tok, docs)["bpb"]
    asked = ["The valve", "A pump of the kind"]
    assert greedy(parts, tok, asked, 5) == greedy(whole, tok, asked, 5)


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    add_lora(load(str(tiny_folder), device="cpu")[0], 4, 8).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_before_the_model_is_divided(adapter, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    model, _ = load(str(adapter), device="cuda", divided=True)
    assert not hasattr(model, "peft_config") and len(gpu.divided) == 1


def test_the_plan_says_when_the_exam_does_not_fit():
    seven = dict(parameters=7.6e9)
    assert "15.2 GB" in measured_in_parts(seven, {**GPU, "free": 16 * GB})
    assert measured_in_parts(seven, {**GPU, "free": 24 * GB}) is None
    assert measured_in_parts(seven, dict(kind="cpu", half=2, free=8 * GB)) is None
