import json
import random
from unittest.mock import patch

import pytest
import torch
from transformers import TrainingArguments

from domain_llm.core import InputError
from domain_llm.data.mix import tokenize
from domain_llm.models import load, tiny
from domain_llm.train import loop, trainer
from domain_llm.train.batches import collate, documents_apart, pack, token_losses
from domain_llm.train.loop import TRAIN_DEFAULTS, add_lora, last_checkpoint, settings, train
from domain_llm.train.pretrain import interpolate, make_probe

CFG = settings(TRAIN_DEFAULTS, dict(length=32, tokens_per_step=64, probes=3))


def rows_of(tok, n=12, source="domain"):
    rng = random.Random(0)
    words = "lock gate sluice valve tide keeper harbour chain".split()
    return tokenize([{"text": " ".join(rng.choices(words, k=rng.randint(4, 40)))} for _ in range(n)], tok, source, 32)


def test_packing_keeps_every_token_and_its_label(tok):
    rows = rows_of(tok)
    packed, names = pack(rows, 32)
    assert sorted(sum((r["input_ids"] for r in packed), [])) == sorted(sum((r["input_ids"] for r in rows), []))
    for r in packed:
        assert len(r["input_ids"]) <= 32
        for i, label, p in zip(r["input_ids"], r["labels"], r["position_ids"]):
            assert label == (-100 if p == 0 else i)


def test_documents_in_a_row_cannot_see_each_other(tok, tiny_model):
    model, _ = tiny_model
    a, b, c = ([dict(input_ids=ids, labels=ids, source="x")] for ids in ([5, 6, 7, 8], [9, 10, 11], [12, 13, 14]))
    with torch.no_grad():
        both = token_losses(model, collate([pack(a + b, 16)[0][0]]))[0]
        other = token_losses(model, collate([pack(a + c, 16)[0][0]]))[0]
        alone = token_losses(model, collate([pack(b, 16)[0][0]]))[0]
    assert torch.allclose(both[:3], other[:3], atol=1e-5)  # the neighbour does not matter
    assert torch.allclose(both[3:], alone, atol=1e-5)


def packed_talks(prefix, lengths, seed=0):
    "A packed row of documents that begin alike; the second half of the tokens of each has labels."
    rng = random.Random(seed)
    row = dict(input_ids=[], labels=[], position_ids=[])
    for n in lengths:
        ids = [*range(5, 5 + prefix), *(rng.randrange(300, 400) for _ in range(n))]
        silent = prefix + (n + 1) // 2
        row["input_ids"] += ids
        row["labels"] += [-100] * silent + ids[silent:]
        row["position_ids"] += range(len(ids))
    return row


def losses_and_slopes(model, row):
    "The loss of each labelled token, its position, and the gradients of their sum."
    losses, at = token_losses(model, collate([row]))
    return losses, at, torch.autograd.grad(losses.sum(), list(model.parameters()))


def tokens_seen(model):
    "A list that gets the number of tokens of every forward pass."
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda layer, given, out: seen.append(given[0].numel()))
    return seen


@pytest.mark.parametrize(
    "prefix, lengths, once",
    [
        (20, (6, 30, 3, 9), 19),  # the last one stays, since it may predict a token with a label
        (20, (300, 2, 270), 19),  # longer than a block of queries
        (40, (1100, 7), 39),  # longer than what plain products take
        (20, (9,), 0),
        (0, (6, 9), 0),
        (7, (1, 4), 6),
    ],
)
def test_a_beginning_that_all_share_is_computed_once_and_changes_nothing(tiny_model, prefix, lengths, once):
    model, _ = tiny_model
    row, seen = packed_talks(prefix, lengths), tokens_seen(model)
    want, places, slopes = losses_and_slopes(model, row)
    with documents_apart(model):
        losses, at, ours = losses_and_slopes(model, row)
    assert seen == [len(row["input_ids"]), len(row["input_ids"]) - once * (len(lengths) - 1)]
    assert torch.equal(at, places) and torch.allclose(losses, want, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, slopes))


def test_tokens_with_labels_are_never_shared(tiny_model):
    "Two equal documents, trained on every token, as in pre-training: each has its losses."
    model, _ = tiny_model
    row, seen = packed_talks(20, (6, 6)), tokens_seen(model)
    row["labels"] = [-100 if place == 0 else i for i, place in zip(row["input_ids"], row["position_ids"])]
    want, *_ = losses_and_slopes(model, row)
    with documents_apart(model):
        losses, *_ = losses_and_slopes(model, row)
    assert len(losses) == 50 and torch.allclose(losses, want, atol=1e-5) and seen == [52, 52]


def test_attention_by_document_is_that_of_transformers(tok, tiny_model):
    """Losses and gradients of packed documents, one longer than a block, against transformers' own attention on
    each document alone."""
    model, _ = tiny_model
    rng = random.Random(0)
    docs = [[rng.randrange(5, 400) for _ in range(n)] for n in (600, 3, 257, 1)]
    packed = dict(input_ids=sum(docs, []), position_ids=[i for d in docs for i in range(len(d))])
    packed["labels"] = [-100 if p == 0 else i for i, p in zip(packed["input_ids"], packed["position_ids"])]
    weights = list(model.parameters())
    with documents_apart(model):
        losses, _ = token_losses(model, collate([packed]))
        ours = torch.autograd.grad(losses.sum(), weights)
    assert model.config._attn_implementation == "sdpa"
    alone = sum(
        model(input_ids=torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in docs if len(d) > 1
    )
    assert torch.allclose(losses.sum(), alone, rtol=1e-5)
    for a, b in zip(ours, torch.autograd.grad(alone, weights)):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item())


def test_another_attention_than_plain_sdpa_is_left_alone(tok):
    model = tiny(tok)
    model.config.sliding_window = 8
    with documents_apart(model):
        assert model.config._attn_implementation == "sdpa"


def test_master_copies_follow_32_bit_training():
    "The same gradients: the bfloat16 weight is the 32-bit one, rounded, after every step and after a reload."
    torch.manual_seed(0)
    full = torch.nn.Parameter(torch.randn(50).bfloat16().float())
    low = torch.nn.Parameter(full.detach().bfloat16())
    make = loop._optimizer_class()
    a, b = (
        torch.optim.AdamW([dict(params=[full])], lr=1e-3, weight_decay=0.1),
        make([dict(params=[low])], lr=1e-3, weight_decay=0.1),
    )
    for step in range(20):
        low.grad = torch.randn(50).bfloat16()
        full.grad = low.grad.float()
        a.step()
        b.step()
        assert torch.equal(low.detach(), full.detach().bfloat16())
        if step == 9:
            saved, b = b.state_dict(), make([dict(params=[low])], lr=1.0)
            b.load_state_dict(saved)


@pytest.mark.parametrize("limit", (0.0, 0.3, 0.99))
def test_interpolation_finds_the_largest_share_within_the_budget(limit):
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.0)

    def within(m):
        return (m.weight.item() - 1) / 2 <= limit + 1e-6

    points = interpolate(
        model, lambda: {"weight": torch.ones(1, 1)}, lambda m: dict(score=0.5 if within(m) else 100.5), halvings=6
    )
    share = points[-1]["share"]
    assert limit - 1 / 64 < share <= limit and abs(model.weight.item() - (1 + 2 * share)) < 1e-6


def test_loss_is_that_of_transformers(tok, tiny_model):
    model, _ = tiny_model
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = dict(input_ids=ids, labels=torch.tensor([[-100, 6, -100, 8, 9]]), position_ids=torch.arange(5)[None])
    with torch.no_grad():
        ours, want = token_losses(model, batch)[0].mean(), model(input_ids=ids, labels=batch["labels"]).loss
    assert torch.allclose(ours, want, atol=1e-6)


def test_accumulation_weighs_tokens_not_rows(tok, tiny_folder, tmp_path):
    "Two rows of different size in one step must move the weights as both in a single row do: by the mean over tokens."
    rows = [dict(input_ids=list(range(5, 5 + n)), labels=list(range(5, 5 + n)), source="x") for n in (32, 8)]
    start = torch.cat([p.detach().flatten() for p in load(str(tiny_folder))[0].parameters()])
    moves = []
    for length in (32, 64):
        model, _ = load(str(tiny_folder))
        train(
            model,
            rows,
            tmp_path / str(length),
            {**CFG, "length": length, "tokens_per_step": 64, "learning_rate": 1e-3, "warmup": 0.0},
        )
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - start)
    moved = (moves[0].abs() > 1e-4) | (moves[1].abs() > 1e-4)
    assert moved.sum() > 1000
    assert (
        torch.sign(moves[0][moved]) == torch.sign(moves[1][moved])
    ).float().mean() > 0.97  # Adam's first step is the gradient's sign


def test_best_checkpoint_is_chosen_within_the_budget():
    seen = iter([(1.0, 1.0), (0.8, 1.05), (0.5, 1.2)])
    state = {}

    def fake(model, tok, docs):
        if docs == "d":
            state["now"] = next(seen)
        return {"bpb": state["now"][0 if docs == "d" else 1]}

    with patch("domain_llm.train.pretrain.bits_per_byte", fake):
        probe = make_probe(None, "d", "g", budget=0.1)
        cpu = type("Model", (), {"device": torch.device("cpu")})()
        scores = [probe(cpu)["score"] for _ in range(3)]
    assert min(range(3), key=scores.__getitem__) == 1


def test_train_ends_with_the_best_weights(tok, tiny_folder, tmp_path):
    model, _ = load(str(tiny_folder))
    kept, scores = [], iter([9.0, 1.0, 5.0, 7.0])

    def probe(m):
        kept.append(torch.cat([p.detach().flatten() for p in m.parameters()]).clone())
        return dict(score=next(scores))

    result = train(model, rows_of(tok, 20), tmp_path, {**CFG, "tokens_per_step": 32}, probe)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), kept[1])
    assert result["best_step"] == [h for h in result["history"] if "score" in h][1]["step"]


def test_loss_is_counted_per_source(tok, tiny_folder, tmp_path):
    model, _ = load(str(tiny_folder))
    result = train(model, rows_of(tok, 8, "a") + rows_of(tok, 8, "b"), tmp_path, CFG)
    assert {"loss_a", "loss_b"} <= {k for h in result["history"] for k in h}


def test_broken_checkpoints_are_not_used(tmp_path, capsys):
    for n, ok in ((5, True), (10, False), (15, False)):
        d = tmp_path / f"checkpoint-{n}"
        d.mkdir()
        (d / "model.safetensors").write_bytes(b"x" * 10)
        if n != 15:
            (d / "seal.json").write_text(json.dumps({"model.safetensors": 10 if ok else 99}))
    assert last_checkpoint(tmp_path).name == "checkpoint-5"
    assert "checkpoint-15 is incomplete" in capsys.readouterr().err and not (tmp_path / "checkpoint-10").exists()


def test_lora_trains_adapters_only(tok, tiny_folder, tmp_path):
    model, _ = load(str(tiny_folder))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = add_lora(model, 4, 8)
    train(tuned, rows_of(tok, 8), tmp_path, {**CFG, "learning_rate": 1e-2})
    for n, p in tuned.get_base_model().named_parameters():
        if "lora_" not in n:
            assert torch.equal(p, base[n.replace(".base_layer", "")])
    assert any(p.abs().sum() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)
    with pytest.raises(InputError):
        add_lora(load(str(tiny_folder))[0], 0)


def test_nothing_to_train_on():
    with pytest.raises(InputError, match="nothing to train on"):
        pack([], 32)


@pytest.mark.parametrize("schedule, last", [("constant", 1.0), ("cosine", 0.1)])
def test_the_rate_follows_its_schedule(tok, tiny_folder, tmp_path, schedule, last):
    cfg = {**CFG, "schedule": schedule, "warmup": 0, "learning_rate": 1e-3, "length": 32, "tokens_per_step": 32}
    rates = [
        h["learning_rate"]
        for h in train(load(str(tiny_folder))[0], rows_of(tok, 40), tmp_path, cfg)["history"]
        if "learning_rate" in h
    ]
    assert (
        len(rates) > 5
        and rates[0] == pytest.approx(1e-3, rel=0.02)
        and rates[-1] <= last * 1e-3
        and (schedule == "cosine" or min(rates) == max(rates))
    )


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_loss_of_a_model_whose_forward_gives_all_logits(tok):
    "Code that comes with a model, as ChatGLM's and Baichuan's, has no argument logits_to_keep."
    from transformers import LlamaForCausalLM

    class Remote(LlamaForCausalLM):
        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            inputs_embeds=None,
            labels=None,
            use_cache=None,
            return_dict=None,
            output_attentions=None,
            output_hidden_states=None,
        ):
            return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    ours, theirs = tiny(tok), Remote(tiny(tok).config).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.config._attn_implementation = "eager"
    row = pack(rows_of(tok), 64)[0][0]
    row["labels"][3:6] = [-100] * 3
    batch = collate([row])
    with torch.no_grad():
        want, got, adapted = (token_losses(m, batch) for m in (ours, theirs, add_lora(theirs, 2, 2)))
    for losses, at in (got, adapted):
        assert torch.equal(at, want[1]) and torch.allclose(losses, want[0], atol=1e-4)


def test_rows_without_labels_are_left_out_and_counted(tok, tiny_folder, tmp_path):
    rows = rows_of(tok, 12)
    mute = [dict(input_ids=r["input_ids"], labels=[-100] * len(r["labels"]), source="domain") for r in rows_of(tok, 3)]
    mixed = mute[:1] + rows[:5] + mute[1:] + rows[5:]
    (a, _), (b, _) = load(str(tiny_folder)), load(str(tiny_folder))
    alone, among = train(a, rows, tmp_path / "a", CFG), train(b, mixed, tmp_path / "b", CFG)
    assert torch.equal(weights_of(a), weights_of(b))
    assert (
        (alone["without_labels"], among["without_labels"]) == (0, len(mute))
        and among["tokens"] == alone["tokens"]
        and among["steps"] == alone["steps"]
    )


def test_a_packed_row_without_labels_is_no_step(tok, tiny_folder, tmp_path):
    "Documents of one token have no label once packed; steps of nothing but them had a loss of 0/0."
    rows = [dict(input_ids=list(range(5, 37)), labels=list(range(5, 37)), source="x")] + [
        dict(input_ids=[9], labels=[9], source="x")
    ] * 3
    result = train(load(str(tiny_folder))[0], rows, tmp_path / "a", {**CFG, "tokens_per_step": 32})
    assert result["steps"] == 1 and all(h["loss"] == h["loss"] for h in result["history"] if "loss" in h)
    with pytest.raises(InputError, match="none of the 3 rows has a label"):
        train(load(str(tiny_folder))[0], rows[1:], tmp_path / "b", CFG)


class TwoGpus(TrainingArguments):
    "The arguments of a Trainer on a machine with two GPUs."

    def __post_init__(self):
        super().__post_init__()
        assert self.device  # sets _n_gpu
        self._n_gpu = 2


def test_two_visible_gpus_are_no_reason_to_wrap_the_model(tok, tiny_folder, tmp_path, monkeypatch, capsys):
    "The Trainer would wrap the model in DataParallel and fail at the first step."
    import transformers

    monkeypatch.setattr(transformers, "TrainingArguments", TwoGpus)
    result = train(load(str(tiny_folder))[0], rows_of(tok, 8), tmp_path, CFG)
    assert result["steps"] > 0 and "2 GPUs are visible" in capsys.readouterr().out


@pytest.mark.parametrize("adapters", [False, True])
def test_a_device_without_bfloat16_trains_in_float32(tok, tiny_folder, tmp_path, monkeypatch, adapters):
    monkeypatch.setattr("domain_llm.devices._cpu_bfloat16", lambda: False)
    seen, inner = set(), token_losses

    def losses(model, batch):
        seen.update([*(p.dtype for p in model.parameters()), torch.is_autocast_enabled("cpu")])
        return inner(model, batch)

    monkeypatch.setattr(trainer, "token_losses", losses)
    model, _ = load(str(tiny_folder))
    train(add_lora(model, 2, 2) if adapters else model, rows_of(tok, 8), tmp_path, CFG)
    assert seen == {torch.float32, False}


@pytest.mark.parametrize(
    "e",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
    ids=lambda e: type(e).__name__,
)
def test_memory_that_runs_out_in_training_gives_advice(tok, tiny_folder, tmp_path, monkeypatch, e):
    def fails(*a):
        raise e

    with pytest.raises(InputError, match="memory ran out while training.*length"):
        train(load(str(tiny_folder))[0], rows_of(tok, 8), tmp_path / "a", CFG, fails)
    monkeypatch.setattr(trainer, "token_losses", fails)
    with pytest.raises(InputError, match="memory ran out while training.*length"):
        train(load(str(tiny_folder))[0], rows_of(tok, 8), tmp_path / "b", CFG)
    assert load(str(tiny_folder))[0].dtype == torch.float32


def test_the_labels_of_another_end_token_are_trained(tok, tiny_model):
    """A label may differ from the token that stands there: Baichuan 2 learns its end token at the place of the
    next turn's opening."""
    model, _ = tiny_model
    row = dict(input_ids=[5, 6, 7, 8], labels=[-100, 6, 2, -100], source="x")
    with torch.no_grad():
        losses, at = token_losses(model, collate([pack([row], 8)[0][0]]))
        want = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    assert at.tolist() == [1, 2] and torch.allclose(losses, -torch.stack([want[0, 6], want[1, 2]]), atol=1e-4)


def test_checkpoints_of_another_program_are_not_removed(tok, tiny_model, tmp_path):
    model, _ = tiny_model
    other = tmp_path / "checkpoint-7"
    other.mkdir()
    (other / "model.safetensors").write_text("days of work")
    rows = [dict(input_ids=[5, 6, 7, 8], labels=[5, 6, 7, 8], source="x")]
    with pytest.raises(InputError, match="has not made"):
        train(model, rows, tmp_path, {**TRAIN_DEFAULTS, "length": 8, "tokens_per_step": 8})
    assert (other / "model.safetensors").read_text() == "days of work"
