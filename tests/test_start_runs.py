"""Whole runs of a small base model and its chat model: each start, killed and resumed, by names on the hub."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.pairs import is_sum, weights
from transformers import AutoTokenizer

from domain_llm import cli
from domain_llm.core import read_json
from domain_llm.run import keep, training
from domain_llm.run.pipeline import final_model, run_recipe
from domain_llm.run.recipe import check_recipe, model_stages
from domain_llm.run.stages import stages


def recipe(pair, **more):
    "A small recipe of the demo for a pair."
    small = dict(length=128, tokens_per_step=256, probes=1, learning_rate=3e-3, rank=4, forgetting_budget=100)
    return (
        dict(
            name="small",
            demo=8,
            model=str(pair["base"]),
            chat_model=str(pair["chat"]),
            mix=dict(parts=dict(domain=1), tokens=1500),
            pretrain=dict(small, method="full"),
            sft=dict(small, method="lora", length=256, epochs=0.3),
            evaluate=dict(questions=8, probe_tokens=100),
            quantize=False,
        )
        | more
    )


def run(folder, given, out="out"):
    "Run a recipe; gives the folder of the run."
    (folder / "r.yaml").write_text(yaml.safe_dump(given))
    run_recipe(folder / "r.yaml", folder / out)
    return folder / out


@pytest.fixture(scope="module")
def from_chat(pair, tmp_path_factory):
    "A whole run, an adapter trained on the base model and then one on the chat model: its recipe, its folder."
    given, folder = recipe(pair), tmp_path_factory.mktemp("from_chat")
    given["pretrain"]["method"] = "lora"
    given["sft"]["start"] = "chat"
    return given, run(folder, given)


def test_a_start_from_the_chat_model_brings_what_pretraining_changed(pair, tok, from_chat):
    "The adapter of pre-training is merged first; that of fine-tuning belongs to the sum."
    _, out = from_chat
    assert is_sum(out / "sft" / "base", out / "pretrain" / "model", pair)
    assert read_json(final_model(out) / "adapter_config.json")["base_model_name_or_path"] == str(out / "sft" / "base")
    assert AutoTokenizer.from_pretrained(final_model(out)).chat_template == tok.chat_template
    reads = read_json(out / "sft" / "manifest.json")["reads"]
    assert "history" not in reads  # general text is compared with the chat model, where this training starts
    start = read_json(out / "sft" / "history.json")[0]
    assert start["step"] == 0 and start["general_bpb"] != read_json(out / "pretrain" / "history.json")[0]["general_bpb"]


def test_the_chat_vector_is_added_to_what_was_trained_last(pair, tmp_path, capsys):
    given = recipe(pair, chat_vector=True)
    out = run(tmp_path, given)
    assert final_model(out) == out / "chat_vector" / "model" and is_sum(final_model(out), out / "sft" / "model", pair)
    assert read_json(out / "evaluate" / "manifest.json")["reads"]["model"] == "chat_vector/model"
    assert "chat vector was added" in (out / "MODEL_CARD.md").read_text()
    capsys.readouterr()
    run(tmp_path, given)
    said = capsys.readouterr().out
    assert said.count("unchanged, skipped") == len(stages(check_recipe(given | dict(output=str(out)))))
    assert not list(Path(out).rglob("*.part")) and model_stages(check_recipe(given))[-1] == "chat_vector"


def tree(folder):
    "The files of a run, but for its private folder."
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if keep.PRIVATE not in p.parts}


def test_killed_at_random_moments_it_ends_the_same(from_chat, runs, tmp_path):
    (given, whole), rng = from_chat, random.Random(0)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    for _ in range(3):
        runs.run(tmp_path / "r.yaml", tmp_path / "cut", rng.uniform(0.5, 5))
    ended = runs.run(tmp_path / "r.yaml", tmp_path / "cut")
    assert ended == "exit 0", Path(f"{tmp_path / 'cut'}.log").read_text()[-2000:]
    for name in ("sft/base", "sft/model"):
        one, other = (weights(out / name) for out in (whole, tmp_path / "cut"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert tree(whole) == tree(tmp_path / "cut")


def test_cut_in_the_middle_of_a_sum_it_begins_that_again(pair, tmp_path, monkeypatch):
    real = training.add_chat_vector

    def cut(tuned, base, chat, out, trust):
        (Path(out).parent / "model.abc.part").mkdir()  # what a killed process leaves
        raise KeyboardInterrupt

    given = recipe(pair, chat_vector=True, sft=False)
    monkeypatch.setattr(training, "add_chat_vector", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, given)
    monkeypatch.setattr(training, "add_chat_vector", real)
    monkeypatch.setattr(training, "train", lambda *args, **kw: pytest.fail("trained again"))
    out = run(tmp_path, given)
    assert is_sum(final_model(out), out / "pretrain" / "model", pair) and not list(out.rglob("*.part"))


@pytest.fixture
def hub(pair, tmp_path):
    "A hub cache that holds the pair as owner/base and owner/chat; gives its environment."
    for name, folder in pair.items():
        made = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, made / "snapshots" / "abc")
        (made / "refs").mkdir()
        (made / "refs" / "main").write_text("abc")
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_a_pair_on_the_hub_runs_by_its_names(pair, hub, tmp_path):
    given = recipe(dict(base="owner/base", chat="owner/chat"), pretrain=False, chat_vector=True)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    argv = ["domain-llm", "run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")]
    done = subprocess.run(argv, env=hub, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    adapter = tmp_path / "out" / "sft" / "model"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == "owner/base"
    local = shutil.copytree(adapter, tmp_path / "adapter")
    said = read_json(local / "adapter_config.json") | dict(base_model_name_or_path=str(pair["base"]))
    (local / "adapter_config.json").write_text(json.dumps(said))
    assert is_sum(tmp_path / "out" / "chat_vector" / "model", local, pair)


def test_the_three_starts_are_compared_by_the_shipped_experiment(pair, tmp_path, capsys):
    given = recipe(pair, evaluate=dict(questions=40, probe_tokens=100))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    argv = ["ablate", "start", "--recipe", tmp_path / "r.yaml", "--seeds", "1", "--output", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 0, capsys.readouterr().err[-2000:]
    result = read_json(tmp_path / "out" / "result.json")
    assert list(result["runs"]) == ["base", "chat", "chat vector"] and result["chat_model"] == "chat"
    figures = [result["runs"][arm]["0"]["general_bpb"]["values"] for arm in result["runs"]]
    assert figures[0] != figures[1] != figures[2] and result["arms"]["chat"]["sft"]["start"] == "chat"
    assert not [name for name in ("sft", "chat_vector") if (tmp_path / "out" / name).exists()]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({k: v for k, v in given.items() if k != "chat_model"}))
    assert cli.main([str(a) for a in argv]) == 2 and "names no chat model" in capsys.readouterr().err
