"""Bad input: a clear message on stderr, exit status 2 (or 3 for skipped files), no traceback, nothing lost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from domain_llm import cli, commands, models
from domain_llm.data.mix import recommend_ratio
from domain_llm.devices import disk_full
from domain_llm.judge.stats import detectable
from domain_llm.run import inputs
from domain_llm.run.inputs import ROLES, read_inputs
from domain_llm.run.pipeline import opened, run_recipe
from domain_llm.run.recipe import check_recipe, init_recipe

QUESTION = {"question": "What is 2+2?", "choices": ["3", "4"], "answer": 1}


def call(capsys, *argv):
    "Exit status and stderr of a command, run in this process."
    status = cli.main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return status, err


def lines(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


RECIPES = {  # a recipe that is wrong, and what the message must name
    "typo in a section": ("modle: x", "model"),
    "typo in a setting": ("demo: 8\npretrain: {learning_rat: 1}", "learning_rate"),
    "not YAML": ("demo: [8", "not valid YAML"),
    "a list": ("- demo", "must be a set"),
    "empty": ("", "names no documents"),
    "section is a number": ("demo: 8\nmix: 3", "mix"),
    "zero rate": ("demo: 8\npretrain: {learning_rate: 0}", "above 0"),
    "rate is a word": ("demo: 8\npretrain: {learning_rate: fast}", "above 0"),
    "rate is not a number": ("demo: 8\npretrain: {learning_rate: .nan}", "above 0"),
    "zero ratio": ("demo: 8\nmix: {parts: {domain: 1, general: 0}}", "parts above 0"),
    "negative ratio": ("demo: 8\nmix: {parts: {domain: -1}}", "parts above 0"),
    "unknown source": ("demo: 8\nmix: {parts: {domain: 1, generl: 1}}", "did you mean 'general'"),
    "no domain": ("demo: 8\nmix: {parts: {general: 1}}", "leaves out 'domain'"),
    "instructions without data": (
        "data: {documents: .}\nmix: {parts: {domain: 1, instructions: 1}}",
        "data.instructions",
    ),
    "task with a typo": ("demo: 8\ntasks: [d2qa, d2sop]", "did you mean 'd2spo'"),
    "task that needs people": ("demo: 8\ntasks: text2sql", "without annotated rows: d2qa, d2spo"),
    "task is a number": ("demo: 8\ntasks: 3", "'tasks' is 3, but must be a list of tasks"),
    "tasks are a section": ("demo: 8\ntasks: {d2qa: 1}", "must be a list of tasks"),
    "way to select with a typo": ("demo: 8\nselect: {by: densty}", "did you mean 'density'"),
    "zero epochs": ("demo: 8\nmix: {epochs: 0}", "above 0"),
    "share above one": ("demo: 8\ncorpus: {held_out: 1.5}", "between 0 and 1"),
    "method": ("demo: 8\npretrain: {method: qlora2}", "full, lora or qlora"),
    "quantization": ("demo: 8\nquantize: {types: [q3_k]}", "q8_0"),
    "seed is text": ("demo: 8\nseed: abc", "whole number"),
    "demo too small": ("demo: 1", "8 to 20000"),
    "demo in a language that it does not have": ("demo: {lang: fr}", "'demo.lang' is 'fr', but must be en or zh"),
    "demo is a word": ("demo: zh", "'demo.entities' is 'zh', but must be a whole number from 8"),
    "demo with a typo": ("demo: {entitis: 8}", "did you mean 'entities'"),
    "documents missing": ("data: {documents: /no/such/folder}", "/no/such/folder"),
    "questions missing": ("demo: 8\ndata: {questions: nope.jsonl}", "nope.jsonl"),
    "nothing to train": ("demo: 8\npretrain: false\nsft: false", "nothing is left to train"),
    "only false": ("false", "the recipe must be a set of 'name: value' lines"),
    "corpus off": ("demo: 8\ncorpus: false", "only pretrain, sft, quantize can be switched off"),
    "select off": ("demo: 8\nselect: false", "only pretrain, sft, quantize"),
    "data off": ("data: false", "only pretrain, sft, quantize"),
    "everything trained is off": ("demo: 8\npretrain: false\nsft: false", "nothing is left to train"),
    "trust is text": ("demo: 8\ntrust_remote_code: sure", "true or false"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_recipe(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names = RECIPES[case]
    (tmp_path / "r.yaml").write_text(text)
    status, err = call(capsys, "run", "r.yaml")
    assert status == 2 and names in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]  # refused before anything is written


QUESTIONS = {
    "one choice": ([{"question": "a?", "choices": ["x"], "answer": 0}], "at least 2"),
    "answer out of range": ([QUESTION, {**QUESTION, "answer": 2}], "answer"),
    "answer is a letter": ([{**QUESTION, "answer": "B"}], "index"),
    "no question": ([{"choices": ["1", "2"], "answer": 0}], "question"),
    "empty question": ([{**QUESTION, "question": " "}], "empty"),
    "choices are a text": ([{**QUESTION, "choices": "12"}], "list"),
    "same choice twice": ([{**QUESTION, "choices": ["4", "4"]}], "twice"),
    "malformed line": ([QUESTION, "{broken"], "line 2"),
    "empty file": ([], "no question"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_wrong_questions(case, tmp_path, capsys, tiny_folder):
    rows, names = QUESTIONS[case]
    status, err = call(capsys, "eval", tiny_folder, "--questions", lines(tmp_path / "q.jsonl", rows))
    assert status == 2 and names in err and "q.jsonl" in err


def test_missing_questions(tmp_path, capsys, tiny_folder):
    status, err = call(capsys, "eval", tiny_folder, "--questions", tmp_path / "none.jsonl")
    assert status == 2 and "none.jsonl" in err


def no_template(folder, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder, folder)
    for name in ("chat_template.jinja",):
        (folder / name).unlink(missing_ok=True)
    cfg = json.loads((folder / "tokenizer_config.json").read_text())
    cfg.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    "name, names",
    [
        ("smolm2-135m-instruct", "did you mean"),
        ("/no/such/model", "no model"),
        ("no-org/no-model-here", "cannot load"),
        ("EMPTY", "config.json"),
        ("FILE", "not a model folder"),
        ("TRUNCATED", "cannot load"),
        ("NOTOKENIZER", "tokenizer"),
    ],
)
def test_wrong_model(name, names, tmp_path, capsys, tiny_folder):
    import shutil

    target = tmp_path / name
    if name == "EMPTY":
        target.mkdir()
    if name == "FILE":
        target.write_text("x")
    if name == "TRUNCATED":
        shutil.copytree(tiny_folder, target)
        with open(target / "model.safetensors", "r+b") as f:
            f.truncate(1000)
    if name == "NOTOKENIZER":
        shutil.copytree(tiny_folder, target)
        for p in target.glob("*token*"):
            p.unlink()
    status, err = call(capsys, "eval", target if target.exists() else name)
    assert status == 2 and names in err


def test_sft_needs_a_chat_template(tmp_path, capsys, tiny_folder):
    no_template(tmp_path / "base", tiny_folder)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(model=str(tmp_path / "base"), demo=8)))
    status, err = call(capsys, "run", tmp_path / "r.yaml")
    assert status == 2 and "no chat template" in err


# Documents


def corpus(capsys, *argv):
    return call(capsys, "corpus", *argv)


def test_no_documents(tmp_path, capsys):
    assert corpus(capsys, tmp_path)[0] == 2
    (tmp_path / "a.xyz").write_text("x")
    status, err = corpus(capsys, tmp_path)
    assert status == 2 and str(tmp_path) in err


GOOD = "The relief valve of the machine opens at forty bar and closes at thirty-eight. " * 6
BROKEN = {
    "unreadable.pdf": b"%PDF-1.7 this is not a PDF",
    "empty.pdf": b"",
    "broken.docx": b"PK\x03\x04 no archive",
    "binary.txt": bytes(range(256)) * 20,
    "endless.txt": b"A" * 1_500_000,
    "line.jsonl": b'{"text": "' + GOOD.encode() + b'"}\n{"text": \n{"other": 1}\n',
    "unknown.xyz": b"x",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_and_the_rest_is_read(name, tmp_path, capsys):
    (tmp_path / "good.md").write_text(GOOD)
    (tmp_path / name).write_bytes(BROKEN[name])
    status = cli.main(["corpus", str(tmp_path), "--out", str(tmp_path / "out.jsonl"), "--min-chars", "100"])
    said = capsys.readouterr()
    assert status == 3 and name in said.out and "skipped" in said.out and "Traceback" not in said.err
    assert "relief valve" in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize("encoding", ["utf-16", "gb18030", "utf-8-sig", "cp1252"])
def test_encodings_are_read(encoding, tmp_path, capsys):
    text = {
        "gb18030": "潮汐船闸的安全阀在四十巴时打开，操作人员必须记录压力。" * 8,
        "cp1252": "Der Überdruck beträgt 40 bar, größer als früher. " * 8,
    }.get(encoding, GOOD)
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert cli.main(["corpus", str(tmp_path), "--out", str(tmp_path / "o.jsonl")]) == 0
    assert text[:20] in json.loads((tmp_path / "o.jsonl").read_text())["text"]


def test_corpus_option_out_of_range(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(GOOD)
    status, err = corpus(capsys, tmp_path, "--near-duplicate", "7")
    assert status == 2 and "--near-duplicate" in err


def test_everything_too_short(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("short")
    assert corpus(capsys, tmp_path)[0] == 2


# Output and environment


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a file system that refuses")
def test_no_write_permission(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("demo: 8")
    status, err = call(capsys, "run", tmp_path / "r.yaml", "--output", "/proc/domain_llm")
    assert status == 2 and "/proc/domain_llm" in err


def test_output_is_a_file(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("demo: 8")
    (tmp_path / "out").write_text("x")
    status, err = call(capsys, "run", tmp_path / "r.yaml", "--output", tmp_path / "out")
    assert status == 2 and str(tmp_path / "out") in err and (tmp_path / "out").read_text() == "x"


def test_full_disk_at_the_start(tmp_path, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    (tmp_path / "r.yaml").write_text("demo: 8")
    status, err = call(capsys, "run", tmp_path / "r.yaml", "--output", tmp_path / "out")
    assert status == 2 and "free" in err


def test_full_disk_while_writing(tmp_path, capsys):
    "A real file that may not grow: the limit on file size makes the write fail as a full disk does."
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from domain_llm import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(20):
        (docs / f"{i}.txt").write_text(f"Document {i}. " + GOOD.replace("forty", f"{i} times {i + 3}"))
    out = tmp_path / "kept.jsonl"
    out.write_text("the old result\n")
    p = subprocess.run(
        [sys.executable, "-c", code, "corpus", str(docs), "--near-duplicate", "0.99", "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert p.returncode == 2 and "Traceback" not in p.stderr and "kept.jsonl" in p.stderr
    assert out.read_text() == "the old result\n" and [q.name for q in tmp_path.iterdir() if "part" in q.name] == []


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), True),
        (ValueError("x"), False),
    ],
)
def test_a_full_disk_is_recognised_in_any_library(error, full):
    assert disk_full(error) is full


def test_port_in_use(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        status, err = call(capsys, "serve", tmp_path / "m.gguf", "--port", port)
    assert status == 2 and f"port {port} on 127.0.0.1 cannot be opened" in err and "--port" in err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--allow-origin", "http://a.example", "--allow-origin", "http://b.example"], "only one"),
        (["--context", "0"], "--context is 0"),
        (["--slots", "0"], "--slots is 0"),
        (["--api-key", ""], "API key"),
    ],
)
def test_serve_refuses(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DOMAIN_LLM_API_KEY", raising=False)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    status, err = call(capsys, "serve", tmp_path / "m.gguf", *options)
    assert status == 2 and said in err


def test_serve_help_warns_of_keys_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    out = capsys.readouterr().out
    assert "DOMAIN_LLM_API_KEY" in out and "list of processes" in out


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize("what", ["missing", "empty folder", "not a GGUF"])
def test_nothing_to_talk_to(command, what, tmp_path, capsys):
    target = tmp_path / "x"
    if what == "empty folder":
        target.mkdir()
    if what == "not a GGUF":
        target.write_bytes(b"hello" * 100)
    status, err = call(capsys, command, target)
    assert status == 2 and str(target) in err


def test_init_does_not_overwrite(tmp_path, capsys):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text(GOOD)
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious")
    status, err = call(capsys, "init", docs, "--recipe", mine)
    assert status == 2 and "exists already" in err and mine.read_text() == "precious"
    assert call(capsys, "init", tmp_path / "none", "--recipe", tmp_path / "b.yaml")[0] == 2


def test_recipe_missing_or_binary(tmp_path, capsys):
    assert call(capsys, "run", tmp_path / "none.yaml")[0] == 2
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert call(capsys, "run", tmp_path / "b.yaml")[0] == 2


def test_unknown_command_teaches():
    p = subprocess.run(["domain-llm", "trian"], capture_output=True, text=True)
    assert p.returncode == 2 and "run" in p.stderr


def test_eval_compares_two_models(tmp_path, capsys, tiny_folder):
    q = lines(tmp_path / "q.jsonl", [QUESTION, {**QUESTION, "question": "What is 1+3?"}])
    assert (
        cli.main(
            [
                "eval",
                str(tiny_folder),
                "--questions",
                str(q),
                "--versus",
                str(tiny_folder),
                "--json",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    assert "95% interval" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["change"]["diff"] == 0


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), "cuda"],
)
def test_running_out_of_memory_gives_advice(error, capsys, monkeypatch):
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory.") if error == "cuda" else error

    def full(a):
        raise error

    monkeypatch.setattr(commands, "run", full)
    status, err = call(capsys, "run")
    assert status == 2 and "memory ran out" in err and "lora" in err


def test_eval_holds_one_model_at_a_time(tmp_path, capsys, tiny_folder, monkeypatch):
    "The first model of a comparison is let go before the second is loaded."
    import gc
    import shutil
    import weakref

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    real, alive = models.load, []

    def load(*args, **kw):
        gc.collect()
        assert not [m for m in alive if m() is not None]
        model, tok = real(*args, **kw)
        alive.append(weakref.ref(model))
        return model, tok

    monkeypatch.setattr(commands, "load", load)
    assert cli.main(["eval", str(tiny_folder), "--versus", str(copy), "--limit", "3"]) == 0
    assert len(alive) == 2


def test_a_mistyped_path_is_no_hub_set(tmp_path, capsys):
    (tmp_path / "manuals" / "standards").mkdir(parents=True)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for text in (
        "data: {documents: manuals/standrads}",
        "demo: 8\ndata: {questions: manuals/standrads}",
        "demo: 8\ndata: {general: ['manuals/standrads:part']}",
    ):
        (tmp_path / "r.yaml").write_text(text)
        status, err = call(capsys, "run", tmp_path / "r.yaml")
        assert status == 2 and "did you mean 'manuals/standards'" in err
    (tmp_path / "r.yaml").write_text("demo: 8\nmodel: models/mein")
    status, err = call(capsys, "run", tmp_path / "r.yaml")
    assert status == 2 and "did you mean 'models/mine'" in err


def test_names_on_the_hub_work_for_every_role(tmp_path, monkeypatch):
    "With the hub's answer replaced: OWNER/NAME and OWNER/NAME:SUBSET, for every role."
    import datasets

    asked = []
    rows = dict(
        text=["A page about pumps, long enough to be a document of its own."] * 3,
        question=["Q"] * 3,
        choices=[["a", "b"]] * 3,
        answer=[0] * 3,
        messages=[[dict(role="user", content="Q"), dict(role="assistant", content="A")]] * 3,
    )

    def load_dataset(repo, name=None, split=None, **kw):
        asked.append((repo, name, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    given = {role: f"owner/{role}:part" for role in ROLES}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(data=given, output="out")))
    cfg, out = opened(tmp_path / "r.yaml")
    found = read_inputs(cfg, out)
    assert all(found[role] >= 1 for role in ROLES)
    assert {(repo, name) for repo, name, _ in asked} == {(f"owner/{role}", "part") for role in ROLES}


def test_check_refuses_what_would_fail_hours_later(tmp_path, capsys, tiny_folder):
    "A system turn in a template that knows none, a step below a row: both at once, before anything is trained."
    import shutil

    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    tok = AutoTokenizer.from_pretrained(model)
    tok.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tok.save_pretrained(model)
    rows = [dict(messages=[dict(role="user", content="How fast?"), dict(role="assistant", content="Slowly.")])] * 3
    rows[1] = dict(messages=[dict(role="system", content="Be brief."), *rows[0]["messages"]])
    lines(tmp_path / "answers.jsonl", rows)
    (tmp_path / "docs").mkdir()
    for i in range(12):
        (tmp_path / "docs" / f"{i}.md").write_text(
            f"Page {i} is about pump {i}, which is checked every {i + 2} days by its keeper. " * 5
        )
    cfg = dict(
        model="model",
        output="out",
        data=dict(documents="docs", instructions="answers.jsonl"),
        pretrain=dict(length=128, tokens_per_step=64),
        quantize=False,
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    for command in ("check", "run"):
        status, err = call(capsys, command, tmp_path / "r.yaml")
        assert status == 2 and "answers.jsonl, row 2" in err and "pretrain.tokens_per_step is 64" in err
    assert not (tmp_path / "out" / "pretrain").exists() and not (tmp_path / "out" / "baseline").exists()


@pytest.fixture
def answering(tmp_path, tiny_folder):
    "A recipe with two conversations, the second with a system turn and a long answer, and a few pages."
    talk = [dict(role="user", content="多少巴？"), dict(role="assistant", content="40 bar.")]
    long = [dict(role="system", content="Be brief."), talk[0], dict(role="assistant", content="Forty. " * 90 + "End")]
    lines(tmp_path / "answers.jsonl", [dict(messages=talk), dict(messages=long)])
    (tmp_path / "docs").mkdir()
    for i in range(12):
        (tmp_path / "docs" / f"{i}.md").write_text(f"Page {i} is about pump {i}, checked every {i + 2} days. " * 6)
    data = dict(documents="docs", instructions="answers.jsonl")
    evaluate = dict(probe_tokens=200, questions=4)
    cfg = dict(model=str(tiny_folder), output="out", data=data, evaluate=evaluate, quantize=False)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    return tmp_path / "r.yaml"


def test_check_says_how_conversations_are_trained_and_shows_the_first(answering, capsys):
    status, out = said_by(capsys, "check", answering)
    flat = " ".join(out.split())
    assert status == 0 and "2 answers in 2 conversations: before each, training has the prompt of a server" in flat
    assert "Generation stops there." in flat and "1 of 2 conversations replace the model's own system prompt" in flat
    assert "answers.jsonl, row 1, as the model reads it" in flat and "--show N" in flat
    assert "<|im_start|>user↵\n多少巴？<|im_end|>↵\n<|im_start|>assistant↵\n[[40·bar.<|im_end|>]]↵" in out


def test_check_shows_any_conversation_whole_and_measures_nothing(answering, capsys):
    status, out = said_by(capsys, "check", answering, "--show", 2)
    assert status == 0 and "answers.jsonl, row 2, as the model reads it" in out
    assert "<|im_start|>system↵\nBe·brief.<|im_end|>↵" in out and "Forty.·" * 90 + "End<|im_end|>]]" in out
    assert not (answering.parent / "out" / "baseline").exists() and "format:" not in out
    for number, words in ((3, "there is no conversation 3. Choose one from 1 to 2"), (0, "there is no conversation 0")):
        status, err = call(capsys, "check", answering, "--show", number)
        assert status == 2 and words in err


def test_a_recipe_without_conversations_has_none_to_show(answering, capsys):
    cfg = yaml.safe_load(answering.read_text())
    del cfg["data"]["instructions"]
    answering.write_text(yaml.safe_dump(cfg))
    status, err = call(capsys, "check", answering, "--show", 1)
    assert status == 2 and "no conversations to show" in err


def test_a_run_is_refused_whose_conversations_would_be_asked_in_another_format(answering, tiny_folder, capsys):
    "The template writes no marker when it is asked for an answer."
    import shutil

    from transformers import AutoTokenizer

    model = answering.parent / "model"
    shutil.copytree(tiny_folder, model)
    tok = AutoTokenizer.from_pretrained(model)
    tok.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tok.save_pretrained(model)
    answering.write_text(answering.read_text().replace(str(tiny_folder), "model"))
    status, err = call(capsys, "run", answering)
    assert status == 2 and "'<|im_start|>assistant' before an answer, but not when it asks for one" in err
    assert not (answering.parent / "out" / "baseline").exists()


def test_check_reads_what_the_run_then_uses(tmp_path, capsys, tiny_folder, monkeypatch):
    (tmp_path / "docs").mkdir()
    for i in range(12):
        (tmp_path / "docs" / f"{i}.md").write_text(
            f"Page {i} is about pump {i}, which is checked every {i + 2} days by its keeper. " * 5
        )
    cfg = dict(
        model=str(tiny_folder),
        output="out",
        data=dict(documents="docs"),
        mix=dict(tokens=1000),
        pretrain=dict(length=64, tokens_per_step=64, probes=1),
        evaluate=dict(probe_tokens=200, questions=10),
        quantize=False,
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    assert cli.main(["check", str(tmp_path / "r.yaml")]) == 0
    said = capsys.readouterr().out
    assert "worth:" in said and "disk:" in said and "memory:" in said
    monkeypatch.setattr(inputs, "read_documents", lambda *a, **kw: pytest.fail("read again"))
    metrics = run_recipe(tmp_path / "r.yaml")
    assert "Quantized files" not in (tmp_path / "out" / "report.html").read_text() and metrics["domain_bpb_after"]


def test_check_of_a_chinese_demo_finds_nothing_amiss(tmp_path, capsys, tiny_folder):
    cfg = dict(demo=dict(entities=8, lang="zh"), model=str(tiny_folder), output="out", quantize=False)
    small = dict(length=1024, tokens_per_step=1024, probes=1)
    cfg |= dict(pretrain=small, sft=small, evaluate=dict(probe_tokens=200, questions=10))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(cfg))
    assert cli.main(["check", str(tmp_path / "r.yaml")]) == 0
    said = capsys.readouterr().out
    assert "the run can start" in said and "warning" not in said and "error" not in said


# Commands for what the modules know


def said_by(capsys, *argv):
    "Exit status and stdout of a command."
    status = cli.main([str(a) for a in argv])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("said", ["3M", "3000000", "3,000,000", "3e6", "3_000k"])
def test_mix_advises_from_a_number_of_tokens(said, capsys):
    "The advice is that of `recommend_ratio`, and its line for the recipe is one that a recipe takes."
    status, out = said_by(capsys, "mix", said)
    found = recommend_ratio(3e6)
    assert status == 0 and "about 3,000,000 tokens" in out and all(reason in out for reason in found["reasons"])
    (line,) = [line for line in out.splitlines() if line.strip().startswith("mix: ")]
    cfg = check_recipe({"demo": 8, **yaml.safe_load(line)})
    assert cfg["mix"]["parts"] == found["parts"]
    assert "ChatHome, 13B" in out and "113 questions" in out


def test_mix_refuses_a_unit_that_it_does_not_know(capsys):
    status, err = call(capsys, "mix", "3MB")
    assert status == 2 and "neither a folder nor a number of tokens" in err


def test_init_keeps_a_folder_whose_name_is_a_word_of_the_template(tmp_path, capsys):
    (tmp_path / "SCHEMA" / "NAME").mkdir(parents=True)
    (tmp_path / "SCHEMA" / "NAME" / "a.txt").write_text("The valve opens at 40 bar.")
    init_recipe(tmp_path / "SCHEMA" / "NAME", tmp_path / "r.yaml")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["data"]["documents"] == "SCHEMA/NAME"


def test_mix_counts_a_folder_at_four_bytes_a_token(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("a valve " * 1000)  # 8,000 bytes with the last space
    out = said_by(capsys, "mix", tmp_path)[1]
    tokens = int(out.split()[1].replace(",", ""))
    assert abs(tokens - 6000) <= 3


def test_mix_asks_for_more_general_text_after_a_strong_shift(capsys):
    weak, strong = (said_by(capsys, "mix", "900M", *more)[1] for more in ([], ["--strong-shift"]))
    assert "start with 1:0.053" in weak and "start with 1:0.33" in strong and "Ibrahim et al., 2024" in weak


@pytest.mark.parametrize("said", ["manuels", "-3", "0", "inf", "nan", "M"])
def test_mix_refuses_what_is_no_size(said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, err = call(capsys, "mix", *(["--", said] if said.startswith("-") else [said]))
    assert status == 2 and "neither a folder nor a number of tokens" in err and said in err


def exam_file(tmp_path, n=200, **more):
    rows = [dict(question=f"How fast is pump {i}?", choices=["1 rpm", "2 rpm"], answer=i % 2, **more) for i in range(n)]
    return lines(tmp_path / "exam.jsonl", rows)


def test_questions_says_what_an_exam_can_show(tmp_path, capsys):
    status, out = said_by(capsys, "questions", exam_file(tmp_path))
    assert status == 0 and "200 questions in 200 groups" in out
    assert "guessing gets 50.0%" in out and "A 50%, B 50%" in out
    assert "to 7% either way" in out  # 1.96 * sqrt(0.25 / 200) = 6.9%
    assert f"differ by {detectable(200):.0%}" in out
    assert "one group gives no interval" in said_by(capsys, "questions", exam_file(tmp_path, group="pumps"))[1]
    assert "write more questions" in said_by(capsys, "questions", exam_file(tmp_path, n=5))[1]


@pytest.mark.parametrize("case", QUESTIONS)
def test_questions_names_what_is_wrong(case, tmp_path, capsys):
    rows, names = QUESTIONS[case]
    status, err = call(capsys, "questions", lines(tmp_path / "q.jsonl", rows))
    assert status == 2 and names in err and "q.jsonl" in err


def test_a_task_for_lm_eval_overwrites_no_questions_of_the_users(tmp_path, capsys):
    own = tmp_path / "tasks" / "pumps_test.jsonl"
    own.parent.mkdir()
    own.write_text("mine")
    words = ("questions", exam_file(tmp_path), "--lm-eval", own.parent, "--name", "pumps")
    assert call(capsys, *words)[0] == 2 and own.read_text() == "mine"


def test_questions_writes_a_task_for_lm_eval(tmp_path, capsys):
    exam = exam_file(tmp_path, n=4)
    status, out = said_by(capsys, "questions", exam, "--lm-eval", tmp_path / "tasks", "--name", "pumps")
    task = yaml.safe_load((tmp_path / "tasks" / "pumps.yaml").read_text())
    assert status == 0 and task["task"] == "pumps" and "--tasks pumps" in out
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert [r["answer"] for r in rows] == [0, 1, 0, 1]
    for options, words in (
        (["--lm-eval", tmp_path / "tasks"], "needs --name"),
        (["--name", "pumps"], "--lm-eval FOLDER"),
        (["--lm-eval", tmp_path / "tasks", "--name", "1 2"], "cannot be the name"),
        (["--lm-eval", tmp_path / "tasks", "--name", "pumps"], "exists already"),
    ):
        status, err = call(capsys, "questions", exam, *options)
        assert status == 2 and words in err
    assert call(capsys, "questions", exam, "--lm-eval", tmp_path / "tasks", "--name", "pumps", "--force")[0] == 0


def test_corpus_lists_the_most_similar_pairs(tmp_path, capsys):
    "The share of a pair is the Jaccard similarity of the runs of 24 letters, here computed with plain sets."
    words = [f"word{i}" for i in range(120)]
    texts = {"a": words, "b": [*words[:110], *(f"other{i}" for i in range(10))], "c": [f"far{i}" for i in range(120)]}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(" ".join(text))
    status, out = said_by(capsys, "corpus", tmp_path, "--pairs", "--near-duplicate", "0.5")
    joined = {name: "".join(text) for name, text in texts.items()}
    shingles = {name: {t[i : i + 24] for i in range(len(t) - 23)} for name, t in joined.items()}
    both, either = shingles["a"] & shingles["b"], shingles["a"] | shingles["b"]
    (line,) = [line for line in out.splitlines() if "a.txt" in line]
    assert status == 0 and "1 pairs of 3 documents" in out and line.split()[0] == f"{len(both) / len(either):.0%}"
    assert "b.txt" in line and "c.txt" not in out
    assert call(capsys, "corpus", tmp_path, "--pairs", "0")[0] == 2
    status, err = call(capsys, "corpus", tmp_path, "--pairs", "--out", tmp_path / "kept.jsonl")
    assert status == 2 and "writes none" in err


def test_pairs_are_cut_at_the_number_asked_for(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(GOOD)
    out = said_by(capsys, "corpus", tmp_path, "--pairs", "2")[1]
    assert "6 pairs of 4 documents" in out and out.count("100%") == 2 and "and 4 more" in out


def test_schema_is_printed_for_an_editor(capsys):
    status, out = said_by(capsys, "schema")
    schema = json.loads(out)
    assert status == 0 and schema == json.loads((Path(cli.__file__).parent / "assets/recipe.schema.json").read_text())
    assert schema["properties"]["seed"]["type"] == "integer"


def test_init_names_the_schema_for_editors(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text(GOOD)
    assert call(capsys, "init", "docs")[0] == 0
    first = (tmp_path / "recipe.yaml").read_text().splitlines()[0]
    named = Path(first.partition("$schema=")[2])
    assert first.startswith("# yaml-language-server: ") and json.loads(named.read_text())["title"] == "Recipe"


@pytest.mark.parametrize(
    "command, words",
    [
        ("mix", ["4 bytes a token", "forget", "ablate mix"]),
        ("questions", ["lm-evaluation-harness", "index"]),
        ("corpus", ["--pairs", "shingles"]),
        ("schema", ["default"]),
        ("run", ["resumes from its last checkpoint"]),
        ("check", ["--show N", "[[At·125·bar.<|im_end|>]]↵", "system prompt", "a dot is a space"]),
    ],
)
def test_help_teaches(command, words, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(word in out for word in words)
