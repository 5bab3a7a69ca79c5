"""The verdict says no more than the intervals do, and both languages say the same."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from fixtures.languages import left_in_english, shown_figures
from fixtures.report_run import STAGES, write_run

import domain_llm
from domain_llm.core import ENGLISH, speaker, translations
from domain_llm.data.tasks import NEEDS
from domain_llm.judge.review import _compared
from domain_llm.judge.reviewers import ROWS
from domain_llm.run.figures import plot_interpolation
from domain_llm.run.report import NOTES, page_environment, run_verdict, write_report
from domain_llm.ship.fidelity import PROBLEMS

PACKAGE = Path(domain_llm.__file__).parent
TEMPLATES = ("report.html.jinja", "review_report.html.jinja")
CHINESE = translations("zh")


def exam(accuracy, low=None, high=None, **more):
    change = None if low is None else dict(diff=(low + high) / 2, low=low, high=high)
    return dict(accuracy=accuracy, low=accuracy - 0.1, high=accuracy + 0.1, n=100, chance=0.25, change=change, **more)


def text(bpb, low=None, high=None):
    change = None if low is None else dict(diff=(low + high) / 2, low=low, high=high)
    return dict(bpb=bpb, low=bpb - 0.1, high=bpb + 0.1, bytes=1000, change=change)


def said(
    mcq=(0.1, 0.3),
    domain=(-0.5, -0.3),
    general=(0.0, 0.1),
    after=1.05,
    common=(-0.05, 0.05),
    share=1.0,
    say=ENGLISH,
    **more,
):
    before = dict(domain_mcq=exam(0.25), general_mcq=exam(0.7), domain_bpb=text(1.0), general_bpb=text(1.0))
    now = dict(
        domain_mcq=exam(0.45, *mcq, **more),
        general_mcq=exam(0.7, *common),
        domain_bpb=text(0.6, *domain),
        general_bpb=text(after, *general),
    )
    return run_verdict(before, now, 0.09, share, say)


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


def messages_of(template):
    "The messages of a template in the package."
    text = (PACKAGE / "assets" / template).read_text(encoding="utf-8")
    for _, _, found in page_environment(template).extract_translations(text, ("_", "gettext", "ngettext")):
        yield from (found if isinstance(found, tuple) else (found,))


def speaking_modules():
    "The modules that make sentences with `say` or ENGLISH, with their syntax trees."
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "ENGLISH" in text and path.name != "core.py":
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            yield importlib.import_module(name), ast.parse(text)


def sentences():
    "The messages that code gives to `say` or ENGLISH: a text, or a constant of the module."
    for module, tree in speaking_modules():
        calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)]
        for call in calls:
            if call.func.id in ("say", "ENGLISH"):
                said = call.args[0]
                assert isinstance(said, ast.Constant | ast.Name), f"{module.__name__}, line {call.lineno}"
                yield said.value if isinstance(said, ast.Constant) else getattr(module, said.id)


def reasons():
    "Why cleaning takes a document out or changes it, as the code of the data modules names it."
    for path in (PACKAGE / "data" / name for name in ("corpus.py", "leaks.py", "reworded.py")):
        for x in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(x, ast.keyword) and x.arg == "reason"
            named |= isinstance(x, ast.Assign) and getattr(x.targets[0], "id", "") == "reason"
            given = [x.value] if named else []
            if isinstance(x, ast.Dict):
                given += [v for k, v in zip(x.keys, x.values) if getattr(k, "value", "") == "reason"]
            found = [y for value in given if not isinstance(value, ast.Subscript) for y in ast.walk(value)]
            yield from (y.value for y in found if isinstance(y, ast.Constant) and isinstance(y.value, str))


def fields(message):
    return sorted(re.findall(r"%\((\w+)\)s|(%%)", message))


def test_every_message_has_its_chinese_with_the_same_fields():
    kept = {
        *reasons(),
        *NEEDS.values(),
        *NOTES,
        *PROBLEMS,
        *ROWS,
        *(_compared(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)),
    }
    templates = {message for template in TEMPLATES for message in messages_of(template) if message}
    spoken = set(sentences())
    assert len(templates) > 100 and len(spoken) > 50 and {"near-duplicate", "reworded, removed"} <= kept
    assert not (templates | spoken | kept) - set(CHINESE), "to be translated in assets/report_zh.json"
    assert not set(CHINESE) - (templates | spoken | kept), "translations of what nobody says any more"
    assert [m for m, chinese in CHINESE.items() if set(fields(m)) != set(fields(chinese))] == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_has_no_english_outside_its_messages(template):
    text = (PACKAGE / "assets" / template).read_text(encoding="utf-8")
    text = re.sub(r"{% trans\b.*?{% endtrans %}|{[{%].*?[%}]}|<style>.*?</style>|<pre>.*?</pre>", " ", text, flags=re.S)
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"<[^>]+>|&\w+;", " ", text))
    assert set(words) == ({"English", "trained", "MB"} if template == TEMPLATES[0] else {"English"})


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Both pages of a run that has every stage and every warning."
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_report(folder, folder, dict(name="x", model="owner/base", seed=0), STAGES)
    return [(folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.zh.html")]


def test_the_chinese_page_has_no_english_sentence(pages):
    english, chinese = pages
    assert left_in_english(chinese, ["X shall mean"]) == [] and len(left_in_english(english)) > 50
    assert '<html lang="en">' in english and '<html lang="zh">' in chinese
    assert 'href="report.zh.html"' in english and 'href="report.html"' in chinese and "<script" not in english + chinese


def test_both_pages_have_the_same_figures(pages):
    english, chinese = pages
    assert shown_figures(english) == shown_figures(chinese) and english.count("<svg") == 6
    assert len(shown_figures(english)[1]) > 50


def test_the_chinese_page_has_the_warnings_and_the_kept_sentences(pages):
    for said in ("它很可能读过", "阶段 pretrain 的内存峰值", "“general”重复了 4.0 遍", "有 3 段对话比", "应不低于 0.9"):
        assert said in pages[1], said


def test_a_text_with_a_tag_stays_a_text_in_both_languages():
    for lang in ("en", "zh"):
        page = page_environment("report.html.jinja", lang).from_string("{% trans %}{{ name }}: report{% endtrans %}")
        assert "&lt;b&gt;" in page.render(name="<b>")


@pytest.mark.parametrize("more", [{}, dict(mcq=()), dict(domain=(0.1, 0.2)), dict(share=0.5, after=1.2)])
def test_a_chinese_verdict_has_the_figures_of_the_english_one(more):
    def numbers(text):
        return sorted(re.findall(r"[+-]?\d+(?:\.\d+)?%?", text))

    english, chinese = said(**more), said(**more, say=speaker("zh"))
    assert numbers(english) == numbers(chinese) and left_in_english(chinese) == []


def test_accuracies_and_their_difference_fit_each_other():
    "17.5% to 15.0% is -2.5 points; in whole numbers it would read 18% to 15%, and -2."
    bits = dict(domain_bpb=dict(bpb=1.0, change=None), general_bpb=dict(bpb=1.0, change=None))

    def said(first, last):
        change = dict(diff=last - first, low=-0.19, high=0.14)
        before = {name: dict(accuracy=first) for name in ("domain_mcq", "general_mcq")}
        after = {name: dict(accuracy=last, change=change) for name in before}
        return run_verdict(before | bits, after | bits, 0.1)

    assert "17.5% to 15.0%: -2.5 points, 95% interval -19.0 to +14.0" in said(0.175, 0.15)
    assert "20% to 30%: +10 points, 95% interval -19 to +14" in said(0.2, 0.3)
