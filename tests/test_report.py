"""The verdict says no more than the intervals do."""

import pytest

from domain_llm.run.figures import plot_interpolation
from domain_llm.run.report import run_verdict


def exam(accuracy, low=None, high=None, **more):
    change = None if low is None else dict(diff=(low + high) / 2, low=low, high=high)
    return dict(accuracy=accuracy, low=accuracy - 0.1, high=accuracy + 0.1, n=100, chance=0.25, change=change, **more)


def text(bpb, low=None, high=None):
    change = None if low is None else dict(diff=(low + high) / 2, low=low, high=high)
    return dict(bpb=bpb, low=bpb - 0.1, high=bpb + 0.1, bytes=1000, change=change)


def said(mcq=(0.1, 0.3), domain=(-0.5, -0.3), general=(0.0, 0.1), after=1.05, common=(-0.05, 0.05), share=1.0, **more):
    before = dict(domain_mcq=exam(0.25), general_mcq=exam(0.7), domain_bpb=text(1.0), general_bpb=text(1.0))
    now = dict(
        domain_mcq=exam(0.45, *mcq, **more),
        general_mcq=exam(0.7, *common),
        domain_bpb=text(0.6, *domain),
        general_bpb=text(after, *general),
    )
    return run_verdict(before, now, 0.09, share)


def test_learnt_and_reads_better_only_where_the_interval_leaves_zero_out():
    assert "learnt the domain" in said() and "reads held-out documents of the domain better" in said()
    assert "learnt" not in said(mcq=(-0.01, 0.4)) and "no resolved change on the domain's questions" in said(
        mcq=(-0.01, 0.4)
    )
    assert "got worse at the domain's questions" in said(mcq=(-0.3, -0.1))
    assert "better" not in said(domain=(-0.5, 0.01)) and "no resolved change on held-out documents" in said(
        domain=(-0.5, 0.01)
    )
    assert "a resolved loss" in said(common=(-0.2, -0.1)) and "a resolved gain" in said(common=(0.1, 0.2))


def test_interpolation_is_named_and_its_share():
    assert "interpolated" not in said()
    assert "the weights were interpolated to keep the budget, 47% of the change kept" in said(share=0.469)


def test_no_p_value_from_one_run():
    assert " p " not in said() and "p =" not in said() and "McNemar" not in said()


def test_the_budget_is_judged_on_the_reported_text():
    assert "within the budget of +9%" in said(after=1.05) and "above the budget of +9%" in said(after=1.2)


def test_parts_of_the_exam_are_said_apart():
    parts = {"taught": exam(0.9), "held-out": exam(0.4)}
    assert "taught 90%; held-out 40%" in said(by_part=parts)


def test_no_interval_is_said():
    assert "one document, so no interval" in said(domain=()) and "learnt" not in said(mcq=())


def test_the_curve_of_interpolation_shows_every_point():
    points = [
        dict(step=9, share=s, domain_bpb=1 - s / 2, general_bpb=1 + s / 4, score=0) for s in (1.0, 0.5, 0.25, 0.375)
    ]
    history = [dict(step=0, domain_bpb=1.0, general_bpb=1.0), *points]
    fig = plot_interpolation(dict(pretrain=history))
    line = fig.axes[0].lines[0]
    assert list(line.get_xdata()) == pytest.approx([6.25, 9.375, 12.5, 25]) and list(line.get_ydata()) == pytest.approx(
        [-12.5, -18.75, -25, -50]
    )
    assert plot_interpolation(dict(pretrain=history[:2])) is None
