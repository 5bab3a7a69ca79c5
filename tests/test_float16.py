"Training in float16 beside an adapter, as on a T4: accelerate scales the loss on GPUs only, so a CPU is made to."

import shutil
import time
import types
from functools import partial

import pytest
import torch
from test_fits import rows_of

from domain_llm import devices
from domain_llm.core import InputError
from domain_llm.models import load
from domain_llm.run.plan import memory_parts
from domain_llm.train import float16, qlora, trainer
from domain_llm.train.batches import token_losses
from domain_llm.train.float16 import skipped_steps
from domain_llm.train.loop import TRAIN_DEFAULTS, _optimizer, settings, train
from domain_llm.train.pretrain import make_probe
from domain_llm.train.qlora import adapted, load_for

LORA = dict(method="lora", rank=4, alpha=8, length=32, tokens_per_step=64, probes=1, learning_rate=1e-2)
CFG = settings(TRAIN_DEFAULTS, LORA)


@pytest.fixture
def as_a_t4(monkeypatch):
    "A processor without bfloat16 whose adapters compute in float16 with a scaled loss."
    from transformers import Trainer

    made = Trainer.create_accelerator_and_postprocess

    def scaling(trainer):
        made(trainer)
        if trainer.args.fp16:
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", scaling)
    monkeypatch.setattr(devices, "_cpu_bfloat16", lambda: False)
    for module in (float16, qlora):
        monkeypatch.setattr(module, "adapter_dtype", lambda device: torch.float16)


def trained(folder, method, out, rows=None, **settings):
    "A model with an adapter, what `train` says, and the dtypes of the logits of its passes."
    cfg, seen = {**CFG, "method": method, **settings}, set()
    torch.manual_seed(1)
    model = adapted(load_for(method, str(folder))[0], cfg)
    model.get_base_model().lm_head.register_forward_hook(lambda layer, given, found: seen.add(found.dtype))
    return model, train(model, rows or 8 * rows_of(3), out, cfg), seen


def losses_of(result):
    return [entry["loss"] for entry in result["history"] if "loss" in entry]


@pytest.mark.parametrize(
    "device, bfloat16, want",
    [
        ("cuda", True, torch.bfloat16),
        ("cuda:0", False, torch.float16),
        ("mps", False, torch.float32),
        ("cpu", False, torch.float32),
    ],
)
def test_an_adapter_computes_in_float16_only_on_an_nvidia_gpu_without_bfloat16(monkeypatch, device, bfloat16, want):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)
    monkeypatch.setattr(devices, "_cpu_bfloat16", lambda: bfloat16)
    assert devices.adapter_dtype(device) == want
    plain = types.SimpleNamespace(device=device)
    assert float16.compute_dtype(plain) == devices.half_dtype(device)
    plain.peft_config = {}
    assert float16.compute_dtype(plain) == want


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_float16_learns_as_float32_does(as_a_t4, monkeypatch, tiny_folder, tmp_path, method):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    model, half, seen = trained(tiny_folder, method, tmp_path / "half")
    assert seen == {torch.float16}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    assert frozen == {torch.float16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for module in (float16, qlora):
        monkeypatch.setattr(module, "adapter_dtype", lambda device: torch.float32)
    _, whole, seen = trained(tiny_folder, method, tmp_path / "whole")
    assert seen == {torch.float32}
    assert losses_of(half) == pytest.approx(losses_of(whole), rel=2e-3)
    assert losses_of(half)[-1] < losses_of(half)[0] - 0.01


@pytest.mark.parametrize("scale, moves", [(2.0**16, True), (1.0, False)])
def test_a_scaled_loss_keeps_small_gradients(as_a_t4, monkeypatch, tiny_folder, tmp_path, scale, moves):
    "With the loss times 1e-8 all gradients would be zero in float16."

    def tiny_losses(model, inputs):
        losses, at = token_losses(model, inputs)
        return losses * 1e-8, at

    monkeypatch.setattr(trainer, "token_losses", tiny_losses)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))
    model = adapted(load_for("lora", str(tiny_folder))[0], CFG)
    train(model, rows_of(4), tmp_path, CFG)
    assert moves == any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


class Cut(Exception):
    pass


def falling(cut_at=None):
    "A probe by which the last step is the best one; it breaks off at a call."
    calls = []

    def probe(model):
        calls.append(1)
        if len(calls) == cut_at:
            raise Cut
        return dict(score=-time.monotonic())

    return probe


def ends(folder, out, probe):
    "The adapter after a training of four probes, resumed where it was cut."
    torch.manual_seed(1)
    cfg = {**CFG, "probes": 4}
    model = adapted(load_for("lora", str(folder))[0], cfg)
    train(model, 8 * rows_of(3), out, cfg, probe)
    return torch.cat([p.detach().flatten().float() for p in model.parameters() if p.requires_grad])


def test_a_training_that_was_cut_ends_as_the_uncut_one(as_a_t4, monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20))  # skips some steps
    whole = ends(tiny_folder, tmp_path / "whole", falling())
    with pytest.raises(Cut):
        ends(tiny_folder, tmp_path / "cut", falling(cut_at=4))
    scalers = sorted((tmp_path / "cut").glob("checkpoint-*/scaler.pt"))
    assert torch.load(scalers[-1])["scale"] < 2.0**20
    assert torch.equal(ends(tiny_folder, tmp_path / "cut", falling()), whole)


def test_a_training_cut_on_a_t4_resumes_elsewhere(as_a_t4, monkeypatch, tiny_folder, tmp_path):
    with pytest.raises(Cut):
        ends(tiny_folder, tmp_path / "cut", falling(cut_at=4))
    for module in (float16, qlora):
        monkeypatch.setattr(module, "adapter_dtype", lambda device: torch.float32)
    whole = ends(tiny_folder, tmp_path / "whole", falling())
    resumed = ends(tiny_folder, tmp_path / "cut", falling())
    assert not torch.equal(resumed, whole)
    assert (resumed - whole).abs().mean() < 0.01 * whole.abs().mean()


def test_a_training_cut_elsewhere_resumes_on_a_t4(as_a_t4, monkeypatch, tiny_folder, tmp_path):
    with monkeypatch.context() as elsewhere:
        for module in (float16, qlora):
            elsewhere.setattr(module, "adapter_dtype", lambda device: torch.float32)
        whole = ends(tiny_folder, tmp_path / "whole", falling())
        with pytest.raises(Cut):
            ends(tiny_folder, tmp_path / "cut", falling(cut_at=4))
    resumed = ends(tiny_folder, tmp_path / "cut", falling())
    assert (resumed - whole).abs().mean() < 0.01 * whole.abs().mean()


@pytest.fixture
def large(tiny_folder, tmp_path):
    "A model whose activations float16 does not hold."
    folder = tmp_path / "large"
    shutil.copytree(tiny_folder, folder)
    model = load(str(folder))[0]
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows, said", [(100, "not even scaled.*bfloat16"), (8, "all . steps were skipped.*more rows")])
def test_a_model_too_large_for_float16_says_so_however_often_it_is_tried(as_a_t4, large, tmp_path, rows, said):
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            trained(large, "lora", tmp_path / "out", rows_of(rows))


def test_a_model_too_large_for_float16_is_seen_by_the_first_probe(as_a_t4, large, tmp_path):
    model, tok = load_for("lora", str(large))
    texts = [dict(id="a", text="One text of some words. " * 8)]
    with pytest.raises(InputError, match="before training gave no number"):
        train(adapted(model, CFG), rows_of(8), tmp_path / "out", CFG, make_probe(tok, texts, texts))


def tell(skips, max_steps):
    "Tell a callback of a training whose scale begins at 65,536 which steps were skipped."
    scale, accelerator = 2.0**16, types.SimpleNamespace()
    state, callback = types.SimpleNamespace(max_steps=max_steps, is_world_process_zero=True), skipped_steps(accelerator)
    for skipped in skips:
        scale = scale / 2 if skipped else scale
        accelerator.optimizer_step_was_skipped = skipped
        accelerator.scaler = types.SimpleNamespace(get_scale=lambda scale=scale: scale)
        callback.on_step_end(None, state, None)
    callback.on_train_end(None, state, None)


def test_skipped_steps_are_counted_and_said(capsys):
    tell([True] * 9 + [False] + [True] * 7 + [False] * 13, 30)
    assert "16 of 30 steps were skipped" in capsys.readouterr().out


def test_a_skipped_step_of_a_resumed_training_is_no_fault(capsys):
    "Of four hundred steps one is left."
    tell([True], 400)
    assert "1 of 400 steps were skipped" in capsys.readouterr().out


def test_the_seventeenth_skipped_step_was_not_scaled():
    with pytest.raises(InputError, match="not even scaled"):
        tell([True] * 17, 400)


def test_a_first_step_that_overflows_changes_nothing_and_the_next_one_does(
    as_a_t4, monkeypatch, tiny_folder, tmp_path, capsys
):
    "The scale is far too large for the first pass, and halved."
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20))
    _, result, _ = trained(tiny_folder, "lora", tmp_path / "out")
    skipped = int(capsys.readouterr().out.split("note: ")[1].split()[0])
    assert 1 <= skipped < result["steps"] / 2
    assert losses_of(result)[-1] < losses_of(result)[0]


def test_the_optimizer_of_scaled_gradients_has_no_copies_of_the_weights(as_a_t4, tiny_folder):
    model = adapted(load_for("lora", str(tiny_folder))[0], CFG)
    assert _optimizer(CFG, model)[0] is torch.optim.AdamW
    assert _optimizer(CFG, load(str(tiny_folder))[0])[0] is not torch.optim.AdamW


def test_probes_compute_as_the_training_does(as_a_t4, tiny_folder):
    model, tok = load(str(tiny_folder))
    texts, seen = [dict(id="a", text="One text of some words. " * 8)], []
    model.lm_head.register_forward_hook(lambda layer, given, found: seen.append(found.dtype))
    probe = make_probe(tok, texts, texts)
    probe(model)
    assert set(seen) == {torch.float32}
    seen.clear()
    probe(adapted(model, CFG))
    assert set(seen) == {torch.float16}


def test_memory_on_a_t4_is_two_bytes_beside_an_adapter_and_four_in_full_tuning():
    size = dict(parameters=1e9, vocabulary=32000, hidden=2048, layers=16, heads=16, embedding=65.5e6)
    size |= dict(matrices=[(2048, 2048)] * 16, copied=0)
    ampere, t4 = dict(kind="cuda", half=2, adapters=2), dict(kind="cuda", half=4, adapters=2)
    set_ = dict(length=256, rank=16, optimizer="adamw")
    lora, full = {**set_, "method": "lora"}, {**set_, "method": "full"}
    assert memory_parts(lora, size, t4) == memory_parts(lora, size, ampere)
    assert memory_parts(full, size, t4)["weights"] == 2 * memory_parts(full, size, ampere)["weights"]


def test_divided_weights_do_not_go_with_a_scaled_loss(monkeypatch):
    from domain_llm.train import shares

    monkeypatch.setattr(shares, "adapter_dtype", lambda device: torch.float16)
    with pytest.raises(InputError, match="float16.*Launch with ddp.yaml"):
        shares.refuse_sharded(CFG)
    shares.refuse_sharded({**CFG, "method": "full"})
