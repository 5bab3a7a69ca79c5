"""The server of answers as a process of its own: its API, its page, its door and queue, and what a kill leaves."""

import base64
import hashlib
import http.client
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from fixtures.plant import EVIL, make_plant

from domain_llm.core import InputError, read_jsonl
from domain_llm.ship.door import add_errors
from domain_llm.ship.feedback import good_rows, keep_feedback, open_feedback
from domain_llm.ship.serve import post

MAIN = "import sys; from domain_llm.cli import main; sys.exit(main(sys.argv[1:]))"
ENDLESS = "SELECT COUNT(*) FROM machines a, machines b, machines c, machines d"


class Server:
    "A running 'domain-llm serve --task text2sql' on a free port."

    def __init__(self, folder, *options):
        self.database, examples = make_plant(folder)
        self.store = folder / "feedback.sqlite"
        self.command = [sys.executable, "-c", MAIN, "serve", "--task", "text2sql"]
        files = [self.database, "--examples", examples, "--store", self.store, "--port", 0]
        with open(folder / "log", "w") as log:
            words = [*self.command, *map(str, files), *options]
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
        first = self.process.stdout.readline()
        assert "answers at" in first, (folder / "log").read_text()
        self.port = int(re.search(r"http://127\.0\.0\.1:(\d+)", first)[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def request(self, method, path, body=None, headers=None, timeout=30):
        "Status, headers and decoded body of one request; a dict becomes JSON."
        con = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        con.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        reply = con.getresponse()
        text = reply.read().decode()
        con.close()
        return reply.status, dict(reply.getheaders()), json.loads(text) if text[:1] in "{[" else text

    def export(self, path):
        "The rows marked good, as the command writes them."
        options = ["--store", str(self.store), "--feedback", str(path)]
        subprocess.run([*self.command, *options], check=True, capture_output=True)
        return read_jsonl(path)

    def stop(self, how=signal.SIGTERM):
        "End the server; gives its exit status."
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A function that starts a server, which ends with the tests at the latest."
    started = []

    def start(*options):
        started.append(Server(tmp_path_factory.mktemp("server"), *options))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)
        server.process.stdout.close()


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture(scope="module")
def locked(start):
    return start("--host", "0.0.0.0", "--api-key", "one", "--api-key", "two")


def test_a_question_is_answered(server):
    found = post(server.url + "/ask", {"question": "Where is the Heron?"})
    assert (found["by"], found["columns"], found["rows"]) == ("rules", ["name"], [["Hill"]])
    assert post(server.url + "/ask", {"question": "苍鹭在哪里？"})["rows"] == [["山上"]]
    back = post(server.url + "/ask", {"question": "明天下雨吗？"})
    assert back["by"] == "clarification" and "不确定" in back["note"] and len(back["nearest"]) == 3
    assert "not sure" in post(server.url + "/ask", {"question": "明天下雨吗？", "lang": "en"})["note"]
    assert "300" in post(server.url + "/ask", {"question": "long " * 2000})["note"]


def test_an_edited_query_is_run(server):
    found = post(server.url + "/run", {"sql": "SELECT COUNT(*) AS n FROM machines", "question": "How many?"})
    assert (found["by"], found["columns"], found["rows"]) == ("person", ["n"], [[300]])
    found = post(server.url + "/run", {"sql": "SELECT name FROM machines WHERE price > 1e9", "lang": "zh"})
    assert found["note"] == "没有符合条件的行。"
    values = post(server.url + "/run", {"sql": "SELECT 9007199254740993, 9e999, NULL, 1.5, 12"})["rows"]
    assert values == [["9007199254740993", "inf", None, 1.5, 12]]
    many = post(server.url + "/run", {"sql": "SELECT a.name FROM machines a, machines b"})
    assert len(many["rows"]) == 1000 and "Only the first 1,000" in many["note"]


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM machines",
        "UPDATE machines SET price = 0",
        "DROP TABLE machines",
        "SELECT name FROM sites; DELETE FROM machines",
        "SELECT 1; SELECT 2",
        "WITH gone AS (DELETE FROM machines RETURNING name) SELECT name FROM gone",
        "ATTACH 'evil.sqlite' AS evil",
        "VACUUM INTO 'evil.sqlite'",
        "PRAGMA writable_schema = 1",
        "SELECT sql FROM sqlite_master",
        "SELECT load_extension('evil.so')",
        "SELECT name FROM machines /* ; */; --\nDELETE FROM machines",
        "SELECT '" + "a" * 20_000 + "'",
        "",
        "nonsense",
    ],
)
def test_the_guard_holds_for_edited_queries(server, sql):
    before = hashlib.sha256(server.database.read_bytes()).digest()
    status, _, body = server.request("POST", "/run", {"sql": sql})
    assert status == 422 and "is not run" in body["error"]["message"]
    assert hashlib.sha256(server.database.read_bytes()).digest() == before
    assert not list(server.database.parent.glob("evil*"))


@pytest.mark.parametrize(
    "path, body, headers, status, said",
    [
        ("/ask", b"{", {}, 422, "not JSON"),
        ("/ask", b"", {}, 422, "required"),
        ("/ask", b"[" * 30_000, {}, (400, 422), ""),
        ("/ask", b'{"question": "\xff"}', {}, (400, 422), ""),
        ("/ask", b'{"question": "\\ud800?"}', {}, 422, "question"),
        ("/ask", {"question": 5}, {}, 422, "question: "),
        ("/ask", {"text": "x"}, {}, 422, "question: Field required"),
        ("/ask", {"question": "x", "model": "mine"}, {}, 422, "model: Extra"),
        ("/ask", {"question": "x", "lang": "fr"}, {}, 422, "lang: "),
        ("/ask", {"question": "x"}, {"Content-Type": "text/plain"}, 415, "Content-Type"),
        ("/ask", {"question": "x" * 70_000}, {}, 413, "65,536"),
        ("/ask", {"question": "x"}, {"Host": "evil.example"}, 403, "127.0.0.1"),
        ("/feedback", {"question": "x", "good": True}, {}, 422, "has a query"),
        ("/feedback", {"question": "x", "good": "yes", "sql": "SELECT 1"}, {}, 422, "good: "),
        ("/feedback", {"question": "x", "good": True, "sql": "DROP TABLE sites"}, {}, 422, "DROP is not allowed"),
        ("/feedback", {"question": "x" * 301, "good": False}, {}, 422, "question: "),
        ("/nothing", {"question": "x"}, {}, 404, "Not Found"),
    ],
)
def test_bad_requests_get_a_message(server, path, body, headers, status, said):
    found, _, answer = server.request("POST", path, body, headers)
    assert found in (status if isinstance(status, tuple) else (status,))
    assert said in answer["error"]["message"]


def test_a_body_without_a_length_is_limited_too(server):
    con = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    con.putrequest("POST", "/ask")
    con.putheader("Content-Type", "application/json")
    con.putheader("Transfer-Encoding", "chunked")
    con.endheaders()
    for _ in range(7):  # the body goes on, and nothing is sent behind the limit, where the server closes the door
        con.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
    assert con.getresponse().status == 413
    assert server.request("GET", "/health")[0] == 200


def test_other_methods(server):
    status, _, answer = server.request("GET", "/ask")
    assert status == 405 and answer["error"]["message"]


class Elements(HTMLParser):
    "What a page is made of."

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_brings_everything_and_may_do_nothing_else(server):
    _, headers, page = server.request("GET", "/")
    elements = Elements(page)
    assert not [attrs for _, attrs in elements.found if {"src", "href", "action", "style"} & attrs.keys()]
    assert not [name for _, attrs in elements.found for name in attrs if name.startswith("on")]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    script = re.search(r"<script>(.*)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in headers["content-security-policy"] and rules["frame-ancestors"] == "'none'"
    for writes_html in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert writes_html not in script
    assert "<script" not in server.request("GET", "/docs")[2]


def test_every_field_has_a_label_and_every_text_two_languages(server):
    page = server.request("GET", "/")[2]
    elements = Elements(page).found
    labelled = {attrs["for"] for tag, attrs in elements if tag == "label" and "for" in attrs}
    assert {attrs["id"] for tag, attrs in elements if tag in ("input", "textarea")} == labelled
    said = {attrs["data-say"] for _, attrs in elements if "data-say" in attrs}
    english, chinese = re.search(r"\ben: \{(.*?)\n  \},\n  zh: \{(.*?)\n  \},", page, re.S).groups()
    for words in (english, chinese):
        assert said <= set(re.findall(r"(\w+): \"", words))


def test_a_value_that_is_html_travels_as_text(server):
    found = {"sql": "SELECT name, price FROM machines WHERE machine_id = 4", "question": EVIL[:50]}
    status, headers, answer = server.request("POST", "/run", found)
    assert status == 200 and answer["rows"] == [[EVIL, 7.0]]
    assert headers["content-type"] == "application/json" and headers["x-content-type-options"] == "nosniff"
    _, headers, answer = server.request("POST", "/run", {"sql": f'SELECT "{EVIL[:20]}" FROM nothing'})
    assert headers["content-type"] == "application/json"


def test_the_api_describes_itself(server):
    described = server.request("GET", "/openapi.json")[2]
    assert set(described["paths"]) == {"/ask", "/run", "/feedback", "/health"}
    docs = server.request("GET", "/docs")[2]
    assert all(path in docs for path in described["paths"]) and "confidence" in docs


def test_keys(locked):
    body = {"question": "Where is the Heron?"}
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer é"}):
        for path in ("/ask", "/run", "/feedback", "/nothing"):
            status, _, answer = locked.request("POST", path, body, {k: v.encode("latin-1") for k, v in headers.items()})
            assert status == 401 and "Authorization: Bearer" in answer["error"]["message"]
    for key in ("one", "two"):
        assert post(locked.url + "/ask", body, key=key)["rows"] == [["Hill"]]
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert locked.request("GET", path, headers={"Host": "plant.example"})[0] == 200
    assert "can be reached from the network" in "".join(locked.process.stdout.readline() for _ in range(2))


def test_feedback_survives_a_kill(start, tmp_path):
    server = start()
    good = [
        {"question": "Wie viele?", "sql": "SELECT COUNT(*) FROM machines", "good": True, "by": "rules"},
        {"question": "有多少地方？", "sql": "SELECT COUNT(*) FROM sites", "good": True, "by": "person"},
        {"question": "What?", "good": False, "by": "clarification"},
        {"question": "Whence?", "sql": "SELECT name FROM sites", "good": False, "by": "model"},
    ]
    for row in good:
        assert post(server.url + "/feedback", row) == {"status": "kept"}
    server.stop(signal.SIGKILL)
    wanted = [{"question": row["question"], "sql": row["sql"]} for row in good[:2]]
    assert server.export(tmp_path / "good.jsonl") == wanted
    con = sqlite3.connect(server.store)
    assert con.execute("SELECT COUNT(*) FROM feedback").fetchone() == (4,)
    assert con.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    con.close()


def test_kills_in_the_middle_lose_nothing_that_was_confirmed(start, tmp_path):
    server = start()
    confirmed = []

    def vote():
        for i in range(10_000):
            try:
                post(server.url + "/feedback", {"question": f"{i}", "sql": "SELECT name FROM sites", "good": True})
            except (InputError, OSError, http.client.HTTPException):
                return
            confirmed.append(f"{i}")

    voter = threading.Thread(target=vote)
    voter.start()
    time.sleep(1)
    server.stop(signal.SIGKILL)
    voter.join(30)
    kept = [row["question"] for row in server.export(tmp_path / "good.jsonl")]
    assert len(confirmed) > 5 and kept[: len(confirmed)] == confirmed and len(kept) <= len(confirmed) + 1


def wait_until(happened, seconds=60):
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() - begun < seconds
        time.sleep(0.05)


def test_too_many_questions_at_once(start):
    server = start("--slots", "1")
    found = []

    def ask():
        try:
            found.append(server.request("POST", "/run", {"sql": ENDLESS}))
        except (OSError, http.client.HTTPException):
            found.append(None)  # killed below

    threads = [threading.Thread(target=ask) for _ in range(7)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(found) >= 2)
    assert [status for status, _, _ in found] == [503, 503], "refused at once, before the first is stopped"
    assert int(found[0][1]["retry-after"]) > 0 and "Too many questions" in found[0][2]["error"]["message"]
    status, _, answer = server.request("POST", "/run", {"sql": ENDLESS, "question": "苍鹭在哪里？"})
    assert status == 503 and "问题太多" in answer["error"]["message"]
    assert server.request("GET", "/health")[0] == 200
    wait_until(lambda: len(found) >= 3)
    assert found[2][0] == 422, "the first was stopped after its time, and the next runs"
    assert post(server.url + "/feedback", {"question": "x", "good": False}) == {"status": "kept"}
    server.stop(signal.SIGKILL)
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_question_that_is_being_answered_ends_before_the_server_does(how, start):
    server = start()
    found = []
    body = {"sql": ENDLESS}
    asking = threading.Thread(target=lambda: found.append(server.request("POST", "/run", body)))
    asking.start()
    time.sleep(1)
    assert server.stop(how) == 0
    asking.join(30)
    assert found[0][0] == 422 and "stopped after 5 s" in found[0][2]["error"]["message"]
    assert server.process.stdout.read().endswith("stopped\n")
    with pytest.raises(OSError):
        server.request("GET", "/health")


def test_a_database_that_is_gone(start):
    server = start()
    server.database.unlink()
    for method, path, body in (("GET", "/health", None), ("POST", "/ask", {"question": "Where is the Heron?"})):
        status, _, answer = server.request(method, path, body)
        assert status == 503 and "cannot be used now" in answer["error"]["message"]
        assert str(server.database) not in json.dumps(answer)
    _, _, answer = server.request("POST", "/ask", {"question": "苍鹭在哪里？"})
    assert "现在无法使用" in answer["error"]["message"]
    server.stop(signal.SIGKILL)
    assert str(server.database) in (server.database.parent / "log").read_text()


def test_an_error_that_nobody_foresaw_is_said_in_the_language_of_the_request():
    app = FastAPI()
    add_errors(app)

    @app.get("/{lang}")
    def fail(lang: str, request: Request):
        request.state.lang = lang
        raise RuntimeError("secret")

    client = TestClient(app, raise_server_exceptions=False)
    for lang, said in (("en", "The log says what"), ("zh", "原因见日志")):
        reply = client.get(f"/{lang}")
        assert reply.status_code == 500 and said in reply.json()["error"]["message"] and "secret" not in reply.text


@pytest.mark.parametrize("tables", [("feedback (text TEXT)",), ("feedback (question TEXT)", "machines (name TEXT)")])
def test_a_database_of_somebody_else_is_not_touched(tmp_path, tables):
    path = tmp_path / "own.sqlite"
    con = sqlite3.connect(path)
    for table in tables:
        con.execute(f"CREATE TABLE {table}")
    con.commit()
    con.close()
    before = path.read_bytes()
    for use in (
        lambda: open_feedback(path),
        lambda: keep_feedback(path, "a", "SELECT 1", True),
        lambda: good_rows(path),
    ):
        with pytest.raises(InputError, match="something else"):
            use()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_first_request_warns_of_nothing(tmp_path):
    "In a process of its own, since what reads requests is built once."
    code = """
import warnings
from domain_llm.ship.ask import opened
from domain_llm.ship.web import make_app
from starlette.testclient import TestClient
with opened("demo") as source:
    client = TestClient(make_app(source, "feedback.sqlite"), base_url="http://127.0.0.1")
    warnings.simplefilter("error")
    print(client.post("/ask", json=dict(question="Where is the Swan 32?")).json()["by"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "rules\n", done.stderr[-2000:]
