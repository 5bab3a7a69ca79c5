"""The gate that accepts a format: hand-computed cases, other derivations, simulated error and power."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from domain_llm.core import InputError
from domain_llm.ship.accept import accept, change, lowest_difference, needed_questions

Z2 = 1.959964**2


def task(correct, groups=None):
    return dict(correct=list(correct), groups=groups or [str(i) for i in range(len(correct))])


def form(name, size, correct, program="llama.cpp", groups=None, kind="choice"):
    return dict(name=name, program=program, bytes=size, tasks={kind: task(correct, groups)})


def likeliest_variance(gained, lost, n, d):
    "The variance of a difference at its likeliest share of lost questions, found by search instead of by formula."
    equal = n - gained - lost

    def surprise(q):
        shares = ((gained, q + d), (lost, q), (equal, 1 - 2 * q - d))
        return -sum(k * math.log(max(share, 1e-300)) for k, share in shares if k)

    q = minimize_scalar(surprise, bounds=(max(0, -d), (1 - d) / 2), method="bounded", options=dict(xatol=1e-12)).x
    return (2 * q + d - d * d) / n


@pytest.mark.parametrize("gained, lost, n", [(3, 7, 120), (0, 4, 60), (12, 5, 300), (1, 0, 40), (20, 30, 80)])
def test_the_lower_end_is_where_the_score_is_1_96(gained, lost, n):
    low = lowest_difference(gained, lost, n)
    deviations = ((gained - lost) / n - low) / math.sqrt(likeliest_variance(gained, lost, n, low))
    assert deviations == pytest.approx(1.959964, abs=2e-3)


@pytest.mark.parametrize("n", [1, 30, 125, 1000])
def test_without_a_changed_answer(n):
    "The score equation without changes has the solution -z^2 / (n + z^2)."
    assert lowest_difference(0, 0, n) == pytest.approx(-Z2 / (n + Z2), abs=1e-5)


def test_extremes():
    assert lowest_difference(0, 50, 50) == -1
    assert 0.8 < lowest_difference(50, 0, 50) < 1
    for wrong in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(InputError):
            lowest_difference(*wrong)


@pytest.mark.parametrize("n", [60, 125, 400])
@pytest.mark.parametrize("margin", [0.03, 0.05])
@pytest.mark.parametrize("more", [0, 0.05, 0.3])
def test_a_file_that_is_worse_by_the_margin_is_rarely_accepted(n, margin, more):
    "At most 5% (2.5% by design): with few changes, where the ordinary interval fails, and with many."
    rng = np.random.default_rng(0)
    shares = [more / 2, more / 2 + margin, 1 - more - margin]
    counts, times = np.unique(rng.multinomial(n, shares, size=20_000)[:, :2], axis=0, return_counts=True)
    wrongly = sum(k for (g, lost), k in zip(counts, times) if lowest_difference(int(g), int(lost), n) > -margin)
    assert wrongly / 20_000 < 0.035


@pytest.mark.parametrize("sizes, margin", [([4] * 60, 0.1), ([1, 13] * 100, 0.03), ([1, 13] * 30, 0.1)])
def test_groups_that_fall_as_a_whole_are_rarely_accepted(sizes, margin):
    "A file that is worse by the margin, whose answers change group by group, equal groups or those of 1 and 13."
    rng, wrongly, times = np.random.default_rng(0), 0, 600
    groups = [str(g) for g, size in enumerate(sizes) for _ in range(size)]
    for _ in range(times):
        lost = rng.random(len(sizes)) < margin
        after = [0 if gone else 1 for gone, size in zip(lost, sizes) for _ in range(size)]
        wrongly += change([1] * len(after), after, groups)["low"] > -margin
    assert wrongly / times < 0.045  # 2.5% by design; 600 exams are exact to about one point


@pytest.mark.parametrize("margin, differ", [(0.03, 0.02), (0.03, 0.1), (0.05, 0.05), (0.1, 0.2)])
def test_so_many_questions_let_an_equal_file_pass(margin, differ):
    n = needed_questions(margin, differ)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, [differ / 2, differ / 2, 1 - differ], size=4000)
    passes = np.mean([lowest_difference(int(g), int(lost), n) > -margin for g, lost, _ in drawn])
    assert 0.76 < passes < 0.92


def test_the_fewest_questions():
    assert needed_questions(0.03, 0) == 125
    assert lowest_difference(0, 0, 125) > -0.03 > lowest_difference(0, 0, 124)
    assert needed_questions(0.03, 0.2) < needed_questions(0.03, 0.3) < needed_questions(0.02, 0.3)
    with pytest.raises(InputError, match="margin"):
        needed_questions(3)


def test_groups_count_as_one_question_together():
    before, after = [1] * 200, [1] * 196 + [0] * 4
    alone = change(before, after)
    assert (alone["gained"], alone["lost"], alone["diff"]) == (0, 4, pytest.approx(-0.02))
    assert alone["low"] == pytest.approx(lowest_difference(0, 4, 200))
    together = change(before, after, [i // 4 for i in range(200)])
    assert together["groups"] == 50 and together["low"] <= lowest_difference(0, 1, 50) < alone["low"]
    assert change(before, before, [i // 4 for i in range(200)])["low"] == pytest.approx(-Z2 / (50 + Z2), abs=1e-5)


def test_a_lost_group_is_seen_by_the_rule():
    "All questions of a group flip together: a file worse by the margin is still rarely accepted."
    rng, accepted, groups = np.random.default_rng(0), 0, [i // 4 for i in range(240)]
    for _ in range(300):
        lost = np.repeat(rng.random(60) < 0.05, 4)
        accepted += change([1] * 240, [int(not x) for x in lost], groups)["low"] > -0.05
    assert accepted / 300 < 0.05


def test_the_first_failure_ends_the_sequence():
    "q5 is worse; q4, which is not, is not looked at. The other program has its own sequence."
    right, worse = [1] * 400, [1] * 380 + [0] * 20
    found = accept(
        {"choice": task(right)},
        [form("q4", 40, right), form("q8", 80, right), form("q5", 50, worse), form("nf4", 45, right, "transformers")],
        0.03,
    )
    assert [(s["name"], s["state"]) for s in found["steps"]] == [
        ("q8", "accepted"),
        ("q5", "refused"),
        ("q4", "not tested"),
        ("nf4", "accepted"),
    ]
    assert found["smallest"] == "nf4"
    assert accept({"choice": task(right)}, [form("q5", 50, worse)], 0.03)["smallest"] is None
    assert accept({"choice": task(right)}, [form("q5", 50, worse)], 0.1)["smallest"] == "q5"


def test_every_kind_of_question_counts():
    right, worse = [1] * 400, [1] * 370 + [0] * 30
    original = {"choice": task(right), "open": task(right)}
    both = dict(form("q8", 80, right), tasks={"choice": task(right), "open": task(worse)})
    step = accept(original, [both], 0.03)["steps"][0]
    assert step["state"] == "refused" and step["changes"]["choice"]["low"] > -0.03


def test_bad_input():
    original = {"choice": task([1] * 9)}
    with pytest.raises(InputError, match="margin"):
        accept(original, [], 3)
    with pytest.raises(InputError, match="choice questions"):
        accept(original, [form("q8", 1, [1] * 9, kind="open")])
    with pytest.raises(InputError, match="same"):
        accept(original, [form("q8", 1, [1] * 9, groups=["other"] * 9)])
