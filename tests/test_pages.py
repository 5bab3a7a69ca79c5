"""The pages in a real browser: by keyboard, on a phone, in two languages, and over a reload, nothing is lost."""

import json
import time

import browser
import pytest
from fixtures.plant import EVIL
from fixtures.report_run import STAGES, write_run
from test_review_page import EVIL as TEXTS
from test_review_page import Served, questions, review_folder, wrote
from test_web import Server

from domain_llm.core import read_json
from domain_llm.judge.packet import build_packet
from domain_llm.run.report import write_report
from domain_llm.run.review_result import collect_review
from domain_llm.ship.marks import keep_mark, write_page

pytestmark = pytest.mark.skipif(browser.chromium() is None, reason="needs Chromium: apt-get install chromium")

BOTH = [(size, lang) for size in browser.SIZES for lang in ("en", "zh")]
LONG = "Check the relief valve first. " * 60
RUBRIC = {"*": [dict(id="right", en="Right", zh="正确"), dict(id="whole", en="Complete", zh="完整")]}
FAULTS = """[...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect(), scrolls = e.closest(".scroll, #table");
  const small = e.matches("button, select, textarea, input:not([type=radio]), summary, #points label")
    && Math.min(box.width, box.height) < 44;
  return box.width && box.height && (small || (box.right > innerWidth + 1 && !scrolls));
}).map(e => e.outerHTML.slice(0, 80)).concat(
  document.documentElement.scrollWidth > innerWidth ? ["the page is wider than the screen"] : [])"""
FOCUS = "document.activeElement.id || document.activeElement.dataset.mark || document.activeElement.textContent"
FREE = "!document.querySelector('#answer').hidden && document.querySelector('#status').textContent.includes('{}')"


@pytest.fixture
def reviewed(tmp_path):
    "A started review of two files of answers, as its folder and the address of its page."
    folder = review_folder(tmp_path)
    return folder, (folder / "review.html").as_uri()


def written(tmp_path, rubric=None, answers=TEXTS, n=3):
    "The address of a page with a few items, some of whose answers are long or no friends of a page."
    packet, _ = build_packet(questions(n), dict(a=answers[:n], b=wrote(LONG, n)), 1, 0, [], rubric)
    write_page(tmp_path / "page.html", packet)
    return (tmp_path / "page.html").as_uri()


def wait_for(folder, pattern):
    "The one file of a name, once it has come."
    end = time.monotonic() + 20
    while not (found := list(folder.glob(pattern))) and time.monotonic() < end:
        time.sleep(0.05)
    return found[0]


def tab_to(page, wanted):
    "Press Tab until the focus is where it should be; it must be seen there."
    for _ in range(40):
        page.press("Tab")
        if page.run(FOCUS) == wanted:
            outline = page.run("getComputedStyle(document.activeElement).outlineStyle + innerHeight")
            assert outline.startswith("solid"), f"the focus on {wanted} is not seen"
            return
    raise AssertionError(f"Tab does not reach {wanted}")


def imported(address, path):
    "What a fresh browser holds after the import of a file of five marks."
    with browser.Browser("phone", "zh") as page:
        page.open(address)
        page.run("enter('R1')")
        page.wait("!$('work').hidden")
        chosen = page.call("Runtime.evaluate", expression="$('file')")["result"]["objectId"]
        page.call("DOM.setFileInputFiles", files=[str(path)], objectId=chosen)
        page.wait("$('said').textContent === '已导入 5 个评分。'")
        return page.run("content()")


@pytest.mark.parametrize("size, lang", BOTH)
def test_the_review_page_fits(size, lang, tmp_path):
    for rubric in (None, RUBRIC):
        address = written(tmp_path, rubric)
        with browser.Browser(size, lang) as page:
            page.open(address)
            assert page.run(FAULTS) == []
            page.run("document.querySelector('#reviewers button').click()")
            assert page.run(FAULTS) == []
            visible = "[...document.querySelectorAll('input[type=file]')].filter(e => e.offsetWidth).length"
            assert page.run(visible) == 0, "the browser's own words, in the browser's language"


def test_a_review_by_keyboard_over_a_reload_and_a_change_of_language(reviewed):
    folder, address = reviewed
    with browser.Browser() as page:
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        page.open(address)
        tab_to(page, "R1")
        page.press("Enter", "1", "2")
        tab_to(page, "tie")
        page.press("Enter")
        assert page.run(FOCUS) == "question"
        tab_to(page, "comment")
        page.write("halfway")
        page.call("Page.reload")
        page.wait("document.querySelector('#reviewers button')?.textContent.includes('3 marked')")
        tab_to(page, "R1 · 3 marked")
        page.press("Enter")
        assert page.run("[at, $('comment').value]") == [3, "halfway"]
        tab_to(page, "lang")
        page.run("$('lang').value = 'zh'; $('lang').dispatchEvent(new Event('change'))")
        assert page.run("[$('comment').value, $('title')?.textContent ?? document.title]") == [
            "halfway",
            "哪个回答更好？",
        ]
        page.press("4", "1")
        assert page.run("$('said').textContent") == "已保存。"
        page.run("$('lang').value = 'en'; $('lang').dispatchEvent(new Event('change'))")
        assert page.run("$('said').textContent") == "Saved."
        tab_to(page, "export")
        page.press("Enter")
        exported = page.run("content()")
        path = wait_for(folder, "marks-R1-*.json")
    found, packet = read_json(path), read_json(folder / "packet.json")
    assert json.loads(exported) == found
    seen = [found["marks"][row[0]] for row in packet["reviewers"]["R1"][:5]]
    assert [mark["mark"] for mark in seen] == ["left", "right", "tie", "both bad", "left"]
    assert [mark.get("comment") for mark in seen] == [None, None, None, "halfway", None]
    assert not any(name in path.read_text() for name in ("secret-7b", "base-13b"))
    assert json.loads(imported(address, path)) == found


def test_marks_of_another_tab_and_late_comments_stay(reviewed):
    _, address = reviewed
    with browser.Browser() as page:
        page.open(address)
        page.run("enter('R1')")
        page.wait("!$('work').hidden")
        other = "{ mark: 'tie', seconds: 1, at: new Date().toISOString() }"
        page.run(f"localStorage.setItem(place(), JSON.stringify({{ [items()[7][0]]: {other} }}))")
        page.press("1")
        assert page.run("[marks[items()[0][0]].mark, JSON.parse(read(place()))[items()[7][0]].mark]") == ["left", "tie"]
        page.press("ArrowLeft")
        page.run("$('comment').focus()")
        page.write("late")
        page.call("Page.reload")
        page.wait("document.querySelector('#reviewers button')")
        page.run("enter('R1')")
        page.wait("!$('work').hidden")
        assert page.run("marks[items()[0][0]].comment") == "late" and "late" in page.run("content()")


def test_points_that_are_not_saved_yet_stay(tmp_path):
    address = written(tmp_path, RUBRIC)
    with browser.Browser("phone", "zh") as page:
        page.open(address)
        page.run("document.querySelector('#reviewers button').click()")
        page.run("document.querySelectorAll('#points input')[3].click()")
        page.run("$('lang').value = 'en'; $('lang').dispatchEvent(new Event('change'))")
        assert page.run("[document.querySelectorAll('#points input')[3].checked, $('save').disabled]") == [True, True]
        page.run("step(1); step(-1)")
        assert page.run("document.querySelectorAll('#points input')[3].checked")
        page.run("for (const k of [8, 12, 15]) document.querySelectorAll('#points input')[k].click()")
        page.run("$('save').click()")
        assert page.run("Object.values(marks)[0].scores") == {"right": [4, 4], "whole": [3, 1]}
        assert page.run("document.querySelectorAll('#points input:checked').length") == 0
        assert page.run("stored(`${place()} drafts`)") == {}


def test_the_end_of_a_review_is_seen_on_a_phone(tmp_path):
    address = written(tmp_path)
    with browser.Browser("phone") as page:
        page.open(address)
        page.run("document.querySelector('#reviewers button').click()")
        for _ in range(page.run("items().length")):
            page.run("document.querySelector('[data-mark=tie]').click()")
        box = page.run("(({ top, bottom }) => ({ top, bottom }))($('done').getBoundingClientRect())")
        assert 0 <= box["top"] < box["bottom"] < 844 and page.run(FOCUS) == "done"


def test_the_served_page_says_the_same_after_a_change_of_language(tmp_path):
    served = Served(review_folder(tmp_path))
    served.start()
    try:
        token = read_json(served.folder / "key.json")["tokens"]["R1"]
        with browser.Browser("phone", "zh") as page:
            page.open(f"http://127.0.0.1:{served.port}/#R1.{token}")
            page.wait("!$('work').hidden")
            assert page.run(FAULTS) == []
            page.press("1")
            page.wait("$('said').textContent === '已保存。'")
            served.kill()
            page.press("2")
            page.wait("$('said').textContent.includes('尚未保存')")
            page.run("$('lang').value = 'en'; $('lang').dispatchEvent(new Event('change'))")
            assert "1 marks are not yet saved" in page.run("$('said').textContent")
            served.start()
            page.wait("$('said').textContent === 'Saved.'")
            page.call("Page.reload")
            page.wait("typeof $ === 'function' && !$('work').hidden && Object.keys(marks).length === 2")
    finally:
        served.kill()


def test_the_report_of_a_review_fits_a_phone(reviewed):
    folder, _ = reviewed
    key = read_json(folder / "key.json")
    for row in key["items"]:
        mark = dict(mark=row.get("known") or "left", at="1")
        keep_mark(folder / "marks.sqlite", key["packet"], row["reviewer"], row["item"], mark)
    collect_review(folder / "marks.sqlite", folder / "key.json", folder / "out")
    with browser.Browser("phone") as page:
        for name, other in (("report.html", "report.zh.html"), ("report.zh.html", "report.html")):
            page.open((folder / "out" / name).as_uri())
            assert page.run("document.documentElement.scrollWidth") == 390
            assert page.run("document.querySelector('td').offsetHeight") < 100, "names of models need a few lines"
            leads_to_the_other_language(page, other)


def leads_to_the_other_language(page, other):
    "The link at the top right is large enough for a thumb, alone in its place, and leads to the other page."
    link = "document.querySelector('a[hreflang]')"
    box = page.run(f"(({{ top, right, height }}) => ({{ top, right, height }}))({link}.getBoundingClientRect())")
    assert box["height"] >= 44 and box["top"] < 60 and 300 < box["right"] <= 390
    page.run(f"{link}.click()")
    page.wait(f"document.readyState === 'complete' && location.pathname.endsWith('/{other}')")


@pytest.mark.parametrize("size", browser.SIZES)
def test_the_report_of_a_run_fits_in_both_languages(size, tmp_path):
    folder = write_run(tmp_path)
    write_report(folder, folder, dict(name="a_long_name_" * 9, model="owner/base", seed=0), STAGES)
    with browser.Browser(size) as page:
        for name in ("report.html", "report.zh.html"):
            page.open((folder / name).as_uri())
            page.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
            assert page.run(FAULTS) == []
            assert page.run("document.documentElement.lang") == ("zh" if "zh" in name else "en")
        if size == "phone":
            leads_to_the_other_language(page, "report.html")


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("plant"))
    yield server
    server.stop()
    server.process.stdout.close()


@pytest.mark.parametrize("size, lang", BOTH)
def test_the_page_of_answers_fits(plant, size, lang):
    with browser.Browser(size, lang) as page:
        page.open(plant.url + "/")
        page.wait("document.querySelector('#nearest button')")
        assert page.run(FAULTS) == []
        page.write("What do the machines cost?")
        page.press("Enter")
        page.wait("document.querySelector('#chart svg')")
        assert page.run(FAULTS) == []
        page.run("$('sql').value = 'SELECT *, 1.0 / 3 AS a_long_name, price AS again, name AS n FROM machines'")
        page.run("$('runForm').requestSubmit()")
        page.wait(FREE.format({"en": "Your own", "zh": "您自己"}[lang]))
        assert page.run(FAULTS) == []
        seen = page.run("(({ top, bottom }) => top >= 0 && bottom <= innerHeight)($('status').getBoundingClientRect())")
        cell = page.run("document.querySelector('#table td:nth-child(2)').getBoundingClientRect().height")
        assert seen and cell < 44, "a name of five letters needs one line"
        assert page.run("document.title") == {"en": "Questions to the data", "zh": "向数据提问"}[lang], EVIL


def test_numbers_of_the_chart_are_not_cut(plant):
    with browser.Browser("phone") as page:
        page.open(plant.url + "/")
        page.wait("document.querySelector('#nearest button')")
        page.run(
            "get('run', { sql: 'SELECT name, price / 7 AS x FROM machines WHERE machine_id > 297', question: '' })"
        )
        page.wait("document.querySelector('#chart svg')")
        outside = """(edge => [...document.querySelectorAll("#chart text")].filter(
            text => text.getBoundingClientRect().right > edge + 1).length)($("chart").getBoundingClientRect().right)"""
        assert page.run(outside) == 0


def test_a_change_of_language_keeps_an_edited_query_and_a_thumb(plant):
    with browser.Browser() as page:
        page.open(plant.url + "/")
        page.wait("document.querySelector('#nearest button')")
        page.write("Where is the Heron?")
        page.press("Enter")
        page.wait(FREE.format("1 row"))
        tab_to(page, "up")
        page.press("Enter")
        page.wait("$('kept').textContent.includes('Thank')")
        tab_to(page, "sql")
        page.write(" LIMIT 1")
        edited = page.run("$('sql').value")
        page.run("$('lang').value = 'zh'; $('lang').dispatchEvent(new Event('change'))")
        page.wait(FREE.format("由规则回答"))
        state = page.run("[$('sql').value, $('up').getAttribute('aria-pressed'), $('kept').textContent]")
        assert state == [edited, "true", "谢谢，已保存。"] and "LIMIT 1" in edited
        page.call("Page.reload")
        page.wait("document.title === '向数据提问' && document.querySelector('#nearest button')")


def test_an_offer_that_is_taken_by_keyboard_does_not_lose_the_focus(plant):
    with browser.Browser() as page:
        page.open(plant.url + "/")
        page.wait("document.querySelector('#nearest button')")
        tab_to(page, page.run("document.querySelector('#nearest button').textContent"))
        page.press("Enter")
        page.wait(FREE.format("row"))
        assert page.run(FOCUS) == "status"
        tab_to(page, "table")


def test_a_key_is_asked_for_and_the_focus_goes_on_to_the_question(tmp_path):
    server = Server(tmp_path, "--api-key", "one")
    try:
        with browser.Browser("phone", "zh") as page:
            page.open(server.url + "/")
            page.wait("!$('keyForm').hidden && $('status').textContent === '此服务器需要密钥。'")
            assert page.run(FAULTS) == []
            page.write("one")
            page.press("Enter")
            page.wait("document.querySelector('#nearest button')")
            assert page.run(FOCUS) == "question"
    finally:
        server.stop()
        server.process.stdout.close()
