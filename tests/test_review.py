"""A review by people: its statistics against other libraries, simulation and known answers."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom

from domain_llm.core import InputError
from domain_llm.judge.packet import build_packet, equalized, joined_marks, made_calibration
from domain_llm.judge.review import (
    beside_choice,
    bradley_terry,
    checked_marks,
    choose,
    detectable_rate,
    points,
    questions_needed,
    rate_interval,
    review_power,
    strengths,
    win_rates,
)
from domain_llm.judge.reviewers import (
    agreement,
    allowed_misses,
    alpha,
    calibrated,
    position_bias,
    self_agreement,
    simulate_review,
    slips_through,
    true_rate,
)
from domain_llm.run.review_result import reviewed


def mark(reviewer, question, left, right, said, **more):
    item = f"{question} {left} {right}"
    return dict(reviewer=reviewer, item=item, question=question, left=left, right=right, mark=said) | more


def beta_marks(rng, questions, reviewers, rate, concentration):
    "Marks without ties whose chance of a win is drawn for each question: not this package's simulation."
    chances = rng.beta(rate * concentration, (1 - rate) * concentration, questions)
    won = rng.random((reviewers, questions)) < chances
    return won.astype(float)


@pytest.mark.parametrize("rate", [0.5, 0.65, 0.9])
def test_intervals_hold_the_truth_with_marks_of_another_simulation(rate):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(600):
        won = beta_marks(rng, 80, 2, rate, 3)
        low, high = rate_interval(won.ravel(), np.tile(np.arange(80), 2))
        inside += low <= rate <= high
    assert 0.93 <= inside / 600 <= 0.975


def test_power_is_that_of_another_simulation():
    "Two reviewers, no ties; the correlation of beta-binomial marks is 1 / (1 + concentration)."
    rng, found = np.random.default_rng(1), 0
    for _ in range(800):
        low, high = rate_interval(beta_marks(rng, 120, 2, 0.6, 2).ravel(), np.tile(np.arange(120), 2))
        found += low > 0.5 or high < 0.5
    assert found / 800 == pytest.approx(review_power(120, 2, 0.6, 0.0, 1 / 3), abs=0.04)


def test_size_by_hand():
    "One reviewer, no ties: n = (1.96 + 0.84)^2 * 0.24 / 0.1^2 = 188, a little more by the t distribution."
    assert 188 <= questions_needed(0.6, reviewers=1, ties=0.0) <= 191
    assert review_power(120, 2) >= 0.8  # what the command's help promises
    assert review_power(50, rate=0.5) == pytest.approx(0.05)
    needed = questions_needed(0.65)
    assert detectable_rate(needed) <= 0.65 < detectable_rate(needed - 2)
    assert review_power(80, comparisons=3) < review_power(80)


@pytest.mark.parametrize(
    "wrong", [dict(questions=1), dict(reviewers=0), dict(ties=1.0), dict(correlation=2.0), dict(rate=0.95, ties=0.5)]
)
def test_no_power_for_no_review(wrong):
    with pytest.raises(InputError, match="no power"):
        review_power(**{"questions": 100, **wrong})


def likelihood(s, won):
    "Minus the log likelihood of Bradley and Terry's model."
    return -sum(won[i, j] * -np.log1p(np.exp(s[j] - s[i])) for i in range(len(s)) for j in range(len(s)) if i != j)


def test_strengths_are_the_maximum_of_the_likelihood():
    won = np.array([[0, 30, 22.5], [14, 0, 19], [9.5, 11, 0]])
    added = won + 0.5 * (1 - np.eye(3))
    best = minimize(likelihood, np.zeros(3), args=(added,)).x
    assert bradley_terry(won) == pytest.approx(best - best.mean(), abs=1e-4)


def test_an_unbeaten_model_leads_and_the_others_keep_their_order():
    rows = []
    for q in range(30):
        rows += [mark("R1", q, "a", "b", "left"), mark("R1", q, "a", "c", "left")]
        rows.append(mark("R1", q, "b", "c", "left" if q < 20 else "right"))
    found = choose(rows, resamples=200)
    levels = {name: r["strength"] for name, r in found["models"].items()}
    assert levels["a"] > levels["b"] > levels["c"] and found["best"] == "a" and not found["tied"]
    assert found["models"]["a"]["unbeaten"] and np.isfinite(list(levels.values())).all()


def test_sets_that_never_met_have_no_common_scale():
    rows = [mark("R1", q, *pair, "left") for q in range(5) for pair in (("a", "b"), ("c", "d"))]
    with pytest.raises(InputError, match="c and d were never compared with a"):
        strengths(rows)
    assert strengths(rows + [mark("R1", 9, "b", "c", "tie")], resamples=20)["groups"] == 6


def test_order_and_choice_of_known_skills():
    reviewers = dict(R1=dict(left=0.5), R2=dict(sharp=0.7))
    found = choose(simulate_review(dict(low=0.0, middle=1.0, high=2.0), 150, reviewers, seed=3), resamples=300)
    assert sorted(found["models"], key=lambda name: found["models"][name]["strength"]) == ["low", "middle", "high"]
    assert found["best"] == "high" and not found["tied"]


def test_equal_models_are_tied():
    "Of 60 reviews of equal models about 3 name a single best one."
    people = dict(R1={}, R2={})
    resolved = [
        not choose(simulate_review(dict(x=0.0, y=0.0), 40, people, seed=s), resamples=150)["tied"] for s in range(60)
    ]
    assert sum(resolved) <= 8


def test_win_rates_by_hand():
    rows = [mark("R1", q, "a", "b", said) for q, said in enumerate(["left", "left", "tie", "both bad", "right"])]
    rows += [mark("R2", q, "b", "a", said) for q, said in enumerate(["right", "right", "right", "tie", "right"])]
    (r,) = win_rates(rows)
    counts = dict(wins=6, losses=1, ties=2, both_bad=1, n=10, groups=5)
    assert {key: r[key] for key in counts} == counts and r["rate"] == pytest.approx(7.5 / 10)
    (together,) = win_rates([dict(row, group="one") for row in rows])
    assert together["low"] is None


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(mark="better"), "must be one of left"),
        (dict(right="a"), "with itself"),
        (dict(reviewer=""), "has no reviewer"),
        (dict(item=None), "has no item"),
    ],
)
def test_wrong_marks_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        checked_marks([mark("R1", 1, "a", "b", "left"), mark("R1", 2, "a", "b", "left") | wrong])


def test_multiple_choice_and_people_disagree_only_where_both_are_resolved():
    rows = simulate_review(dict(x=2.0, y=0.0), 60, dict(R1={}), seed=0)
    found = strengths(rows, resamples=100)
    better, worse = dict(correct=[1] * 45 + [0] * 5), dict(correct=[0] * 25 + [1] * 25)
    assert beside_choice(found, dict(x=better, y=worse))[0]["said"] == "agree"
    assert beside_choice(found, dict(x=worse, y=better))[0]["said"] == "disagree"
    assert beside_choice(found, dict(x=better, y=better))[0]["said"] == "not resolved by the exam"
    with pytest.raises(InputError, match="different exams"):
        beside_choice(found, dict(x=better, y=dict(correct=[1])))


def test_alpha_of_the_published_example():
    "Krippendorff (2011), part C: four observers, missing values."
    rows = ["123321412---", "1233224125-3", "-3332342251-", "12332441251-"]
    units = {u: {i: int(row[u]) for i, row in enumerate(rows) if row[u] != "-"} for u in range(12)}
    published = dict(nominal=0.743, ordinal=0.815, interval=0.849, ratio=0.797)
    assert {kind: round(alpha(units, kind), 3) for kind in published} == published


def test_agreement_by_hand():
    "Two reviewers, four questions, one disagreement: observed 1/4, expected 2 * 3 * 5 / (8 * 7): alpha 1 - 7/15."
    rows = [mark("R1", q, "a", "b", said) for q, said in enumerate(["left", "left", "right", "left"])]
    rows += [mark("R2", q, "b", "a", said) for q, said in enumerate(["right", "right", "left", "left"])]
    r = agreement([dict(row, task="t") for row in rows])
    assert r["a against b"]["alpha"] == r["task: t"]["alpha"] == pytest.approx(1 - (1 / 4) / (30 / 56))
    assert r["a against b"]["same"] == 3 / 4 and r["a against b"]["units"] == 4
    assert agreement(rows[:4])["a against b"]["alpha"] is None


def test_the_rule_for_calibration_against_all_cases():
    for n in range(1, 40):
        k = allowed_misses(n)
        assert binom.sf(k, n, 0.1) <= 0.05 and (k == 0 or binom.sf(k - 1, n, 0.1) > 0.05)
        assert slips_through(n) == pytest.approx(sum(binom.pmf(i, n, 0.5) for i in range(k + 1)))
    rows = [mark("R1", q, "good", "bad", "right" if q < 4 else "left", known="left") for q in range(12)]
    assert calibrated(rows)["R1"] == dict(n=12, missed=4, allowed=3, passed=False)
    assert calibrated(rows[1:])["R1"]["passed"]


def test_a_pull_to_one_side_is_measured_and_costs_no_model_its_place():
    people = dict(R1=dict(left=1.0), R2={})
    rows = simulate_review(dict(x=0.0, y=0.0), 2000, people, seed=0)
    found = position_bias(rows)
    pulled = np.mean([points(row, row["left"]) for row in rows if row["reviewer"] == "R1"])
    assert found["reviewer R1"]["rate"] == pytest.approx(pulled, abs=0.01) and found["reviewer R1"]["low"] > 0.5
    assert found["reviewer R2"]["low"] < 0.5 < found["reviewer R2"]["high"]
    (r,) = win_rates(rows)
    assert r["low"] < 0.5 < r["high"] and true_rate(0.0, people) == pytest.approx(0.5)


def test_self_agreement_counts_ties_and_swapped_sides():
    first = [mark("R1", q, "a", "b", said) for q, said in enumerate(["left", "tie", "right"])]
    again = [mark("R1", q, "b", "a", said) for q, said in enumerate(["right", "both bad", "right"])]
    assert self_agreement(first, again)["R1"]["same"] == 2


# The packet


def texts(words, n=24):
    return [f"{words} {i}" for i in range(n)]


QUESTIONS = [dict(question=f"问题 {i}?", reference=f"{i} bar", group=f"m{i // 4}", task="qa") for i in range(24)]


def test_names_and_their_order_leave_the_packet_as_it_is():
    wrote = [texts("one"), texts("two"), texts("three")]
    packets = [
        build_packet(QUESTIONS, dict(zip(names, order)), 3, seed=5)[0]
        for names in (("a", "b", "c"), ("c", "a", "b"), ("runs/secret", "x", "y"))
        for order in (wrote, wrote[::-1])
    ]
    assert all(packet == packets[0] for packet in packets)
    assert build_packet(QUESTIONS, dict(a=wrote[0], b=wrote[1]), 3, seed=6)[0]["id"] != packets[0]["id"]


def test_every_reviewer_sees_everything_and_each_model_on_both_sides_alike():
    packet, key = build_packet(QUESTIONS, dict(a=texts("one"), b=texts("two"), c=texts("three")), 2, seed=0)
    cal = {row["question"] for row in made_calibration(QUESTIONS, seed=0)}
    for reviewer, rows in packet["reviewers"].items():
        known = {row["item"]: row for row in key["items"] if row["reviewer"] == reviewer}
        assert [row[0] for row in rows] != sorted(known) and {row[0] for row in rows} == known.keys()
        first = [row for row in known.values() if row["role"] == "compare"]
        assert {row["text"] for row in first} == {q["question"] for q in QUESTIONS} - cal
        for pair in combinations("abc", 2):
            left = Counter(row["left"] for row in first if {row["left"], row["right"]} == set(pair))
            assert left.total() == 20 and abs(left[pair[0]] - left[pair[1]]) <= 1
        again = [row for row in known.values() if row["role"] == "repeat"]
        swapped = {(row["question"], row["right"], row["left"]) for row in first}
        assert len(again) == 6 and all((row["question"], row["left"], row["right"]) in swapped for row in again)
        place = {row[0]: i for i, row in enumerate(rows)}
        where = {(row["question"], row["left"], row["right"]): place[row["item"]] for row in first}
        assert all(place[r["item"]] > where[r["question"], r["right"], r["left"]] for r in again)


def test_the_key_says_what_the_page_shows():
    wrote = dict(a=texts("one"), b=texts("two"))
    packet, key = build_packet(QUESTIONS, wrote, 2, seed=0)
    at = {row[0]: row for rows in packet["reviewers"].values() for row in rows}
    for row in key["items"]:
        _, q, left, right, task = at[row["item"]]
        assert packet["questions"][q] == row["text"] and task in ("qa", "")
        if row["role"] != "calibration":
            n = int(row["question"][1:])
            assert [packet["answers"][left], packet["answers"][right]] == [
                wrote[row["left"]][n],
                wrote[row["right"]][n],
            ]
        else:
            good = packet["answers"][left if row["known"] == "left" else right]
            assert good == next(q["reference"] for q in QUESTIONS if q["question"] == row["text"])


def test_equal_answers_are_ties_that_nobody_is_shown():
    wrote = dict(a=texts("one"), b=texts("one")[:10] + texts("two")[10:])
    _, key = build_packet(QUESTIONS, wrote, 1, seed=0, calibration=[])
    assert len(key["same"]) == 10 and sum(row["role"] == "compare" for row in key["items"]) == 14
    rows = [dict(row, mark="left" if row["left"] == "a" else "right") for row in key["items"]]
    (r,) = reviewed(rows, key)["rates"]
    assert (r["wins"], r["ties"], r["rate"]) == (14, 10, pytest.approx(19 / 24))


@pytest.mark.parametrize(
    "wrote, plain",
    [
        ("a\r\nb\rc  \n\n\n\nd", "a\nb\nc\n\nd"),
        ("<think>\nlong\n</think>\n\n答案<|im_end|>", "答案"),
        ("</s>[INST] hi [/INST]<eos>", "hi"),
        ("### Title\n* one\n• two\n**bold** text", "Title\n- one\n- two\nbold text"),
        ("2**8 and a*b and *emphasis*", "2**8 and a*b and *emphasis*"),
        ("x < y <b>kept</b>", "x < y <b>kept</b>"),
        ("```python\n# kept\nx = 2 ** 3\n```", "```python\n# kept\nx = 2 ** 3\n```"),
    ],
)
def test_formatting_is_equal(wrote, plain):
    assert equalized(wrote) == plain and equalized(plain) == plain


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(packet="other"), "another review"),
        (dict(marks=[1]), "not a file of marks"),
        (dict(reviewer="R9"), "was not shown"),
        (dict(marks={"zz": dict(mark="left")}), "was not shown"),
        (dict(bad_mark=True), "must be one of"),
    ],
)
def test_wrong_files_of_marks(change, said):
    _, key = build_packet(QUESTIONS, dict(a=texts("one"), b=texts("two")), 1, seed=0)
    item = key["items"][0]["item"]
    marks = {item: dict(mark="best" if change.pop("bad_mark", False) else "left")}
    with pytest.raises(InputError, match=said):
        joined_marks({"f.json": dict(packet=key["packet"], reviewer="R1", marks=marks) | change}, key)


def test_who_fails_calibration_is_named_and_counts_nowhere():
    _, key = build_packet(QUESTIONS * 1, dict(a=texts("one"), b=texts("two")), 2, seed=0)
    rows = []
    for row in key["items"]:
        right = row.get("known") or ("left" if row["left"] == "a" else "right")
        wrong = dict(left="right", right="left")[right]
        rows.append(dict(row, mark=wrong if row["reviewer"] == "R2" else right))
    found = reviewed(rows, key)
    assert found["failed"] == ["R2"] and found["rates"][0]["a"] == "a" and found["rates"][0]["losses"] == 0
    with pytest.raises(InputError, match="R2 failed"):
        reviewed([row for row in rows if row["reviewer"] == "R2"], key)
