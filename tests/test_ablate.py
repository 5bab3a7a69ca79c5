import gc
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from domain_llm.core import InputError
from domain_llm.judge.ablate import at_level, compare_arms, design, needed, run_arms, sentence, verdict
from domain_llm.judge.plots import effects, forest, trade
from domain_llm.judge.stats import detectable, difference

ROOT = Path(__file__).resolve().parent.parent


def arms_of(n=3):
    return {f"1:{i}": dict(general=i) for i in range(n)}


def test_one_seed_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    r, want = difference([a], [b]), stats.ttest_rel(a, b)
    low, high = want.confidence_interval()
    assert r["diff"] == pytest.approx((a - b).mean()) and r["p"] == pytest.approx(want.pvalue)
    assert (r["low"], r["high"]) == pytest.approx((low, high))


def test_groups_of_one_size_are_their_means():
    rng = np.random.default_rng(1)
    d = rng.normal(0, 1, (20, 5))
    r, want = difference([d.ravel()], [np.zeros(100)], np.repeat(np.arange(20), 5)), stats.ttest_1samp(d.mean(1), 0)
    assert r["p"] == pytest.approx(want.pvalue) and r["groups"] == 20


def test_the_mean_of_unequal_groups_is_that_of_the_items():
    r = difference([[1, 1, 1, 0], [1, 1, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]], ["a", "a", "a", "b"])
    assert r["diff"] == pytest.approx(5 / 8)


@pytest.mark.parametrize(
    "seed_sd, group_sd, groups, least",
    [
        (0.3, 0.3, 40, 930),
        (0.02, 0.7, 40, 930),
        (0.3, 0.0, 40, 930),
        (0.0, 0.0, 40, 930),
        (1.0, 1.0, 40, 905),
        (1.0, 1.0, 5, 940),
        (0.0, 1.0, 5, 940),
    ],
)
def test_the_interval_covers_the_truth(seed_sd, group_sd, groups, least):
    rng, inside = np.random.default_rng(5), 0
    for _ in range(1000):
        d = 0.2 + rng.normal(0, seed_sd, (3, 1)) + rng.normal(0, group_sd, (1, groups)) + rng.normal(0, 1, (3, groups))
        r = difference(d, np.zeros_like(d))
        inside += r["low"] <= 0.2 <= r["high"]
    assert inside >= least


def test_margin_moves_the_p_value_only():
    rng = np.random.default_rng(2)
    a = rng.normal(0.3, 1, (1, 40))
    r = difference(a, np.zeros_like(a), margin=0.1)
    assert r["p"] == pytest.approx(stats.ttest_1samp(a[0], 0.1).pvalue) and r["diff"] == pytest.approx(a.mean())


def test_a_few_groups_that_agree_have_no_interval():
    r = difference([[1, 1, 1]], [[0, 0, 0]])
    assert (r["diff"], r["low"], r["high"]) == (1, None, None) and r["p"] == stats.binomtest(
        3, 3
    ).pvalue  # the sign test: three items alone prove nothing
    many = difference([[1] * 8], [[0] * 8])
    assert (many["low"], many["high"], many["p"]) == (1, 1, stats.binomtest(8, 8).pvalue)


def test_one_group_tells_nothing_of_others():
    r = difference([[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]], ["a", "a", "a"])
    assert (r["low"], r["high"], r["p"], r["groups"]) == (None, None, 1.0, 1) and r["diff"] == pytest.approx(4 / 6)


def test_order_within_a_group_is_no_spread():
    "The change is a third in either group; rounding in another order of the items must not look like a tiny scatter."
    r = difference([[1, 0, 0, 0, 0, 1]], [[0] * 6], ["a"] * 3 + ["b"] * 3)
    assert r["low"] is None and r["p"] == 0.5


def test_numpy_values_survive_the_disk(tmp_path):
    def measure(settings, seed):
        return dict(mcq=dict(values=np.array([1.0, 0.0]), groups=np.array(["a", "b"])))

    first = run_arms(measure, arms_of(), (0,), tmp_path)
    assert run_arms(None, arms_of(), (0,), tmp_path) == first and first["1:0"]["0"]["mcq"] == dict(
        values=[1.0, 0.0], groups=["a", "b"]
    )


def test_runs_are_kept_and_a_changed_arm_is_run_again(tmp_path):
    made = []

    def measure(settings, seed):
        made.append((settings["general"], seed))
        return dict(mcq=dict(values=[seed, settings["general"]]))

    first = run_arms(measure, arms_of(), (0, 1), tmp_path)
    assert made == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]  # whole seeds first
    made.clear()
    assert run_arms(measure, arms_of(), (0, 1), tmp_path) == first and not made
    run_arms(measure, {**arms_of(), "1:1": dict(general=9)}, (0, 1, 2), tmp_path)
    assert made == [(9, 0), (9, 1), (0, 2), (9, 2), (2, 2)]


def test_a_failing_run_costs_itself_only(tmp_path):
    def measure(settings, seed):
        if settings["general"] == 1:
            raise RuntimeError("cut")
        return dict(mcq=dict(values=[1, 0]))

    with pytest.raises(RuntimeError):
        run_arms(measure, arms_of(), (0,), tmp_path)
    kept = [json.loads(p.read_text())["arm"] for p in tmp_path.glob("*.json")]
    assert kept == ["1:0"]


def runs_of(means, n=300, seeds=3):
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 0.1, n)
    return {
        a: {str(s): dict(mcq=dict(values=(m + easy + rng.normal(0, 0.1, n)).tolist())) for s in range(seeds)}
        for a, m in means.items()
    }


def test_verdicts_and_margin():
    runs = runs_of({"base": 0.5, "same": 0.5, "up": 0.6, "down": 0.4})

    def claim(arm, **kw):
        return dict(text="t", metric="mcq", arm=arm, base="base", **kw)

    said = verdict(
        runs,
        [
            claim("up"),
            claim("down"),
            claim("same"),
            claim("down", more=False),
            claim("up", margin=0.05),
            claim("up", margin=0.15),
            claim("down", more=False, margin=0.15),
        ],
    )
    assert [c["verdict"] for c in said] == [
        "supported",
        "refuted",
        "not resolved at this size",
        "supported",
        "supported",
        "refuted",
        "refuted",
    ]
    assert "not resolved" in sentence(said[2]) and "supported. up against base" in sentence(said[0])


def test_holm_by_hand():
    runs = runs_of({"base": 0.5, "a": 0.512, "b": 0.515, "c": 0.518})
    said = verdict(runs, [dict(text="t", metric="mcq", arm=x, base="base") for x in "abc"])
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
    said = verdict(runs, [dict(text="t", metric="mcq", arm=f"arm {i}", base="arm 0") for i in range(1, 11)])
    assert (
        said[0]["low"] > 0
        and said[0]["verdict"] == "not resolved at this size"
        and 95 < said[0]["needed"]["groups"] < 115
    )  # by z: 50 (2.807 + 0.842)^2 / 2.5^2 = 107
    assert "would take about 110 groups of items to be found with 80% probability" in sentence(
        said[0]
    )  # two digits of it


def test_needed_sizes_by_hand():
    "At the size that it asks for, the difference is t(0.975) + t(0.8) standard errors."
    n = needed(dict(diff=0.1, low=0, high=0.2, parts=dict(seed=0.0, group=0.5, both=1.0), seeds=1, groups=40))

    def least(G):
        return (stats.t.ppf(0.975, G - 1) + stats.t.ppf(0.8, G - 1)) * np.sqrt(1.5 / G)

    assert least(n["groups"]) <= 0.1 < least(n["groups"] - 1)
    assert (
        needed(dict(diff=0.1, low=0, high=0.2, parts=dict(seed=0.0, group=0.5, both=1.0), seeds=3, groups=40))["seeds"]
        is None
    )  # forty groups alone leave more than the difference
    few = needed(dict(diff=1.0, low=0, high=2, parts=dict(seed=0.5, group=0.0, both=0.0), seeds=2, groups=40))["seeds"]
    assert few == 7  # t(6) = 2.447 and 0.906, times sqrt(0.5 / 7) is 0.90; six seeds give 1.01
    assert needed(dict(diff=1.0, low=None, high=None, parts=dict(seed=0, group=0, both=0), seeds=1, groups=1)) == dict(
        groups=None, seeds=None
    )


def drawn(rng, true, parts, S, G):
    "A difference measured with these variance parts."
    spread = [
        rng.normal(0, np.sqrt(parts[k]), size) for k, size in (("seed", (S, 1)), ("group", (1, G)), ("both", (S, G)))
    ]
    d = true + sum(spread)
    return difference(d, np.zeros_like(d))


@pytest.mark.parametrize(
    "parts",
    [dict(seed=0.0, group=0.3, both=0.6), dict(seed=0.002, group=0.3, both=0.6), dict(seed=0.05, group=0.05, both=0.6)],
)
def test_needed_has_the_power_it_says(parts):
    "80% by the t approximation; estimated degrees of freedom cost or give a few points."
    rng, sizes = np.random.default_rng(3), needed(dict(diff=0.25, low=0, high=0.4, parts=parts, seeds=5, groups=100))
    for S, G in ((5, sizes["groups"]), (sizes["seeds"], 100)):
        if S and G:
            assert 0.74 < np.mean([drawn(rng, 0.25, parts, S, G)["p"] < 0.05 for _ in range(1000)]) < 0.88
    assert any(sizes.values())


@pytest.mark.parametrize("seeds, groups", [(1, 12), (3, 40), (5, 8), (8, 100)])
def test_a_design_tells_what_the_experiment_will(seeds, groups):
    parts = dict(seed=0.01 * (seeds > 1), group=0.4, both=0.8)
    planned = design(parts, seeds, groups, matters=0.4)
    rng = np.random.default_rng(seeds)
    found = [drawn(rng, 0.4, parts, seeds, groups) for _ in range(1500)]
    assert planned["half_width"] == pytest.approx(np.mean([(r["high"] - r["low"]) / 2 for r in found]), rel=0.15)
    assert planned["power"] == pytest.approx(np.mean([r["p"] < 0.05 for r in found]), abs=0.08)


def test_a_design_is_refused_below_its_ceiling():
    "By hand, with one seed: t(24) = 2.064 times sqrt(1 / 25) is 0.413."
    parts = dict(seed=0.0, group=1.0, both=0.0)
    planned = design(parts, 1, 25, ceiling=0.8)
    assert (
        planned["half_width"] == pytest.approx(0.4128, abs=1e-4)
        and planned["worth"] is False
        and "do not run it" in planned["said"]
    )
    assert design(parts, 1, 25, ceiling=0.9)["worth"] is True
    assert design(parts, 1, 25)["worth"] is None


def close_runs(n=60, seeds=4):
    "Arms that differ by 0.3 (up), 0.03 (near) and not at all (same), with a little noise."
    rng = np.random.default_rng(1)
    true = dict(base=0.5, up=0.8, near=0.53, same=0.5)

    def draw(m):
        return dict(
            mcq=dict(values=(m + rng.normal(0, 0.1, n)).tolist()), bpb=dict(values=(m + rng.normal(0, 0.1, n)).tolist())
        )

    return {a: {str(s): draw(m) for s in range(seeds)} for a, m in true.items()}


def claimed(arm, metric="mcq", **more):
    return dict(text=arm, metric=metric, arm=arm, base="base", **more)


def test_too_small_to_matter_needs_a_stated_size_and_a_control():
    runs, control = close_runs(), claimed("up", control=True)

    def verdicts(*claims):
        return [c["verdict"] for c in verdict(runs, list(claims))]

    assert verdicts(control, claimed("same", matters=0.06)) == ["supported", "too small to matter"]
    assert verdicts(control, claimed("same")) == ["supported", "not resolved at this size"]
    assert verdicts(claimed("up"), claimed("same", matters=0.06)) == [
        "supported",
        "not resolved at this size",
    ]  # nothing is marked as a control
    assert verdicts(claimed("up", more=False, control=True), claimed("same", matters=0.06)) == [
        "refuted",
        "not resolved at this size",
    ]
    assert verdicts(claimed("up", metric="bpb", control=True), claimed("same", matters=0.06)) == [
        "supported",
        "not resolved at this size",
    ]  # another metric
    assert verdicts(control, claimed("same", matters=0.005)) == ["supported", "not resolved at this size"]
    assert verdicts(control, claimed("near")) == ["supported", "supported"] and verdicts(
        control, claimed("near", matters=0.065)
    ) == ["supported", "too small to matter"]
    assert verdicts(control, claimed("up", matters=0.06)) == ["supported", "supported"]


def test_equivalence_is_the_interval_within_the_margin():
    runs, control = close_runs(), claimed("up", control=True)
    r = compare_arms(runs, "mcq", "same", "base")
    edge = max(abs(r["low"]), abs(r["high"]))
    for factor, want in ((1.001, "too small to matter"), (0.999, "not resolved at this size")):
        assert verdict(runs, [control, claimed("same", matters=factor * edge)])[1]["verdict"] == want


def test_equivalences_are_corrected_among_themselves():
    runs = close_runs()
    r = compare_arms(runs, "mcq", "same", "base")
    claims = [
        claimed("up", control=True),
        *[claimed("same", matters=1.001 * max(abs(r["low"]), abs(r["high"]))) for _ in range(2)],
    ]
    said = verdict(runs, claims)
    assert [c["verdict"] for c in said[1:]] == ["not resolved at this size"] * 2 and said[1][
        "p_small"
    ] == pytest.approx(2 * 0.05, rel=0.02)


def test_a_true_difference_is_rarely_called_too_small(monkeypatch):
    "True difference exactly at the margin: 2.5% by theory."
    monkeypatch.setattr(gc, "collect", lambda: 0)  # statsmodels calls it each time, which is most of the time
    rng, wrong = np.random.default_rng(0), 0

    def values(m):
        return dict(mcq=dict(values=(m + rng.normal(0, 0.1, 30)).tolist()))

    for _ in range(300):
        runs = {a: {str(s): values(m) for s in range(3)} for a, m in dict(base=0, up=1, edge=0.05).items()}
        wrong += (
            verdict(runs, [claimed("up", control=True), claimed("edge", matters=0.05)])[1]["verdict"]
            == "too small to matter"
        )
    assert wrong <= 15


def test_the_sentence_says_what_was_declared():
    runs = close_runs()
    small = verdict(runs, [claimed("up", control=True), claimed("same", matters=0.06)])[1]
    assert "too small to matter" in sentence(
        small
    ) and "differences below 6 points were declared not to matter" in sentence(small)
    alone = verdict(runs, [claimed("same", matters=0.06)])[0]
    assert "no positive control" in sentence(alone)


def test_a_claim_without_an_interval_is_said_and_drawn():
    runs = {a: {"0": dict(mcq=dict(values=[v] * 4, groups=["a"] * 4))} for a, v in dict(base=0.0, up=1.0).items()}
    said = verdict(runs, [claimed("up")])
    assert (
        said[0]["verdict"] == "not resolved at this size"
        and "no interval" in sentence(said[0])
        and "too few groups" in sentence(said[0])
    )
    forest(said), effects(runs, "mcq", "base")
    json.dumps(said, allow_nan=False)


def test_the_forest_shows_every_claim_in_its_panel():
    claims = [
        dict(text=f"claim {i}", metric=m, diff=d, low=d - 0.1, high=d + 0.1, verdict=v)
        for i, (m, d, v) in enumerate(
            [
                ("mcq", 0.3, "supported"),
                ("bpb", -0.2, "refuted"),
                ("mcq", 0.05, "not resolved at this size"),
                ("bpb", 0.01, "too small to matter"),
            ]
        )
    ]
    fig = forest(claims, {"mcq": ("points", 100)})
    upper, lower = fig.axes
    assert (
        [t.get_text() for t in upper.get_yticklabels()] == ["claim 0", "claim 2"]
        and "points" in upper.get_xlabel()
        and "bpb" in lower.get_xlabel()
    )
    points = [(float(c.lines[0].get_xdata()[0]), c.lines[0].get_color()) for ax in fig.axes for c in ax.containers]
    assert [x for x, _ in points] == pytest.approx([30, 5, -0.2, 0.01]) and len({colour for _, colour in points}) == 4
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {c["verdict"] for c in claims}


def test_the_trade_has_the_interval_of_each_arms_mean():
    "One seed: the bars are the t interval of the groups' means, on both axes."
    rng = np.random.default_rng(4)
    lost, right = rng.normal(1, 0.1, 12), rng.random((20, 3))
    metrics = dict(bpb=dict(values=lost.tolist()), mcq=dict(values=right.ravel().tolist(), groups=np.arange(60) // 3))
    fig = trade({"a": {"0": metrics}, "b": {"0": metrics}}, "bpb", "mcq", "x", "y", yscale=100)
    ends = [b.get_segments()[0] for b in fig.axes[0].containers[0].lines[2]]
    low, high = stats.ttest_1samp(lost, 0).confidence_interval()
    assert ends[0][:, 0] == pytest.approx([low, high])
    low, high = stats.ttest_1samp(right.mean(1), 0).confidence_interval()
    assert ends[1][:, 1] == pytest.approx([100 * low, 100 * high])


def recorder():
    spec = importlib.util.spec_from_file_location("record_ablate", ROOT / "tools/record_ablate.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_a_record_is_judged_again_by_machine(tmp_path):
    "Two machines of four facts with two questions each: eight groups by fact, two by machine."
    groups = [f"F{i // 2:05d}" for i in range(16)]
    runs = {
        arm: {"0": dict(mcq=dict(values=[v] * 16, groups=groups), bpb=dict(values=[1.0, 2.0]))}
        for arm, v in dict(base=0, up=1).items()
    }
    claim = dict(text="it helps", metric="mcq", arm="up", base="base")
    path = tmp_path / "ablate_x.json"
    path.write_text(
        json.dumps(
            dict(runs=runs, before=runs["base"]["0"], claims=verdict(runs, [claim]), provenance=dict(date="2020-01-01"))
        )
    )
    assert json.loads(path.read_text())["claims"][0]["verdict"] == "supported"
    recorder().again(path)
    made = json.loads(path.read_text())
    (c,) = made["claims"]
    assert (c["groups"], c["low"], c["verdict"]) == (2, None, "not resolved at this size")
    assert (
        set(made["runs"]["up"]["0"]["mcq"]["groups"]) == {"machine 0", "machine 1"}
        and made["runs"]["up"]["0"]["mcq"]["values"] == [1] * 16
    )
    assert made["provenance"] == dict(date="2020-01-01") and made["recomputed"]["date"] > "2020"
    recorder().again(path)
    assert json.loads(path.read_text()) == made  # twice is once


def test_the_records_are_judged_by_the_present_rules():
    for path in (ROOT / "nbs/results").glob("ablate_*.json"):
        record = json.loads(path.read_text())
        assert not any(str(g).startswith("F0") for m in record["before"].values() for g in m.get("groups") or []), path
        said = verdict(record["runs"], [{k: c[k] for k in recorder().STATED if k in c} for c in record["claims"]])
        assert [(c["verdict"], c["needed"]) for c in said] == [(c["verdict"], c["needed"]) for c in record["claims"]], (
            path
        )


def test_detectable_has_the_power_it_says():
    "Simulated discordant pairs, tested by McNemar."
    n, differ = 400, 0.2
    d = detectable(n, differ)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [(differ + d) / 2, (differ - d) / 2, 1 - differ], 2000)
    power = np.mean([stats.binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b, _ in draws])
    assert 0.74 < power < 0.86


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: run_arms(None, {"a": {}}, (0,), "x"), "at least two arms"),
        (lambda: run_arms(None, {"a": {}, "b": {}}, (0, 0), "x"), "each once"),
        (lambda: difference([[1, 0]], [[1, 0, 0]]), "same seeds"),
        (lambda: difference([[]], [[]]), "same seeds"),
        (
            lambda: verdict(runs_of({"a": 0, "b": 0}), [dict(text="t", metric="mcq", arm="a", base="b", matters=-1)]),
            "above 0",
        ),
        (lambda: design(dict(seed=0, group=1, both=0), 0, 5), "at least 1 seed"),
        (lambda: compare_arms(runs_of({"a": 0, "b": 0}), "mcq", "aa", "b"), "did you mean 'a'"),
        (lambda: compare_arms(runs_of({"a": 0, "b": 0}), "mcp", "a", "b"), "did you mean 'mcq'"),
        (lambda: run_arms(None, {"1:1": {}, "1-1": {}}, (0,), "x"), "share a file"),
        (lambda: detectable(1), "at least 2"),
        (lambda: forest([]), "no claim"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


def points(*pairs):
    "Runs of one item, as pairs of what it learnt and what it paid."
    return [dict(learnt=dict(values=[a]), paid=dict(values=[b], groups=["only"])) for a, b in pairs]


@pytest.mark.parametrize("level, paid", [(0.2, 0.0), (0.3, 1.0), (0.5, 3.0), (0.6, 4.0)])
def test_at_equal_learning_by_hand(level, paid):
    "Straight lines between neighbours; a metric that falls is read in the same way."
    rising = points((0.2, 0.0), (0.4, 2.0), (0.6, 4.0))
    falling = points(*((-a["learnt"]["values"][0], a["paid"]["values"][0]) for a in rising))
    for found in (at_level(rising, level, "learnt", "paid"), at_level(falling, -level, "learnt", "paid")):
        assert found["values"] == pytest.approx([paid])
        assert found["groups"] == ["only"]


def test_a_level_that_no_run_reaches_has_no_price():
    assert at_level(points((0.2, 0.0), (0.4, 2.0), (0.4, 3.0)), 0.5, "learnt", "paid") is None
    assert at_level(points((0.5, 0.0)), 0.5, "learnt", "paid") is None
