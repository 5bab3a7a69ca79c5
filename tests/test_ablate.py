import json

import numpy as np
import pytest
from scipy import stats

from domain_llm import ablate
from domain_llm.core import InputError


def arms_of(n=3): return {f"1:{i}": dict(general=i) for i in range(n)}


def test_one_seed_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    r, want = ablate.difference([a], [b]), stats.ttest_rel(a, b)
    low, high = want.confidence_interval()
    assert r["diff"] == pytest.approx((a - b).mean()) and r["p"] == pytest.approx(want.pvalue)
    assert (r["low"], r["high"]) == pytest.approx((low, high))


def test_groups_of_one_size_are_their_means():
    rng = np.random.default_rng(1)
    d = rng.normal(0, 1, (20, 5))
    r, want = ablate.difference([d.ravel()], [np.zeros(100)], np.repeat(np.arange(20), 5)), stats.ttest_1samp(d.mean(1), 0)
    assert r["p"] == pytest.approx(want.pvalue) and r["groups"] == 20


def test_the_mean_of_unequal_groups_is_that_of_the_items():
    r = ablate.difference([[1, 1, 1, 0], [1, 1, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]], ["a", "a", "a", "b"])
    assert r["diff"] == pytest.approx(5 / 8)


@pytest.mark.parametrize("seed_sd, group_sd, groups, least", [(0.3, 0.3, 40, 930), (0.02, 0.7, 40, 930), (0.3, 0.0, 40, 930), (0.0, 0.0, 40, 930), (1.0, 1.0, 40, 905), (1.0, 1.0, 5, 940), (0.0, 1.0, 5, 940)])
def test_the_interval_covers_the_truth(seed_sd, group_sd, groups, least):
    rng, inside = np.random.default_rng(5), 0
    for _ in range(1000):
        d = 0.2 + rng.normal(0, seed_sd, (3, 1)) + rng.normal(0, group_sd, (1, groups)) + rng.normal(0, 1, (3, groups))
        r = ablate.difference(d, np.zeros_like(d))
        inside += r["low"] <= 0.2 <= r["high"]
    assert inside >= least


def test_margin_moves_the_p_value_only():
    rng = np.random.default_rng(2)
    a = rng.normal(0.3, 1, (1, 40))
    r = ablate.difference(a, np.zeros_like(a), margin=0.1)
    assert r["p"] == pytest.approx(stats.ttest_1samp(a[0], 0.1).pvalue) and r["diff"] == pytest.approx(a.mean())


def test_no_spread_at_all():
    r = ablate.difference([[1, 1, 1]], [[0, 0, 0]])
    assert (r["diff"], r["low"], r["high"]) == (1, 1, 1) and r["p"] == stats.binomtest(3, 3).pvalue  # the sign test: three items alone prove nothing


def test_numpy_values_survive_the_disk(tmp_path):
    measure = lambda settings, seed: dict(mcq=dict(values=np.array([1.0, 0.0]), groups=np.array(["a", "b"])))
    first = ablate.run(measure, arms_of(), (0,), tmp_path)
    assert ablate.run(None, arms_of(), (0,), tmp_path) == first and first["1:0"]["0"]["mcq"] == dict(values=[1.0, 0.0], groups=["a", "b"])


def test_runs_are_kept_and_a_changed_arm_is_run_again(tmp_path):
    made = []
    def measure(settings, seed):
        made.append((settings["general"], seed))
        return dict(mcq=dict(values=[seed, settings["general"]]))
    first = ablate.run(measure, arms_of(), (0, 1), tmp_path)
    assert made == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]  # whole seeds first
    made.clear()
    assert ablate.run(measure, arms_of(), (0, 1), tmp_path) == first and not made
    ablate.run(measure, {**arms_of(), "1:1": dict(general=9)}, (0, 1, 2), tmp_path)
    assert made == [(9, 0), (9, 1), (0, 2), (9, 2), (2, 2)]


def test_a_failing_run_costs_itself_only(tmp_path):
    def measure(settings, seed):
        if settings["general"] == 1: raise RuntimeError("cut")
        return dict(mcq=dict(values=[1, 0]))
    with pytest.raises(RuntimeError): ablate.run(measure, arms_of(), (0,), tmp_path)
    kept = [json.loads(p.read_text())["arm"] for p in tmp_path.glob("*.json")]
    assert kept == ["1:0"]


def runs_of(means, n=300, seeds=3):
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 0.1, n)
    return {a: {str(s): dict(mcq=dict(values=((m + easy + rng.normal(0, 0.1, n))).tolist())) for s in range(seeds)} for a, m in means.items()}


def test_verdicts_and_margin():
    runs = runs_of({"base": 0.5, "same": 0.5, "up": 0.6, "down": 0.4})
    claim = lambda arm, **kw: dict(text="t", metric="mcq", arm=arm, base="base", **kw)
    said = ablate.verdict(runs, [claim("up"), claim("down"), claim("same"), claim("down", more=False), claim("up", margin=0.05), claim("up", margin=0.15), claim("down", more=False, margin=0.15)])
    assert [c["verdict"] for c in said] == ["supported", "refuted", "not resolved at this size", "supported", "supported", "refuted", "refuted"]
    assert "not resolved" in ablate.sentence(said[2]) and "supported. up against base" in ablate.sentence(said[0])


def test_holm_by_hand():
    runs = runs_of({"base": 0.5, "a": 0.512, "b": 0.515, "c": 0.518})
    said = ablate.verdict(runs, [dict(text="t", metric="mcq", arm=x, base="base") for x in "abc"])
    p = sorted(c["p"] for c in said)
    want = np.maximum.accumulate([min(1, p[0] * 3), min(1, p[1] * 2), p[2]])
    assert sorted(c["p_holm"] for c in said) == pytest.approx(list(want))


def test_what_only_the_correction_leaves_open_asks_for_more():
    "One of ten claims has an interval beyond zero by itself, and a p value above 0.05 / 10."
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1, (11, 50))
    d -= d.mean(1, keepdims=True)
    d[1] += 2.5 * d[1].std(ddof=1) / np.sqrt(50)
    runs = {f"arm {i}": {"0": dict(mcq=dict(values=(d[i] * (i > 0)).tolist()))} for i in range(11)}
    said = ablate.verdict(runs, [dict(text="t", metric="mcq", arm=f"arm {i}", base="arm 0") for i in range(1, 11)])
    assert said[0]["low"] > 0 and said[0]["verdict"] == "not resolved at this size" and 50 < said[0]["needed"]["groups"] < 80
    assert f"would take about {said[0]['needed']['groups']} groups" in ablate.sentence(said[0])


def test_needed_sizes_do_resolve():
    "At the size that it asks for, the same parts of variance give an interval that just clears the margin."
    r = dict(diff=0.1, parts=dict(seed=0.001, group=0.5, both=1.0), seeds=3, groups=40)
    n = ablate.needed(r)
    se = lambda S, G: np.sqrt(0.001 / S + 0.5 / G + 1.0 / (S * G))
    half = lambda S, G, n: stats.t.ppf(0.975, n - 1) * se(S, G)
    assert half(3, n["groups"], n["groups"]) <= 0.1 < half(3, n["groups"] - 1, n["groups"] - 1)
    assert n["seeds"] is None  # forty groups alone leave more than the difference
    few = ablate.needed(dict(diff=1.0, parts=dict(seed=0.5, group=0.0, both=0.0), seeds=2, groups=40))["seeds"]
    assert few == 5 and 1.96 * np.sqrt(0.5 / 2) < 1  # by hand: t(4) = 2.776, times sqrt(0.5 / 5) is 0.88; t(3) = 3.182 gives 1.13


def test_the_forest_shows_every_claim_in_its_panel():
    claims = [dict(text=f"claim {i}", metric=m, diff=d, low=d - 0.1, high=d + 0.1, verdict=v) for i, (m, d, v) in enumerate(
        [("mcq", 0.3, "supported"), ("bpb", -0.2, "refuted"), ("mcq", 0.05, "not resolved at this size")])]
    fig = ablate.forest(claims, {"mcq": ("points", 100)})
    upper, lower = fig.axes
    assert [t.get_text() for t in upper.get_yticklabels()] == ["claim 0", "claim 2"] and "points" in upper.get_xlabel() and "bpb" in lower.get_xlabel()
    points = [(float(c.lines[0].get_xdata()[0]), c.lines[0].get_color()) for ax in fig.axes for c in ax.containers]
    assert [x for x, _ in points] == pytest.approx([30, 5, -0.2]) and len({colour for _, colour in points}) == 3
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {c["verdict"] for c in claims}


def test_detectable_has_the_power_it_says():
    "Simulated discordant pairs, tested by McNemar."
    n, differ = 400, 0.2
    d = ablate.detectable(n, differ)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [(differ + d) / 2, (differ - d) / 2, 1 - differ], 2000)
    power = np.mean([stats.binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b, _ in draws])
    assert 0.74 < power < 0.86


@pytest.mark.parametrize("call, says", [
    (lambda: ablate.run(None, {"a": {}}, (0,), "x"), "at least two arms"),
    (lambda: ablate.run(None, {"a": {}, "b": {}}, (0, 0), "x"), "each once"),
    (lambda: ablate.difference([[1, 0]], [[1, 0, 0]]), "same seeds"),
    (lambda: ablate.difference([[1, 0]], [[0, 0]], ["a", "a"]), "one group"),
    (lambda: ablate.compare(runs_of({"a": 0, "b": 0}), "mcq", "aa", "b"), "did you mean 'a'"),
    (lambda: ablate.compare(runs_of({"a": 0, "b": 0}), "mcp", "a", "b"), "did you mean 'mcq'"),
    (lambda: ablate.run(None, {"1:1": {}, "1-1": {}}, (0,), "x"), "share a file"),
    (lambda: ablate.detectable(1), "at least 2"),
    (lambda: ablate.forest([]), "no claim"),
])
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says): call()
