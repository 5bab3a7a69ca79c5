"Training that fits: gradient checkpointing, several rows a pass, weights of 4 bits."

import json
import os
import random
import subprocess
import sys
import types

import pytest
import torch

from domain_llm.core import InputError
from domain_llm.devices import half_dtype
from domain_llm.models import base_of, load, load_tokenizer, tiny
from domain_llm.ship.merge import merge
from domain_llm.train import batches, loop
from domain_llm.train.batches import collate, documents_apart, pack, token_losses
from domain_llm.train.fit import answer_probe, fitted
from domain_llm.train.loop import TRAIN_DEFAULTS, add_lora, checkpointing, settings, train
from domain_llm.train.qlora import adapted, load_for

CFG = settings(TRAIN_DEFAULTS, dict(length=32, tokens_per_step=64, probes=1, learning_rate=1e-3))


def rows_of(n=12, seed=0):
    "Rows of random tokens, some shorter than a packed row, some longer."
    rng = random.Random(seed)
    drawn = [[rng.randrange(5, 400) for _ in range(rng.randint(4, 40))] for _ in range(n)]
    return [dict(input_ids=ids, labels=ids, source=rng.choice("ab")) for ids in drawn]


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def adapted_tiny(tok, method):
    torch.manual_seed(1)
    model = add_lora(tiny(tok), 4, 8) if method == "lora" else tiny(tok)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)  # at its start of zero A would have no gradient
    return model.train()


def losses_and_gradients(model, batch, on):
    "Losses and gradients of a packed batch, and the bytes kept for the backward pass."
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its place
        return t

    with documents_apart(model), checkpointing(model, on):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            losses, _ = token_losses(model, batch)
        gradients = torch.autograd.grad(losses.sum(), [p for p in model.parameters() if p.requires_grad])
    return losses.detach(), gradients, sum(n for n, _ in kept.values())


# Gradient checkpointing


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_changes_neither_loss_nor_gradients_and_keeps_less(tok, method):
    model = adapted_tiny(tok, method)
    batch = collate([pack(rows_of(), 256)[0][0]])
    assert (batch["position_ids"] == 0).sum() > 1  # several documents in the row
    losses, gradients, kept = losses_and_gradients(model, batch, on=False)
    same, again, less = losses_and_gradients(model, batch, on=True)
    assert torch.equal(losses, same)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again)) and any(g.abs().max() > 0 for g in gradients)
    layers = model.config.num_hidden_layers
    logits = 4 * len(losses) * model.config.vocab_size
    inputs = 4 * batch["input_ids"].shape[1] * model.config.hidden_size
    assert kept - less > 10 * inputs * layers  # of the seven matrices of a layer and its attention
    assert less < 3 * logits + 4 * inputs * (layers + 3)  # logits, one input a layer, the ends
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_with_checkpointing_ends_where_one_without_does(tok, tmp_path, method):
    ended = []
    for on in (False, True):
        model = adapted_tiny(tok, method)
        train(model, rows_of(), tmp_path / str(on), {**CFG, "gradient_checkpointing": on})
        ended.append(weights_of(model))
    assert torch.equal(*ended) and not torch.equal(ended[0], weights_of(adapted_tiny(tok, method)))


def test_layers_are_computed_again_only_where_it_is_on(tok, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    counts = []
    for on in (False, True, "auto"):
        calls.clear()
        train(tiny(tok), rows_of(4), tmp_path / str(on), {**CFG, "gradient_checkpointing": on})
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0] and counts[2] == counts[0]


def test_a_model_that_cannot_checkpoint_is_refused_with_the_line_to_write(tok):
    model = tiny(tok)
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="gradient_checkpointing: false"), checkpointing(model):
        pass
    with checkpointing(model, on=False):
        pass


PEAK = """import sys
from transformers import LlamaConfig, LlamaForCausalLM
from domain_llm.devices import peak_memory_gb, reset_peak_memory
from domain_llm.run.base_model import sizes
from domain_llm.run.plan import memory_parts, this_device
from domain_llm.train.loop import TRAIN_DEFAULTS, train
shape = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=16, num_attention_heads=4)
config = LlamaConfig(vocab_size=512, num_key_value_heads=2, max_position_embeddings=1280, **shape)
set_ = {**TRAIN_DEFAULTS, "length": 1280, "tokens_per_step": 1280, "probes": 1}
ids = [5 + i % 500 for i in range(1280)]
rows, peaks = [dict(input_ids=ids, labels=ids, source="domain")] * 2, []
for on in (True, False):  # what the first leaves behind does not help the second
    model = LlamaForCausalLM(config)
    reset_peak_memory()
    train(model, rows, f"{sys.argv[1]}/{on}", {**set_, "gradient_checkpointing": on})
    peaks.append(peak_memory_gb())
parts = memory_parts({**set_, "gradient_checkpointing": False}, sizes(config), this_device())
print(*peaks, parts["activations"] / 1e9)"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not say how much memory a process held"
)
def test_checkpointing_saves_most_of_the_activations_at_the_peak(tmp_path):
    "Fifteen of sixteen layers are not held at a time; a sixteenth of what each keeps, its input, is."
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    on, off, activations = map(float, done.stdout.split()[-3:])
    assert off - on == pytest.approx(activations * 14 / 16, rel=0.25)


# Several rows a pass


def test_rows_of_a_batch_have_the_losses_that_each_has_alone(tok):
    model = tiny(tok)
    rows = list(pack(rows_of(), 32)[0])[:4]
    with torch.no_grad(), documents_apart(model):
        together, _ = token_losses(model, collate(rows))
        alone = torch.cat([token_losses(model, collate([row]))[0] for row in rows])
    with torch.no_grad():
        masked, _ = token_losses(model, collate(rows))  # by transformers' own attention
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(masked, alone, atol=1e-5)
    assert len(together) == sum(label != -100 for row in rows for label in row["labels"][1:])


def test_a_step_of_two_rows_is_the_same_in_one_pass_as_in_two(tok, tmp_path, in_32_bits):
    ended, histories = [], []
    for batch in (1, 2, 4):
        model = tiny(tok)
        set_ = {**CFG, "batch": batch, "tokens_per_step": 128}
        histories.append(train(model, rows_of(20), tmp_path / str(batch), set_)["history"])
        ended.append(weights_of(model))
    assert len({h[-1]["step"] for h in histories}) == 1 and {"loss_a", "loss_b"} <= histories[0][0].keys()
    for other, history in zip(ended[1:], histories[1:]):
        assert torch.allclose(ended[0], other, atol=2e-4)
        for a, b in zip(histories[0], history):
            assert {k: a[k] for k in a if "loss" in k} == pytest.approx({k: b[k] for k in b if "loss" in k}, abs=1e-4)


def test_a_batch_that_does_not_divide_the_step_is_refused(tok, tmp_path):
    with pytest.raises(InputError, match="batch is 3, but a step has 4 rows.*divides 4"):
        train(tiny(tok), rows_of(), tmp_path, {**CFG, "batch": 3, "tokens_per_step": 128})


def test_the_losses_of_each_source_are_means_over_its_tokens(tok, tmp_path, in_32_bits):
    "At a rate of nearly 0 the logged loss of a source is what its rows have in the untrained model."
    model, rows = tiny(tok), rows_of(6)
    packed, names = pack(rows, 32)
    with torch.no_grad():
        found = {name: [] for name in names}
        for row in packed:
            losses, at = token_losses(model, collate([row]))
            for loss, place in zip(losses.tolist(), at.tolist()):
                found[names[row["source"][place]]].append(loss)
    set_ = {**CFG, "tokens_per_step": 32 * len(packed), "learning_rate": 1e-12}
    (entry,) = [h for h in train(model, rows, tmp_path, set_)["history"] if "loss" in h]
    for name, losses in found.items():
        assert entry[f"loss_{name}"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


# The optimizer


def test_gradients_that_are_copied_in_parts_move_the_weights_as_all_at_once():
    torch.manual_seed(0)
    shapes = [(7, 5), (40,), (3,), (2, 30)]
    start = [torch.randn(shape).bfloat16() for shape in shapes]
    ended = []
    for part in (None, 45, 10**6):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = loop._optimizer_class(part)([dict(params=weights)], lr=1e-2, weight_decay=0.1)
        torch.manual_seed(1)
        for _ in range(5):
            for w in weights:
                w.grad = torch.randn(w.shape).bfloat16()
            optimizer.step()
        ended.append(torch.cat([m.detach().flatten() for m in optimizer.masters()]))
        assert all((m.grad is None) == bool(part) for m in optimizer.masters())
        assert all(torch.equal(w, m.bfloat16()) for w, m in zip(weights, optimizer.masters()))
    assert torch.equal(ended[0], ended[1]) and torch.equal(ended[0], ended[2])
    sizes = [[m for m, _ in some] for some in loop._parts([(torch.zeros(n), None) for n in (35, 40, 3, 60)], 45)]
    assert [[m.numel() for m in some] for some in sizes] == [[35], [40, 3], [60]]


def test_the_optimizer_follows_the_recipe_and_the_device(monkeypatch):
    cpu, gpu = (types.SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    monkeypatch.setattr(loop, "compute_dtype", lambda model: torch.bfloat16)
    assert loop._optimizer(CFG, cpu)[1] == dict(lr=CFG["learning_rate"], fused=True)
    eight = {**CFG, "optimizer": "adamw8bit"}
    with pytest.raises(InputError, match="device 'cpu'. Write optimizer: adamw"):
        loop._optimizer(eight, cpu)
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        loop._optimizer(eight, gpu)
    monkeypatch.setattr(loop, "find_spec", lambda name: True)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert loop._optimizer(eight, gpu) == (bitsandbytes.optim.PagedAdamW8bit, dict(lr=CFG["learning_rate"]))


# Attention


class Somewhere:
    "A model as far as the choice of its attention goes."

    _supports_flash_attn = True

    def __init__(self, kind, window=None):
        self.device = torch.device(kind)
        text = types.SimpleNamespace(sliding_window=window)  # a model of text and images has its window there
        self.config = types.SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    "model, flash, half, chosen",
    [
        (Somewhere("cpu"), True, torch.float32, "documents"),
        (Somewhere("cpu", window=8), True, torch.float32, None),
        (Somewhere("cuda"), True, torch.bfloat16, "flash_attention_2"),
        (Somewhere("cuda"), False, torch.bfloat16, None),
        (Somewhere("cuda"), True, torch.float32, None),  # a T4 has no kernel of it
    ],
)
def test_the_attention_follows_the_device(monkeypatch, model, flash, half, chosen):
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(batches, "half_dtype", lambda device: half)
    assert batches._better_attention(model) == chosen


def test_after_training_an_adapter_computes_as_its_merged_weights(tiny_folder, tmp_path, monkeypatch):
    "In training the forward pass is in 16 bits where the processor computes in them; afterwards it is in 32 again."
    monkeypatch.setattr("domain_llm.devices._cpu_bfloat16", lambda: True)
    model = adapted(load(str(tiny_folder))[0], {**CFG, "method": "lora", "rank": 4, "alpha": 8})
    train(model, rows_of(8), tmp_path, {**CFG, "method": "lora", "learning_rate": 1e-2})
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert torch.allclose(tuned, merged, atol=1e-4 * merged.abs().max())


# QLoRA


@pytest.fixture(scope="module")
def rounded(tiny_folder):
    "A function that loads the tiny model for qlora."
    pytest.importorskip("bitsandbytes")
    return lambda: load_for("qlora", str(tiny_folder))[0]


QLORA = {**CFG, "method": "qlora", "rank": 4, "alpha": 8, "learning_rate": 1e-2}


def test_linear_layers_are_in_nf4_with_double_quantization_and_the_rest_is_not(rounded, tiny_folder):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    model, dense = rounded(), load(str(tiny_folder))[0]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {name for name, layer in layers.items() if not isinstance(layer, Linear4bit)} == {"lm_head"}
    layer = layers["model.layers.0.mlp.up_proj"]
    state, exact = layer.weight.quant_state, dense.get_submodule("model.layers.0.mlp.up_proj").weight
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    back, largest = dequantize_4bit(layer.weight, state), exact.reshape(-1, 64).abs().max(1).values
    off = (back - exact).reshape(-1, 64).abs().max(1).values
    assert (off < 0.16 * largest).all() and off.max() > 0  # half of the widest gap between two levels, 0.152
    own = {layer.compute_dtype for layer in layers.values() if isinstance(layer, Linear4bit)}
    rest = {p.dtype for name, p in model.named_parameters() if "proj" not in name}
    assert own == rest == {half_dtype(model.device)}


def test_the_gradients_are_those_of_pefts_own_preparation(rounded):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    theirs = prepare_model_for_kbit_training(rounded(), gradient_checkpointing_kwargs=dict(use_reentrant=False))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(3)
    theirs = get_peft_model(theirs, config).train()
    torch.manual_seed(3)
    ours = adapted(rounded(), QLORA).train()
    batch, found = collate([pack(rows_of(), 64)[0][0]]), []
    for model, on in ((theirs, False), (ours, True)):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.01)
        with checkpointing(model, on):
            losses, _ = token_losses(model, batch)
            own = [p for p in model.parameters() if p.requires_grad]
            found.append((losses.detach(), *torch.autograd.grad(losses.sum(), own)))
    close = dict(rtol=1e-3, atol=1e-3) if half_dtype("cpu") == torch.float32 else dict(rtol=0.1, atol=0.1)
    assert len(found[0]) == len(found[1]) and all(torch.allclose(a, b, **close) for a, b in zip(*found))


def test_only_the_adapter_is_trained_and_probes_before_it_do_no_harm(rounded, tmp_path):
    "bitsandbytes has a layout of the weights for answers; through it the layers below would get no gradient."
    model = rounded()
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        model(input_ids=ids)  # a probe before training
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14 and not any(m.support_avx512bf16_for_cpu for m in layers)
    tuned = adapted(model, QLORA)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    train(tuned, rows_of(), tmp_path, {**QLORA, "gradient_checkpointing": True})
    for name, p in tuned.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name


def test_an_adapter_of_qlora_belongs_to_the_unrounded_model_and_is_merged_into_that(rounded, tiny_folder, tmp_path):
    from peft import AutoPeftModelForCausalLM

    tuned = adapted(rounded(), QLORA)
    train(tuned, rows_of(), tmp_path / "work", QLORA)
    tuned.save_pretrained(tmp_path / "adapter")
    load_tokenizer(str(tiny_folder)).save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(tiny_folder)
    merged = merge(tmp_path / "adapter", out=tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    exact, found = load(str(tiny_folder))[0].state_dict(), load(str(merged))[0].state_dict()
    scale = QLORA["alpha"] / QLORA["rank"]
    for name, layer in tuned.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            update = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert torch.allclose(found[f"{name}.weight"], exact[f"{name}.weight"] + update, atol=1e-5)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids).logits, load(str(merged))[0](input_ids=ids).logits, atol=1e-4)
    with pytest.raises(InputError, match="is quantized"):
        merge(tuned, out=tmp_path / "never")
    with pytest.raises(InputError, match="is an adapter: merge it"):
        load(str(tmp_path / "adapter"), quantize="nf4")


def test_qlora_without_rounded_weights_is_refused(tok):
    with pytest.raises(InputError, match='load_for\\("qlora"'):
        adapted(tiny(tok), QLORA)


def test_a_fitted_copy_of_a_rounded_model_learns_and_the_model_stays(rounded):
    model = rounded()
    rows = [dict(input_ids=list(range(5, 37)), labels=list(range(5, 37)), source="x")] * 30
    probe, before = answer_probe(rows[:1]), {n: p.clone() for n, p in model.named_parameters()}
    copy = fitted(model, rows, **{**QLORA, "tokens_per_step": 32})
    assert probe(copy)["score"] < probe(model)["score"] - 0.5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and len(before) > 10


def test_memory_is_given_back_after_every_16_passes(tok, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(loop, "trim_memory", lambda: given.append(1))
    set_ = {**CFG, "tokens_per_step": 2 * CFG["length"], "batch": 1, "probes": 1}
    steps = train(tiny(tok), rows_of(60), tmp_path, set_)["steps"]
    assert steps >= 16 and len(given) == 2 * steps // 16 + 1  # and once more at the end
