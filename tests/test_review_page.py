"""The page, the server and the command of a review: nothing gives a model away, nothing is lost."""

import http.client
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fixtures.languages import left_in_english, shown_figures
from test_cli import call, lines

from domain_llm.core import InputError, read_json, read_jsonl, write_json
from domain_llm.judge.packet import build_packet
from domain_llm.run import review_start
from domain_llm.run.review_result import collect_review
from domain_llm.run.review_start import answers_of, prepare_review, read_rubric
from domain_llm.ship.llm_judge import judge_items, judge_marks, read_reply
from domain_llm.ship.marks import keep_mark, kept_marks, review_page

MAIN = "import sys; from domain_llm.cli import main; sys.exit(main(sys.argv[1:]))"
EVIL = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- <script>",
    "]]> \u2028 \u2029 &lt;b&gt; {{ 7 * 7 }} ${7 * 7}",
    "问题 ' \" ` \\",
]
TEMPLATE = review_page(dict(server=True))


class Tags(HTMLParser):
    "The elements of a page, and the text of its packet."

    def __init__(self, page):
        super().__init__()
        self.tags, self.data, self.inside = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(attributes)))
        self.inside = ("id", "packet") in attributes

    def handle_data(self, data):
        self.data += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


def questions(n=20):
    return [dict(question=f"What about machine {i}?", reference=f"It has {i} bar.") for i in range(n)]


def wrote(word, n=20):
    return [f"{word} {i}" for i in range(n)]


def test_whatever_stands_in_an_answer_stays_a_text():
    asks = [dict(question=text) for text in EVIL]
    packet, _ = build_packet(asks, dict(a=EVIL, b=wrote("plain", len(EVIL))), seed=0, calibration=[])
    seen, plain = Tags(review_page(packet)), Tags(TEMPLATE)
    shapes = [[tag for tag in page.tags if tag[0] != "meta"] for page in (seen, plain)]
    assert shapes[0] == shapes[1] and json.loads(seen.data) == packet
    assert set(EVIL) <= set(packet["answers"])


def test_the_page_reaches_nothing_and_sets_no_html():
    page = review_page(build_packet(questions(), dict(a=wrote("x"), b=wrote("y")))[0])
    assert not re.search(r"https?:|@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy


def test_both_languages_say_everything():
    said = {}
    for lang in ("en", "zh"):
        strings = TEMPLATE.split(f"  {lang}: {{")[1].split("\n  },")[0]
        said[lang] = set(re.findall(r"(\w+):", re.sub(r'"[^"]*"|`[^`]*`', '""', strings)))
    english, chinese = said.values()
    assert english == chinese and {"title", "tie", "export", "waiting"} <= english
    assert set(re.findall(r'data-say="(\w+)"', TEMPLATE)) <= english


def review_folder(tmp_path, n=20, **more):
    "A started review of two files of answers."
    lines(tmp_path / "open.jsonl", questions(n))
    for name, word in (("secret-7b", "long text"), ("base-13b", "short")):
        rows = [dict(question=q["question"], answer=f"{word} {i}") for i, q in enumerate(questions(n))]
        lines(tmp_path / f"{name}.jsonl", rows)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("secret-7b", "base-13b")]
    prepare_review(files, tmp_path / "open.jsonl", tmp_path / "review", **more)
    return tmp_path / "review"


def test_nothing_in_page_or_packet_names_a_model(tmp_path):
    folder = review_folder(tmp_path, reviewers=3)
    key, seed = read_json(folder / "key.json"), str(read_json(folder / "key.json")["seed"])
    for name in ("review.html", "packet.json"):
        text = (folder / name).read_text()
        for hidden in ("secret-7b", "base-13b", str(tmp_path), "calibration", seed, *key["tokens"].values()):
            assert hidden not in text, (name, hidden)


def test_a_start_that_was_cut_goes_on(tmp_path, tiny_folder, monkeypatch):
    asked, rows = [], questions(20)

    def answer(model, tok, batch, max_new_tokens):
        asked.append(batch)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [f"to {text}" for text in batch]

    monkeypatch.setattr(review_start, "chat", answer)
    with pytest.raises(KeyboardInterrupt):
        answers_of(str(tiny_folder), rows, tmp_path)
    (kept,) = tmp_path.glob("*.jsonl")
    kept.write_text(kept.read_text() + '"half a li')
    found = answers_of(str(tiny_folder), rows, tmp_path)
    assert found == [f"to {row['question']}" for row in rows] and asked[2] == asked[1]
    assert answers_of(str(tiny_folder), rows, tmp_path) == found and len(asked) == 4
    answers_of(str(tiny_folder), rows[:3], tmp_path)
    assert len(asked) == 5  # other questions, other answers


def test_a_model_is_asked(tmp_path, tiny_folder):
    found = answers_of(str(tiny_folder), questions(3), tmp_path, max_tokens=4)
    assert len(found) == 3 and all(isinstance(text, str) for text in found)


def texts_of(key):
    "The questions of a review and the names of its models."
    return [*key["models"], *(row["text"] for row in key["items"])]


def test_from_the_command_line_to_the_report(tmp_path, capsys, monkeypatch):
    folder = review_folder(tmp_path)
    key = read_json(folder / "key.json")
    for reviewer in ("R1", "R2"):
        marks = {}
        for row in key["items"]:
            said = row.get("known") or ("left" if row["left"].startswith("secret") else "right")
            if row["reviewer"] == reviewer:
                marks[row["item"]] = dict(mark=said, at="1", seconds=3, comment="<b>note</b>")
        content = dict(packet=key["packet"], reviewer=reviewer, marks=marks)
        write_json(tmp_path / "marks" / f"{reviewer}.json", content)
    row = dict(accuracy=0.5, groups=list(range(40)))
    exam = {"secret-7b.jsonl": row | dict(correct=[0] * 40), "base-13b.jsonl": row | dict(correct=[1] * 30 + [0] * 10)}
    write_json(tmp_path / "exam.json", {name: dict(multiple_choice=r) for name, r in exam.items()})
    given = ["--collect", tmp_path / "marks", "--key", folder / "key.json", "--choice", tmp_path / "exam.json"]
    assert call(capsys, "review", *given)[0] == 0
    found = read_json(folder / "result.json")
    assert found["choice"]["best"] == "secret-7b.jsonl" and found["exam"][0]["said"] == "disagree"
    report = (folder / "report.html").read_text()
    assert "&lt;b&gt;note" in report and "<b>note" not in report and report.count("<svg") == 2
    chinese = (folder / "report.zh.html").read_text()
    assert left_in_english(chinese, texts_of(key)) == [] and len(left_in_english(report, texts_of(key))) > 10
    assert (
        shown_figures(chinese) == shown_figures(report) and "<td>不一致</td>" in chinese and "&lt;b&gt;note" in chinese
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "say one step"),
        (["a", "--collect", "x"], "say one step"),
        (["good.jsonl", "poor.jsonl"], "needs open questions"),
        (["good.jsonl", "--questions", "open.jsonl"], "at least two"),
        (["good.jsonl", "good.jsonl", "--questions", "open.jsonl"], "at least two"),
        (["good.jsonl", "poor.jsonl", "--questions", "open.jsonl", "--reviewers", "0"], "at least 1"),
        (["good.jsonl", "poor.jsonl", "--questions", "none.jsonl"], "cannot read none.jsonl"),
        (["good.jsonl", "poor.jsonl", "--questions", "twice.jsonl"], "same as question 1"),
        (["good.jsonl", "short.jsonl", "--questions", "open.jsonl"], "has no answer to 1 of the questions"),
        (["good.jsonl", "poor.jsonl", "--questions", "open.jsonl", "--rubric", "bad.yaml"], "is no rubric"),
        (["good.jsonl", "poor.jsonl", "--questions", "open.jsonl", "--calibration", "open.jsonl"], "needs the texts"),
        (["--collect", "."], "needs the key"),
        (["--collect", "marks", "--key", "open.jsonl"], "not valid JSON"),
        (["--serve", "nowhere"], "cannot read nowhere/packet.json"),
    ],
)
def test_wrong_input_is_named(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asks = questions(4)
    answers = [dict(question=q["question"], answer="x") for q in asks]
    lines(tmp_path / "open.jsonl", asks)
    lines(tmp_path / "twice.jsonl", asks[:1] * 2)
    lines(tmp_path / "good.jsonl", answers)
    lines(tmp_path / "poor.jsonl", [row | dict(answer="y") for row in answers])
    lines(tmp_path / "short.jsonl", answers[:3])
    (tmp_path / "bad.yaml").write_text("qa: [{en: no id}]")
    status, err = call(capsys, "review", *given)
    assert status == 2 and said in err


def test_another_review_is_not_overwritten(tmp_path):
    folder = review_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    review_folder(tmp_path)
    with pytest.raises(InputError, match="another review"):
        review_folder(tmp_path, n=12)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_rubrics(tmp_path):
    path = tmp_path / "rubric.yaml"
    path.write_text('"*": [{id: right, en: Right, zh: 对吗}]')
    assert read_rubric(path)["*"][0]["zh"] == "对吗"
    for wrong in ("[]", "a: b", "a: [{id: x}, {id: x}]", "a: []", "{"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="rubric"):
            read_rubric(path)


# The server


class Served:
    "The command `review --serve` in a process of its own, at one port."

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, 0, None

    def start(self):
        command = [sys.executable, "-c", MAIN, "review", "--serve", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r"http://127.0.0.1:(\d+)", self.process.stdout.readline())[1])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def ask(port, path, token, body=None):
    "Status and content of a request."
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def work(served, token, items, said, stop):
    "A simulated reviewer: marks every item, and again in another way, each until the server has answered."
    for at, item in enumerate(items):
        for again, mark in enumerate(("tie", "left" if at % 2 else "right")):
            body = dict(item=item, mark=mark, at=f"2026-01-01T00:{at:02}:{again:02}Z")
            while not stop.is_set():
                try:
                    if ask(served.port, "marks", token, body)[0] == 200:
                        break
                except (OSError, http.client.HTTPException, ValueError):  # a reply may be cut anywhere
                    time.sleep(0.02)
            said[item] = mark
        time.sleep(0.05)


def test_a_killed_server_loses_and_doubles_no_mark(tmp_path):
    "Three simulated reviewers at once; DOMAIN_LLM_KILLS says how often the server is killed."
    folder, kills = review_folder(tmp_path, n=24, reviewers=3), int(os.environ.get("DOMAIN_LLM_KILLS", 2))
    tokens, packet = read_json(folder / "key.json")["tokens"], read_json(folder / "packet.json")
    served, stop, said = Served(folder), threading.Event(), {name: {} for name in tokens}
    served.start()
    workers = [
        threading.Thread(target=work, args=(served, tokens[name], [row[0] for row in rows], said[name], stop))
        for name, rows in packet["reviewers"].items()
    ]
    for worker in workers:
        worker.start()
    for _ in range(kills):
        time.sleep(0.3)
        served.kill()
        served.start()
    for worker in workers:
        worker.join(300)
    stop.set()
    try:
        for name, token in tokens.items():
            status, found = ask(served.port, "marks", token)
            assert status == 200 and {item: mark["mark"] for item, mark in found["marks"].items()} == said[name]
            assert len(said[name]) == len(packet["reviewers"][name])
    finally:
        served.kill()
    with sqlite3.connect(folder / "marks.sqlite") as con:
        count, different = con.execute("SELECT count(*), count(DISTINCT reviewer || item) FROM marks").fetchone()
    assert count == different == sum(map(len, said.values()))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = review_folder(tmp_path_factory.mktemp("served"), n=10)
    made = Served(folder)
    made.start()
    yield made
    made.kill()


def test_a_reviewer_sees_only_their_own(served):
    tokens = read_json(served.folder / "key.json")["tokens"]
    packet = read_json(served.folder / "packet.json")
    item = packet["reviewers"]["R1"][0][0]
    body = dict(item=item, mark="left", at="2026-01-01T00:00:00Z", comment="备注")
    assert ask(served.port, "marks", tokens["R1"], body)[0] == 200
    assert ask(served.port, "marks", tokens["R1"])[1]["marks"][item]["comment"] == "备注"
    assert ask(served.port, "marks", tokens["R2"])[1]["marks"] == {}
    assert list(ask(served.port, "packet", tokens["R2"])[1]["reviewers"]) == ["R2"]
    assert ask(served.port, "marks", tokens["R2"], body)[0] == 422
    for path in ("marks", "packet"):
        assert ask(served.port, path, "guessed")[0] == 401
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/", timeout=10) as reply:
        page, policy = reply.read().decode(), reply.headers["content-security-policy"]
    assert "What about machine" not in page and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    "wrong",
    [
        dict(mark="best"),
        dict(seconds=-1),
        dict(more=1),
        dict(scores=dict(a=[9, 1])),
        dict(comment="x" * 2001),
        dict(at=3),
    ],
)
def test_wrong_marks_are_refused(served, wrong):
    token = read_json(served.folder / "key.json")["tokens"]["R1"]
    item = read_json(served.folder / "packet.json")["reviewers"]["R1"][1][0]
    body = dict(item=item, mark="left", at="2026-01-01T00:00:00Z") | wrong
    assert ask(served.port, "marks", token, body)[0] == 422
    assert item not in ask(served.port, "marks", token)[1]["marks"]


def test_a_review_fills_no_folder_of_something_else(tmp_path):
    folder = review_folder(tmp_path)
    key = read_json(folder / "key.json")
    rows = {row["item"]: dict(mark=row.get("known") or "left") for row in key["items"] if row["reviewer"] == "R1"}
    write_json(tmp_path / "marks" / "m.json", dict(packet=key["packet"], reviewer="R1", marks=rows))
    mine = tmp_path / "runs"
    mine.mkdir()
    (mine / "report.html").write_text("mine")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("secret-7b", "base-13b")]
    with pytest.raises(InputError, match="holds something else"):
        prepare_review(files, tmp_path / "open.jsonl", mine)
    with pytest.raises(InputError, match="holds something else"):
        collect_review(tmp_path / "marks", folder / "key.json", mine)
    assert [path.name for path in mine.iterdir()] == ["report.html"]


def test_the_store_of_a_server_is_collected(tmp_path):
    folder = review_folder(tmp_path)
    key = read_json(folder / "key.json")
    for row in key["items"]:
        said = row.get("known") or ("left" if row["left"].startswith("secret") else "right")
        keep_mark(folder / "marks.sqlite", key["packet"], row["reviewer"], row["item"], dict(mark=said, at="1"))
    found = collect_review(folder / "marks.sqlite", folder / "key.json", tmp_path / "out")
    assert found["failed"] == [] and found["rates"][0]["rate"] == 1


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as con:
        con.execute("CREATE TABLE t (x)")
    with pytest.raises(InputError, match="something else"):
        kept_marks(path, "p")


# A model as a judge


@pytest.fixture
def endpoint():
    "A server that answers as OpenAI's API does, always with the next of its replies."
    replies, heard = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append(dict(path=self.path, key=self.headers["Authorization"], **body))
            reply = replies[(len(heard) - 1) % len(replies)]
            status, said = (200, dict(choices=[dict(message=dict(content=reply))])) if isinstance(reply, str) else reply
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", replies, heard
    server.shutdown()
    server.server_close()


def test_a_judge_that_always_takes_the_first_is_found_out(tmp_path, endpoint):
    url, replies, heard = endpoint
    replies += ["I think\n**A**"]
    folder = review_folder(tmp_path)
    key = read_json(folder / "key.json")
    marks = {}
    for row in key["items"]:
        said = row.get("known") or ("left" if row["left"].startswith("secret") else "right")
        if row["reviewer"] == "R1":
            marks[row["item"]] = dict(mark=said)
    write_json(tmp_path / "marks" / "m.json", dict(packet=key["packet"], reviewer="R1", marks=marks))
    given = tmp_path / "marks", folder / "key.json", tmp_path / "out"
    people = collect_review(*given)
    found = collect_review(*given, judge=dict(url=url + "/v1", model="m", key="k"))
    judge = found.pop("judge")
    assert found == people, "the judge counts among people"
    assert judge["steady"]["rate"] == 0 and judge["position"]["rate"] == 1 and judge["agreement"] is None
    assert judge["longer"]["judge"]["rate"] == 0.5 and judge["longer"]["people"]["rate"] == 1
    assert {(h["path"], h["key"], h["model"]) for h in heard} == {("/v1/chat/completions", "Bearer k", "m")}
    assert "secret-7b" not in json.dumps(heard)
    chinese = (tmp_path / "out" / "report.zh.html").read_text()
    assert "两种顺序下评判相同" in chinese and left_in_english(chinese, texts_of(key)) == []
    asked = len(heard)
    collect_review(*given, judge=dict(url=url + "/v1", model="m", key="k"))
    assert len(heard) == asked == 2 * 16
    replies[:] = ["I cannot say."]
    silent = collect_review(*given, judge=dict(url=url, model="another"))["judge"]
    assert silent["unclear"] == 32 and silent["agreement"] is silent["position"] is silent["longer"] is None


def test_replies_without_a_mark_are_counted_and_errors_are_said(tmp_path, endpoint):
    url, replies, _ = endpoint
    replies += ["B", "neither of them", "TIE", "both are BAD"]
    packet, key = build_packet(questions(4), dict(a=wrote("x", 4), b=wrote("y", 4)), 1, calibration=[])
    rows = judge_items(packet, key)
    marked, unclear = judge_marks(rows, url, tmp_path / "j.jsonl")
    assert [row["mark"] for row in marked] == ["right", "tie", "both bad"] * 2 and unclear == 2
    replies[:] = [(500, dict(error=dict(message="out of memory")))]
    with pytest.raises(InputError, match="out of memory"):
        judge_marks(rows, url, tmp_path / "other.jsonl")
    replies[:] = [(200, dict(said="A"))]
    with pytest.raises(InputError, match="as OpenAI's API does"):
        judge_marks(rows, url, tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    "text, said",
    [
        ("Answer A is right, so B is wrong: A", "left"),
        ("ABBA", None),
        ("B。", "right"),
        ("b", "right"),
        ("Both answers describe a valve.", None),  # the article is no mark
        ("B, since it names a pressure.", "right"),
        ("回答A好，a valve", "left"),
    ],
)
def test_the_last_word_of_a_reply_counts(text, said):
    assert read_reply(text) == said


def test_files_are_left_alone(tmp_path):
    folder = review_folder(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"key.json", "made_by.json", "packet.json", "review.html"}
    assert len(read_jsonl(Path(tmp_path) / "open.jsonl")) == 20
