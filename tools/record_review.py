"""Record how far the statistics of a review keep their word, in nbs/results/review.json.

    python tools/record_review.py [--simulations 1000]

Simulated reviewers of known skill and bias judge simulated models, so the true win rates can be computed. Recorded are
the coverage of the 95% intervals, the computed power beside the share of the reviews that resolved a difference, how
often the true order came out, and what happens where reviewers have tastes of their own.
"""

import argparse
import math
import time
from statistics import fmean

import numpy as np

from domain_llm.judge.review import bradley_terry, choose, points, review_power, win_rates
from domain_llm.judge.reviewers import simulate_review, true_rate
from domain_llm.results import save_result

PLAIN = dict(R1={}, R2={})
BIASED = dict(R1=dict(sharp=1.5, left=0.5), R2=dict(careless=0.2, tie=0.8))
THREE = BIASED | dict(R3=dict(left=-0.8))
SETTINGS = [
    ("no difference, 120 questions", 0.0, 120, PLAIN),
    ("60% preference, 120 questions", 0.6, 120, PLAIN),
    ("biased reviewers, 40 questions", 0.6, 40, BIASED),
    ("biased reviewers, 120 questions", 0.6, 120, BIASED),
    ("large lead, 120 questions", 2.0, 120, BIASED),
    ("large lead, three reviewers, 30 questions", 2.0, 30, THREE),
]


def measured_size(lead, reviewers, seed):
    "The share of ties, and the correlation of the first two reviewers' marks, in 20,000 simulated questions."
    rows = simulate_review(dict(x=lead, y=0.0), 20_000, reviewers, seed=seed)
    worth = [[points(row, "x") for row in rows if row["reviewer"] == name] for name in ("R1", "R2")]
    return fmean(row["mark"] == "tie" for row in rows), float(np.corrcoef(worth)[0, 1])


def interval_of_x(lead, questions, reviewers, seed):
    "The interval of the win rate of x against y in one simulated review."
    (r,) = win_rates(simulate_review(dict(x=lead, y=0.0), questions, reviewers, seed=seed))
    return (r["low"], r["high"]) if r["a"] == "x" else (1 - r["high"], 1 - r["low"])


def simulated_rates(name, lead, questions, reviewers, simulations):
    "Coverage, resolved share and computed power of one setting."
    truth = true_rate(lead, reviewers)
    ends = [interval_of_x(lead, questions, reviewers, seed) for seed in range(simulations)]
    coverage = fmean(low <= truth <= high for low, high in ends)
    resolved = fmean(low > 0.5 or high < 0.5 for low, high in ends)
    ties, correlation = measured_size(lead, reviewers, simulations)
    power = review_power(questions, len(reviewers), truth, ties, correlation)
    size = dict(truth=truth, questions=questions, reviewers=len(reviewers), ties=ties, correlation=correlation)
    return dict(name=name, **size, coverage=coverage, resolved=resolved, power=power)


def simulated_order(skills, questions, reviewers, simulations):
    "Coverage of strengths and differences, and how often order and best model are the true ones."
    names = list(skills)
    rates = [[true_rate(skills[a] - skills[b], reviewers) if a != b else 0.0 for b in names] for a in names]
    truth = dict(zip(names, bradley_terry(1e7 * np.array(rates))))
    level, change, order, best, kept = [], [], [], [], []
    for seed in range(simulations):
        found = choose(simulate_review(skills, questions, reviewers, seed=seed), resamples=200, seed=seed)
        level += [r["low"] <= truth[name] <= r["high"] for name, r in found["models"].items()]
        change += [r["low"] <= truth[r["a"]] - truth[r["b"]] <= r["high"] for r in found["pairs"]]
        order.append(sorted(names, key=lambda name: found["models"][name]["strength"]) == names)
        best.append(found["best"] == names[-1])
        kept.append(best[-1] or names[-1] in found["tied"])
    shares = dict(strengths=level, differences=change, order=order, best=best, best_or_tied=kept)
    return dict(skills=skills, questions=questions, **{key: fmean(found) for key, found in shares.items()})


def simulated_taste(reviewers, simulations, taste=0.5, lead=0.6, questions=120):
    "Coverage of the mean over all reviewers there could be, where each review draws its reviewers' tastes."
    draws = np.random.default_rng(0).normal(0, taste, (simulations, reviewers))
    truth, inside = true_rate(lead, PLAIN, math.hypot(1, taste / math.sqrt(2))), []
    for seed, mine in enumerate(draws):
        people = {f"R{i}": dict(taste=dict(x=float(t))) for i, t in enumerate(mine)}
        low, high = interval_of_x(lead, questions, people, seed)
        inside.append(low <= truth <= high)
    return dict(reviewers=reviewers, taste=taste, coverage=fmean(inside))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    many, started = parser.parse_args().simulations, time.time()
    found = dict(
        simulations=many,
        rates=[simulated_rates(*setting, many) for setting in SETTINGS],
        order=simulated_order(dict(a=0.0, b=0.5, c=1.2), 60, BIASED, many),
        taste=[simulated_taste(n, many) for n in (2, 10)],
    )
    print(save_result("review", found, started))


if __name__ == "__main__":
    main()
