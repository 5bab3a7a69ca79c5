import itertools, random
from collections import Counter

import pytest

from domain_llm import mix
from domain_llm.core import InputError


def rows(name, n, rng): return [dict(input_ids=[1] * k, labels=[1] * k, source=name) for k in (rng.randint(5, 60) for _ in range(n))]


def count(rows):
    c = Counter()
    for r in rows: c[r["source"]] += len(r["input_ids"])
    return c


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [{"a": 1, "b": 5}, {"a": 1, "b": 0.25}, {"a": 1, "b": 2, "c": 0.3}])
def test_ratio_is_exact_to_one_percent(parts, seed):
    rng = random.Random(seed)
    sources = {n: rows(n, rng.randint(80, 400), rng) for n in parts}
    got, p = mix.mixture(sources, parts, seed=seed, epochs=2, max_epochs=100)
    c = count(got)
    for n, part in parts.items(): assert c[n] / sum(c.values()) == pytest.approx(part / sum(parts.values()), rel=0.01)
    assert c["a"] == pytest.approx(2 * count(sources["a"])["a"], rel=0.01)


def test_ratio_holds_at_every_point():
    rng = random.Random(0)
    got, _ = mix.mixture({"a": rows("a", 300, rng), "b": rows("b", 900, rng)}, {"a": 1, "b": 3})
    c = Counter()
    for r in got:
        c[r["source"]] += len(r["input_ids"])
        if sum(c.values()) > 2000: assert abs(c["a"] / sum(c.values()) - 0.25) < 60 / 2000


def test_interleave_works_on_endless_streams():
    endless = {n: itertools.repeat(dict(input_ids=[0] * k, source=n)) for n, k in (("a", 7), ("b", 50))}
    c = count(itertools.islice(mix.interleave(endless, {"a": 2, "b": 1}), 5000))
    assert c["a"] / c["b"] == pytest.approx(2, rel=0.01)


def test_seed_decides_everything():
    rng = random.Random(0)
    s = {"a": rows("a", 50, rng), "b": rows("b", 50, rng)}
    first, again, other = (mix.mixture(s, {"a": 1, "b": 1}, seed=k)[0] for k in (0, 0, 1))
    assert first == again and first != other


def test_small_source_ends_the_run_and_says_so():
    p = mix.plan({"a": 1000, "b": 500}, {"a": 1, "b": 5}, epochs=1, max_epochs=4)
    assert p["tokens"] == {"a": 400, "b": 2000} and "'b' has only 500 tokens" in p["notes"][0]
    p = mix.plan({"a": 1000, "b": 2500}, {"a": 1, "b": 5}, epochs=1, max_epochs=4)
    assert p["tokens"] == {"a": 1000, "b": 5000} and "repeated 2.0 times" in p["notes"][0]


def test_every_pass_gives_every_row_once():
    rng = random.Random(3)
    s = {"a": [dict(input_ids=[i] * 10, labels=[i] * 10, source="a") for i in range(40)], "b": rows("b", 200, rng)}
    got = [r["input_ids"][0] for r in mix.mixture(s, {"a": 1, "b": 1}, epochs=3)[0] if r["source"] == "a"]
    for k in range(3): assert sorted(got[40 * k:40 * k + 40]) == list(range(40))


def test_documents_end_with_the_separator(tok):
    docs = [{"text": "潮汐船闸的安全阀。"}, {"text": "A lock."}]
    got = mix.tokenize(docs, tok, "a", length=8)
    assert sum(r["input_ids"].count(tok.convert_tokens_to_ids("<|endoftext|>")) for r in got) == 2
    assert tok.decode(sum((r["input_ids"] for r in got), [])) == "潮汐船闸的安全阀。<|endoftext|>A lock.<|endoftext|>"


@pytest.mark.parametrize("parts", [{"a": 0}, {"a": -1}, {"a": float("nan")}, {"a": "1"}, {"a": True}, {"zz": 1}])
def test_bad_parts(parts):
    with pytest.raises(InputError): mix.plan({"a": 10}, parts)


def test_empty_source():
    with pytest.raises(InputError, match="no tokens"): mix.plan({"a": 10, "b": 0}, {"a": 1, "b": 1})
