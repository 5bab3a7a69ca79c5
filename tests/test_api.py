"""The servers as other programs use them: the API page by schemathesis, the OpenAI-compatible one by `openai`."""

import json
import os
import re
import signal
import subprocess
import sys

import openai
import pytest

from domain_llm.cli import main
from domain_llm.core import InputError, write_jsonl
from domain_llm.ship import serve
from domain_llm.ship.gguf import export_gguf
from domain_llm.ship.serve import post, server

MAIN = "import sys; from domain_llm.cli import main; sys.exit(main(sys.argv[1:]))"
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "The task server over the demo's database, behind a key."
    folder = tmp_path_factory.mktemp("api")
    words = ["serve", "--task", "text2sql", "demo", "--store", "feedback.sqlite", "--port", "0", "--api-key", KEY]
    with open(folder / "log", "w") as log:
        running = subprocess.Popen(
            [sys.executable, "-c", MAIN, *words], stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder
        )
    said = running.stdout.readline()
    assert "answers at" in said, (folder / "log").read_text()
    yield re.search(r"http://127\.0\.0\.1:\d+", said)[0]
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 0
    running.stdout.close()


@pytest.mark.parametrize("given, want", [("3", 3), ("", None), ("0", None), ("all", None)])
def test_the_models_server_takes_as_many_threads_as_the_environment_says(given, want, monkeypatch):
    "Beside other work threads that wait busily cost more than they bring; without a number all cores are taken."
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    params = serve._settings("127.0.0.1", 0, 512, 1, [], [])
    wanted = want or len(os.sched_getaffinity(0))
    assert params.cpuparams.n_threads == params.cpuparams_batch.n_threads == wanted


def test_earlier_prompts_are_kept_within_a_limit():
    "llama.cpp's own limit is 8 GiB, which a server that runs for days would fill."
    assert serve._settings("127.0.0.1", 0, 512, 1, [], []).cache_ram_mib == 256


# Any text is sound by the schema of a query, and most are no SQL: that these are refused with 422 is no fault.
SETTINGS = """
[[operations]]
include-path = ["/run", "/feedback"]
checks.positive_data_acceptance.enabled = false
"""


def test_the_api_keeps_what_its_page_says(url, tmp_path):
    "Statuses, bodies, methods and keys are as described, and what is not described is refused."
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    words = ["run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--phases", "coverage,fuzzing"]
    bounds = ["--max-examples", "5", "--seed", "1", "--suppress-health-check", "all", "--no-color"]
    asked = [sys.executable, "-m", "schemathesis.cli", *words, *bounds]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and "Tested: 4" in done.stdout, (done.stdout + done.stderr)[-5000:]


@pytest.mark.parametrize(
    "path, body, said",
    [
        ("run", {"sql": "DROP TABLE machines", "question": "有多少台机器？"}, "不允许使用 DROP"),
        ("run", {"sql": "SELECT 1; SELECT 2", "lang": "zh"}, "只允许一条"),
        ("run", {"sql": "SELECT nothing FROM machines", "question": "有多少台机器？"}, "请使用各表中的列"),
        ("run", {"sql": "SELECT name FROM engines", "question": "有多少台机器？"}, "没有名为 'engines' 的表"),
        ("run", {"sql": "DROP TABLE machines", "question": "有多少台机器？", "lang": "en"}, "DROP is not allowed"),
        ("feedback", {"question": "有多少台机器？", "good": True}, "请用 sql 发送"),
    ],
)
def test_refusals_are_in_the_language_of_the_question(url, path, body, said):
    with pytest.raises(InputError, match=re.escape(said)):
        post(f"{url}/{path}", body, key=KEY)


@pytest.mark.parametrize("question", ["明天下雨吗？", "长" * 400, ""])
def test_a_question_back_is_in_the_language_of_the_question(url, question):
    body = {"question": question} | ({} if question else {"lang": "zh"})
    found = post(f"{url}/ask", body, key=KEY)
    assert found["by"] == "clarification" and re.fullmatch(r"[^a-zA-Z]+", found["note"])


@pytest.fixture(scope="module")
def file(tiny_folder, tmp_path_factory):
    "A tiny model as a GGUF file."
    return export_gguf(tiny_folder, tmp_path_factory.mktemp("gguf"), "q8_0")["q8_0"]


@pytest.fixture(scope="module")
def model(file):
    "OpenAI's client of a tiny model that takes conversations of 256 tokens, and the name of its file."
    with server(file, port=0, context=256, api_keys=[KEY]) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0), file.stem


HELLO = [{"role": "user", "content": "泵的压力是多少？"}]


def test_models_are_listed_without_their_path(model):
    client, name = model
    assert [found.id for found in client.models.list()] == [name]


def test_a_streamed_answer_is_the_whole_one(model):
    client, name = model
    how = dict(model=name, messages=HELLO, max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**how)
    assert whole.usage.completion_tokens <= 12 and whole.choices[0].finish_reason in ("stop", "length")
    pieces = list(client.chat.completions.create(**how, stream=True))
    text = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert text and text == whole.choices[0].message.content


def test_a_wrong_key_is_refused(model):
    client, name = model
    with pytest.raises(openai.AuthenticationError) as e:
        client.with_options(api_key="another").chat.completions.create(model=name, messages=HELLO)
    assert e.value.status_code == 401


def test_a_conversation_that_is_too_long_is_refused(model):
    client, name = model
    long = [{"role": "user", "content": "pressure " * 400}]
    with pytest.raises(openai.BadRequestError, match="context") as e:
        client.chat.completions.create(model=name, messages=long, max_tokens=4)
    assert e.value.status_code == 400


def test_a_task_is_put_to_a_file_and_the_terminal_gets_rows_alone(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DOMAIN_LLM_CACHE", str(tmp_path))  # no answers of an earlier test
    pages = tmp_path / "pages.jsonl"
    write_jsonl(pages, [dict(query="苍鹭", results=["苍鹭很大。"], summary="很大。")])
    capsys.readouterr()
    assert main(["task", "search2sum", str(file), str(pages), "--max-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["query"] for line in said.out.splitlines()] == ["苍鹭"]
    assert "ROUGE-L, mean of 1 rows" in said.err and "a single group" in said.err
