"""What is measured: excerpts of many documents, and never by the same text that made the choice."""

import json
import random

import pytest

from domain_llm import core
from domain_llm.run.training import texts_of
from domain_llm.train import pretrain
from domain_llm.train.loop import add_lora
from domain_llm.train.pretrain import excerpts, interpolate, probe_texts


def manual(i, words):
    "A document in which every word names its document and place."
    return dict(
        id=f"chapter-{i}", text="\n".join(f"c{i}w{k} turns the valve." for k in range(words)), source="s", kind="book"
    )


def tokens(rows):
    return sum(len(r["text"].encode()) for r in rows) / 4


def test_every_one_of_six_long_documents_is_read():
    rows = excerpts([manual(i, 20_000) for i in range(6)], 8000)
    assert [r["id"] for r in rows] == [f"chapter-{i}" for i in range(6)]
    assert 7500 < tokens(rows) <= 8010
    assert max(map(tokens, [[r] for r in rows])) < 1.2 * 8000 / 6


def test_short_documents_leave_their_room_to_the_long_ones():
    rows = excerpts([manual(0, 10), manual(1, 20_000), manual(2, 20_000)], 2000)
    assert rows[0]["text"] == manual(0, 10)["text"] and 1900 < tokens(rows) <= 2000


def test_many_documents_give_their_beginnings_from_all_over_the_list():
    docs = [manual(i, 500) for i in range(1000)]
    rows = excerpts(docs, 2000)
    assert len(rows) == 10 and {int(r["id"].split("-")[1]) // 100 for r in rows} == set(range(10))
    assert all(r["text"] in docs[int(r["id"].split("-")[1])]["text"] for r in rows)


def test_one_document_gives_pieces_from_its_whole_length():
    (doc,) = [manual(0, 20_000)]
    rows = excerpts([doc], 4000)
    places = [doc["text"].index(r["text"]) / len(doc["text"]) for r in rows]
    assert len(rows) == 20 and places[0] == 0 and 0.9 < places[-1] < 1 and places == sorted(places)
    assert len({r["id"] for r in rows}) == 20


def test_pieces_of_a_text_never_overlap():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab \n一é") for _ in range(rng.randrange(1, 9000)))
        size = rng.randrange(4, 12_000)
        pieces = pretrain._pieces(text, size)
        at = 0
        for piece in pieces:
            at = text.index(piece, at) + len(piece)
        assert sum(len(p.encode()) for p in pieces) <= max(
            size * 1.2, len(text.encode()) if len(text.encode()) <= size else 0
        )


@pytest.mark.parametrize("n", [1, 2, 7])
def test_choice_and_report_read_different_text(n):
    chosen, reported = probe_texts([manual(i, 5000) for i in range(n)], 2000)
    words = [{w for r in rows for w in r["text"].split() if w[1:2].isdigit()} for rows in (chosen, reported)]
    assert words[0] and words[1] and not words[0] & words[1]


def test_a_run_reports_on_text_that_no_choice_has_seen(tmp_path):
    for name in ("held_out", "general_probe"):
        core.write_jsonl(tmp_path / f"{name}.jsonl", [dict(manual(i, 50), id=f"{name}-{i}") for i in range(8)])
    chosen, reported = texts_of({}, {n: tmp_path / f"{n}.jsonl" for n in ("held_out", "general_probe")}, 3000)
    for name in ("domain", "general"):
        ids = [{r["id"] for r in hand[name]} for hand in (chosen, reported)]
        assert ids[0] and ids[1] and not ids[0] & ids[1]


def test_what_json_cannot_hold_becomes_null(tmp_path):
    core.write_json(tmp_path / "a.json", dict(a=float("nan"), b=[1.0, float("inf")], c=dict(d=(float("-inf"), "x"))))
    core.write_jsonl(tmp_path / "b.jsonl", [dict(a=float("nan"))])

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == dict(
        a=None, b=[1.0, None], c=dict(d=[None, "x"])
    )
    assert json.loads((tmp_path / "b.jsonl").read_text(), parse_constant=refuse) == dict(a=None)


def test_scaling_an_adapter_is_interpolating_its_merged_weights(tiny_model):
    "Against base + share * (tuned - base), computed on the merged weights."
    import torch

    model, _ = tiny_model
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = add_lora(model, rank=4, alpha=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    ids = torch.arange(12)[None] + 500
    ends = []

    def probe(m):
        ends.append(m(input_ids=ids).logits.detach())
        return dict(score=101.0 if len(ends) < 3 else 0.0)  # the first two points break the budget, later ones keep it

    points = interpolate(
        tuned, lambda: pytest.fail("an adapter needs no second copy of the weights"), probe, halvings=3
    )
    assert [p["share"] for p in points] == [1.0, 0.5, 0.25, 0.375]
    merged = tuned.merge_and_unload()  # with the share that was chosen last, 0.375 of the whole change
    with torch.no_grad():
        for n, p in merged.named_parameters():
            p.copy_(base[n] + 0.5 / 0.375 * (p - base[n]))
    assert torch.allclose(merged(input_ids=ids).logits, ends[1], atol=1e-4)


def test_interpolating_all_weights_gives_the_points_of_the_line(tiny_model):
    import torch

    model, _ = tiny_model
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tuned = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []

    def probe(m):
        seen.append({n: p.detach().clone() for n, p in m.named_parameters()})
        return dict(score=101.0)

    points = interpolate(model, lambda: base, probe)
    assert [p["share"] for p in points] == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0]
    for point, weights in zip(points, seen):
        for n in base:
            assert torch.allclose(weights[n], base[n] + point["share"] * (tuned[n] - base[n]), atol=1e-6)
