import itertools
import random
from collections import Counter

import pytest
from fixtures.families import family

from domain_llm.core import InputError
from domain_llm.data.laws import bootstrap_law, fit_law, predict, solve
from domain_llm.data.mix import PUBLISHED, interleave, mixture, plan_tokens, recommend_ratio, tokenize
from domain_llm.demo.general import general_text
from domain_llm.demo.world import make_world
from domain_llm.models import tiny
from domain_llm.train.batches import pack
from domain_llm.train.rehearse import rehearse
from domain_llm.train.sft import encode_all


def rows(name, n, rng):
    return [dict(input_ids=[1] * k, labels=[1] * k, source=name) for k in (rng.randint(5, 60) for _ in range(n))]


def count(rows):
    c = Counter()
    for r in rows:
        c[r["source"]] += len(r["input_ids"])
    return c


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [{"a": 1, "b": 5}, {"a": 1, "b": 0.25}, {"a": 1, "b": 2, "c": 0.3}])
def test_ratio_is_exact_to_one_percent(parts, seed):
    rng = random.Random(seed)
    sources = {n: rows(n, rng.randint(80, 400), rng) for n in parts}
    got, p = mixture(sources, parts, seed=seed, epochs=2, max_epochs=100)
    c = count(got)
    for n, part in parts.items():
        assert c[n] / sum(c.values()) == pytest.approx(part / sum(parts.values()), rel=0.01)
    assert c["a"] == pytest.approx(2 * count(sources["a"])["a"], rel=0.01)


def test_ratio_holds_at_every_point():
    rng = random.Random(0)
    got, _ = mixture({"a": rows("a", 300, rng), "b": rows("b", 900, rng)}, {"a": 1, "b": 3})
    c = Counter()
    for r in got:
        c[r["source"]] += len(r["input_ids"])
        if sum(c.values()) > 2000:
            assert abs(c["a"] / sum(c.values()) - 0.25) < 60 / 2000


def test_interleave_works_on_endless_streams():
    endless = {n: itertools.repeat(dict(input_ids=[0] * k, source=n)) for n, k in (("a", 7), ("b", 50))}
    c = count(itertools.islice(interleave(endless, {"a": 2, "b": 1}), 5000))
    assert c["a"] / c["b"] == pytest.approx(2, rel=0.01)


def test_seed_decides_everything():
    rng = random.Random(0)
    s = {"a": rows("a", 50, rng), "b": rows("b", 50, rng)}
    first, again, other = (mixture(s, {"a": 1, "b": 1}, seed=k)[0] for k in (0, 0, 1))
    assert first == again and first != other


def test_small_source_ends_the_run_and_says_so():
    p = plan_tokens({"a": 1000, "b": 500}, {"a": 1, "b": 5}, epochs=1, max_epochs=4)
    assert p["tokens"] == {"a": 400, "b": 2000} and "'b' has only 500 tokens" in p["notes"][0]
    p = plan_tokens({"a": 1000, "b": 2500}, {"a": 1, "b": 5}, epochs=1, max_epochs=4)
    assert p["tokens"] == {"a": 1000, "b": 5000} and "repeated 2.0 times" in p["notes"][0]


def test_every_pass_gives_every_row_once():
    rng = random.Random(3)
    s = {"a": [dict(input_ids=[i] * 10, labels=[i] * 10, source="a") for i in range(40)], "b": rows("b", 200, rng)}
    got = [r["input_ids"][0] for r in mixture(s, {"a": 1, "b": 1}, epochs=3)[0] if r["source"] == "a"]
    for k in range(3):
        assert sorted(got[40 * k : 40 * k + 40]) == list(range(40))


def test_supervised_tokens_of_a_mixture_counted_by_hand():
    """Two rows of domain text, 4 tokens each, and two conversations of 5 tokens with a label on the last 2. At 1:1 and
    two passes each source gives 16 tokens: four whole texts with 3 labels that a token precedes; three conversations
    and the first token of a fourth, whose answer is cut off."""
    texts = [dict(input_ids=[i] * 4, labels=[i] * 4, source="domain") for i in range(2)]
    talks = [dict(input_ids=[i] * 5, labels=[-100] * 3 + [i] * 2, source="instructions") for i in range(2)]
    got, plan = mixture(dict(domain=texts, instructions=talks), dict(domain=1, instructions=1), epochs=2)
    assert plan["tokens"] == dict(domain=16, instructions=16)
    assert plan["supervised"] == dict(domain=12, instructions=6)
    assert plan["shares"] == dict(
        tokens=dict(domain=0.5, instructions=0.5), supervised=dict(domain=0.6667, instructions=0.3333)
    )
    packed, names = pack(got, 8)
    graded = Counter(names[s] for row in packed for s, label in zip(row["source"], row["labels"]) if label != -100)
    assert graded == plan["supervised"]


def test_supervised_tokens_are_those_of_the_training(tok):
    "By the packed rows that the trainer is given: documents in pieces, conversations, two languages."
    docs = [dict(text="The gate opens at high tide and closes at low tide. " * 9), dict(text="平潮时开闸。" * 30)]
    talks = [
        [dict(role="user", content=q), dict(role="assistant", content="四十巴。")] for q in ("阀门？", "How high?")
    ]
    rows, _ = encode_all([dict(messages=talk) for talk in talks], tok, 64, "instructions")
    sources = dict(domain=tokenize(docs, tok, "domain", 32), instructions=rows)
    got, plan = mixture(sources, dict(domain=3, instructions=1), tokens=400, max_epochs=50)
    packed, names = pack(got, 64)
    graded = Counter(names[s] for row in packed for s, label in zip(row["source"], row["labels"]) if label != -100)
    assert graded == plan["supervised"] and 0 < graded["instructions"] < 100


def test_documents_end_with_the_separator(tok):
    docs = [{"text": "潮汐船闸的安全阀。"}, {"text": "A lock."}]
    got = tokenize(docs, tok, "a", length=8)
    assert sum(r["input_ids"].count(tok.convert_tokens_to_ids("<|endoftext|>")) for r in got) == 2
    assert tok.decode(sum((r["input_ids"] for r in got), [])) == "潮汐船闸的安全阀。<|endoftext|>A lock.<|endoftext|>"


@pytest.mark.parametrize("parts", [{"a": 0}, {"a": -1}, {"a": float("nan")}, {"a": "1"}, {"a": True}, {"zz": 1}])
def test_bad_parts(parts):
    with pytest.raises(InputError):
        plan_tokens({"a": 10}, parts)


def test_empty_source():
    with pytest.raises(InputError, match="no tokens"):
        plan_tokens({"a": 10, "b": 0}, {"a": 1, "b": 1})


def test_published_rows_are_complete():
    assert all(0 < p["general"] < 1 and p["rests"] and p["source"].rstrip()[-4:].isdigit() for p in PUBLISHED)
    assert len({p["name"] for p in PUBLISHED}) == len(PUBLISHED)


@pytest.mark.parametrize(
    "tokens, shift, general",
    [
        (1e6, "weak", 5),
        (1e6, "strong", 10),
        (5e7, "weak", 2),
        (5e7, "strong", 5),
        (1e9, "weak", 5 / 95),
        (1e9, "strong", 1 / 3),
    ],
)
def test_recommended_ratio(tokens, shift, general):
    r = recommend_ratio(tokens, shift)
    assert r["parts"]["general"] == pytest.approx(general, abs=0.001)
    assert r["low"] <= r["parts"]["general"] <= r["high"]
    assert r["reasons"] and r["sources"]
    assert plan_tokens({"domain": 100, "general": 1000}, r["parts"])["tokens"]["domain"] == 100


def test_more_domain_text_never_asks_for_more_replay():
    for shift in ("weak", "strong"):
        parts = [recommend_ratio(10**k, shift)["parts"]["general"] for k in range(3, 13)]
        assert parts == sorted(parts, reverse=True)
    for k in range(3, 13):
        weak, strong = (recommend_ratio(10**k, shift)["parts"]["general"] for shift in ("weak", "strong"))
        assert weak <= strong


@pytest.mark.parametrize(
    "tokens, shift",
    [(0, "weak"), (-5, "weak"), (float("nan"), "weak"), ("1M", "weak"), (True, "weak"), (None, "weak"), (1000, "week")],
)
def test_bad_input_to_recommend(tokens, shift):
    with pytest.raises(InputError):
        recommend_ratio(tokens, shift)


TRUE = {
    "domain": dict(form="learning", unit=6000, E=0.35, B=0.08, eta=1.2, beta=0.4, C=0.3, eps=0.05, gamma=0.6, grow=0),
    "general": dict(form="rising", unit=6000, E=0.86, B=0, eta=1, beta=0, C=0.03, eps=0.03, gamma=0.7, grow=0.3),
}
SHARES, SIZES = [1, 0.9, 0.75, 0.5, 1 / 6], [3000, 6000, 9000]


def by_hand(p, r, D):
    "The formulas of the chapter, written out."
    u = D / p["unit"]
    if p["form"] == "learning":
        return p["E"] + p["B"] * r ** p["eta"] / u ** p["beta"] + p["C"] / (r + p["eps"]) ** p["gamma"]
    return p["E"] + p["C"] * u ** p["grow"] / (r + p["eps"]) ** p["gamma"]


def pilots(name, noise=0.0, seeds=1, seed=0, sizes=SIZES):
    import numpy as np

    rng, own = np.random.default_rng(seed), (lambda r: r if name == "domain" else 1 - r)
    return [
        dict(share=own(r), tokens=t, loss=by_hand(TRUE[name], own(r), t) * np.exp(noise * rng.normal()))
        for r in SHARES
        for t in sizes
        for _ in range(seeds)
    ]


@pytest.mark.parametrize("name", ["domain", "general"])
def test_law_is_recovered_without_noise(name):
    law = fit_law(pilots(name), rising=name == "general")
    for r in (0.03, 0.25, 0.4, 0.75, 0.9):
        for t in (2000, 4500, 30_000, 100_000):
            assert predict(law, r, t) == pytest.approx(by_hand(TRUE[name], r, t), rel=0.01)


def test_one_outlier_does_not_pull_the_law():
    points = pilots("general", noise=0.001)
    points[4] = dict(points[4], loss=points[4]["loss"] * 1.5)
    law = fit_law(points, rising=True)
    for r in (0.25, 0.6, 0.8):
        assert predict(law, r, 6000) == pytest.approx(by_hand(TRUE["general"], r, 6000), rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_laws_fall_with_their_share_whatever_the_pilots_say(seed):
    import numpy as np

    rng, line = np.random.default_rng(seed), np.linspace(0, 1, 200)
    points = [dict(share=r, tokens=t, loss=float(rng.uniform(0.5, 2))) for r in SHARES for t in SIZES]
    learns, rises = fit_law(points), fit_law(points, rising=True)
    for t in (3000, 9000, 50_000):
        assert (np.diff(predict(learns, line, t)) <= 1e-12).all() and (np.diff(predict(rises, line, t)) <= 1e-12).all()
    for r in (0.05, 0.5, 1):
        sizes = np.linspace(2000, 50_000, 50)
        assert (np.diff(predict(learns, r, sizes)) <= 1e-12).all()
        assert (np.diff(predict(rises, r, sizes)) >= -1e-12).all()


def test_pilots_of_one_size_speak_of_that_size_only():
    law = fit_law(pilots("general", sizes=[9000]))
    assert predict(law, 0.25) == pytest.approx(by_hand(TRUE["general"], 0.25, 9000), rel=0.01)
    with pytest.raises(InputError, match="9,000 tokens only"):
        predict(law, 0.25, 30_000)


def test_published_replay_sweep_within_three_percent():
    "English loss of a 405M model after 200 billion tokens of German, by share of English kept (Ibrahim et al., 2024)."
    sweep = {0: 3.56, 0.01: 2.83, 0.05: 2.57, 0.1: 2.46, 0.25: 2.33, 0.5: 2.24}
    for out in (0.01, 0.05, 0.1, 0.25):
        law = fit_law([dict(share=r, tokens=2e11, loss=y) for r, y in sweep.items() if r != out])
        assert predict(law, out) == pytest.approx(sweep[out], rel=0.03)


def test_fit_is_the_same_every_time_and_json():
    import json

    first = fit_law(pilots("domain", 0.01))
    assert first == fit_law(pilots("domain", 0.01)) and json.loads(json.dumps(first)) == first


@pytest.mark.parametrize(
    "points, match",
    [
        (pilots("domain")[:6], "at least 7"),
        (pilots("domain", sizes=[3000])[:3], "at least 4"),
        ([dict(share=0.5, tokens=t, loss=1) for t in range(1, 20)], "1 shares"),
        ([dict(share=0.5, tokens=10)], "no loss"),
        ([dict(share=1.5, tokens=10, loss=1)], "share is from 0 to 1"),
        ([dict(share=0.5, tokens=10, loss=float("nan"))], "above 0"),
        ([], "at least 7"),
    ],
)
def test_bad_pilots(points, match):
    with pytest.raises(InputError, match=match):
        fit_law(points)


def test_solved_share_equals_brute_force():
    import numpy as np

    for budget in (0.08, 0.1, 0.2):
        for tokens in (9000, 30_000):
            got = solve(TRUE["domain"], TRUE["general"], 0.86, budget, tokens)
            line = np.linspace(0.0005, 1, 40_001)
            keeps = [r for r in line if by_hand(TRUE["general"], 1 - r, tokens) <= 0.86 * (1 + budget)]
            best = min(keeps, key=lambda r: by_hand(TRUE["domain"], r, tokens))
            assert got["feasible"] and got["share"] == pytest.approx(best, abs=1e-3)
            assert got["parts"]["general"] == pytest.approx((1 - got["share"]) / got["share"], abs=0.001)
            assert got["general"] == pytest.approx(0.86 * (1 + budget), rel=1e-6)
            assert got["domain"] == pytest.approx(by_hand(TRUE["domain"], got["share"], tokens))


def test_nothing_to_trade_is_no_replay():
    got = solve(TRUE["domain"], TRUE["general"], 0.86, 5.0, 9000)
    assert got["share"] == 1 and got["parts"] == {"domain": 1} and got["feasible"]
    assert plan_tokens({"domain": 100}, got["parts"])["tokens"] == {"domain": 100}


def test_budget_that_no_share_keeps():
    got = solve(TRUE["domain"], TRUE["general"], 0.86, 0.0, 9000)
    least = by_hand(TRUE["general"], 0.999, 9000) / 0.86 - 1
    assert (
        not got["feasible"]
        and got["share"] == pytest.approx(0.001)
        and got["excess"] == pytest.approx(least)
        and "no share" in got["note"]
    )
    for base, budget in ((0, 0.1), (0.86, -0.1), (float("nan"), 0.1)):
        with pytest.raises(InputError):
            solve(TRUE["domain"], TRUE["general"], base, budget, 9000)


def test_interval_holds_the_true_share_in_most_experiments():
    """Eight experiments with 1% noise and one seed; were 95% of the intervals right, five or fewer of eight would be
    right in less than 1% of cases."""
    truth, hits = solve(TRUE["domain"], TRUE["general"], 0.86, 0.15, 30_000)["share"], 0
    for k in range(8):
        laws = [
            bootstrap_law(pilots(name, 0.01, seed=10 * k + i), n=25, rising=name == "general")
            for i, name in enumerate(TRUE)
        ]
        got = solve(*laws, 0.86, 0.15, 30_000)
        hits += got["low"] <= truth <= got["high"]
        assert got["low"] <= got["share"] <= got["high"] and got["high"] - got["low"] > 0.01
    assert hits >= 6


def test_bootstrap_needs_an_error_to_draw_from():
    with pytest.raises(InputError, match="no error to draw from"):
        bootstrap_law(pilots("general", sizes=[9000])[:4], n=5)


def test_rehearsal_is_decided_by_its_seed_and_reaches_the_tokens(tok):
    model = tiny(tok)
    first, again, other = (rehearse(model, tok, 200, longest=30, batch_size=4, seed=s) for s in (0, 0, 1))
    assert first == again and first != other
    assert 200 <= count(tokenize(first, tok, "general"))["general"] < 200 + 60
    assert all(
        set(r) == {"text", "source", "kind", "id"}
        and r["text"]
        and r["kind"] == "general"
        and r["source"] == "rehearsal"
        for r in first
    )
    assert len({r["id"] for r in first}) == len(first)


def test_rehearsal_leaves_the_random_state_alone_and_takes_openings_in_turn(tok):
    import torch

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    rows = rehearse(tiny(tok), tok, 100, openings=["潮汐船闸", "A lock"], longest=20, batch_size=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [r["text"].startswith(o) for r, o in zip(rows, itertools.cycle(["潮汐船闸", "A lock"]))] == [True] * len(
        rows
    )


def test_rehearsal_drops_what_is_no_text(tok, monkeypatch, capsys):
    fake = iter(
        [
            ["", "the lock " * 60, "阀门" * 200, "A first text."],
            ["A first text.", "A second text, about tides and their locks."] * 2,
        ]
    )
    monkeypatch.setattr("domain_llm.train.rehearse._sample", lambda *a, **k: next(fake))
    assert [r["text"] for r in rehearse(None, tok, 10, batch_size=4)] == [
        "A first text.",
        "A second text, about tides and their locks.",
    ]
    assert "1 empty, 2 a loop, 1 a copy" in capsys.readouterr().out


def test_rehearsal_gives_up_on_a_model_that_writes_nothing(tok, monkeypatch):
    monkeypatch.setattr("domain_llm.train.rehearse._sample", lambda model, tok, starts, **k: [""] * len(starts))
    with pytest.raises(InputError, match="0 usable texts"):
        rehearse(None, tok, 10)


@pytest.mark.parametrize(
    "bad", [dict(tokens=0), dict(temperature=0), dict(top_p=0), dict(top_p=1.5), dict(openings=())]
)
def test_bad_input_to_rehearse(tok, bad):
    with pytest.raises(InputError):
        rehearse(None, tok, **{"tokens": 10, **bad})


def test_module_imports_nothing_heavy():
    import subprocess
    import sys

    heavy = ("torch", "scipy", "numpy", "transformers")
    code = f"import sys, domain_llm.data.mix; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


DOCUMENTS = {  # written by hand: what stands before and after a document in each family
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "qwen2.5": ("", "<|endoftext|>"),
    "glm4": ("[gMASK]<sop>", "<|endoftext|>"),
    "baichuan2": ("", "</s>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_begin_and_end_as_their_family_does(name):
    tok, (before, after) = family(name), DOCUMENTS[name]
    text = "The relief valve opens at 40 bar. 潮汐"
    (row,) = tokenize([{"text": text}], tok, "a")
    assert tok.decode(row["input_ids"]) == before + text + after
    opening = len(tok(before, add_special_tokens=False).input_ids)
    assert row["labels"] == [-100] * opening + row["input_ids"][opening:]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_only_the_first_piece_of_a_document_has_the_opening(name):
    tok, (before, after) = family(name), DOCUMENTS[name]
    pieces = [
        tok.decode(r["input_ids"])
        for r in tokenize([{"text": "The relief valve opens. " * 9}] * 2, tok, "a", length=16)
    ]
    assert all(
        len(r["input_ids"]) <= 16 for r in tokenize([{"text": "The relief valve opens. " * 9}], tok, "a", length=16)
    )
    assert "".join(pieces) == (before + "The relief valve opens. " * 9 + after) * 2 and len(pieces) > 4


@pytest.mark.parametrize("name", [*DOCUMENTS, "smollm2"])
def test_control_tokens_in_a_document_stay_text(tok, name):
    tok = tok if name == "smollm2" else family(name)
    controls = {i: t.content for i, t in tok.added_tokens_decoder.items() if t.special}
    text = "The tokens " + " and ".join(controls.values()) + " end turns and texts."

    def count(text):
        ids = tokenize([{"text": text}], tok, "a")[0]["input_ids"]
        return {i: ids.count(i) for i in controls}

    assert count(text) == count("The tokens.")
    (row,) = tokenize([{"text": text}], tok, "a")
    assert text in tok.decode(row["input_ids"])


def test_ordinary_documents_are_tokenized_as_before(tok):
    "For the demo model: the plain ids of the text and <|endoftext|>, whose id is 0, with a label on every token."
    docs = list(make_world(seed=0, entities=10)["documents"]) + list(general_text())[:50]
    for d in docs:
        (row,) = tokenize([d], tok, "a", length=10**6)
        assert row["input_ids"] == row["labels"] == tok(d["text"], add_special_tokens=False).input_ids + [0]


@pytest.mark.parametrize("name", [*DOCUMENTS, "smollm2"])
def test_rehearsal_starts_with_what_precedes_a_document(tok, monkeypatch, name):
    tok, seen = tok if name == "smollm2" else family(name), []

    def sample(model, tok, starts, **k):
        seen.extend(starts)
        return [f"A text about valves, number {i}." for i in range(len(starts))]

    monkeypatch.setattr("domain_llm.train.rehearse._sample", sample)
    rows = rehearse(None, tok, 5, batch_size=1)
    before, after = DOCUMENTS.get(name, ("", "<|endoftext|>"))
    assert tok.decode(seen[0]) == (before or after)
    assert count(tokenize(rows, tok, "general"))["general"] >= 5
