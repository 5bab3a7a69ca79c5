"""The method that a recipe leaves open: by the model's size and the card, kept with the run."""

import pytest
import yaml

from domain_llm.core import fingerprint
from domain_llm.run import experiments, keep, method
from domain_llm.run.families import family_size, known_model
from domain_llm.run.method import keep_methods, method_notes, suited, with_methods
from domain_llm.run.pipeline import opened
from domain_llm.run.recipe import check_recipe
from domain_llm.run.settings import identifying
from domain_llm.run.stages import only
from domain_llm.train.loop import TRAIN_DEFAULTS

SEVEN = "Qwen/Qwen2.5-7B-Instruct"  # its weights take 15.2 GB in 16 bits
SIZE = family_size(known_model(SEVEN))


def recipe(**more):
    return check_recipe({"demo": 8, "output": "/data/run", **more})


def card(monkeypatch, gb, kind="cuda"):
    monkeypatch.setattr(method, "this_device", lambda: dict(kind=kind, free=gb * 1e9, half=2))


@pytest.mark.parametrize(
    "kind, gb, wanted", [("cuda", 80, "lora"), ("cuda", 16, "qlora"), ("cuda", 8, "qlora"), ("cpu", 8, "lora")]
)
def test_from_a_billion_on_an_adapter_and_4_bits_where_the_weights_alone_fill_the_card(kind, gb, wanted):
    for stage in ("pretrain", "sft"):
        found, why = suited(recipe()[stage], SIZE, dict(kind=kind, free=gb * 1e9, half=2))
        assert found == wanted and "7.6 billion parameters" in why
        assert (f"{gb}.0 GB are free" in why) == (kind == "cuda")


def test_below_a_billion_each_stage_has_its_own_default():
    for parameters, wanted in ((999_999_999, "full"), (1_000_000_000, "lora")):
        size = {**SIZE, "parameters": parameters}
        assert suited(TRAIN_DEFAULTS, size, dict(kind="cpu", free=1e12, half=2))[0] == wanted
    assert suited(recipe()["sft"], {**SIZE, "parameters": 1e8}, dict(kind="cpu", free=1, half=2))[0] == "lora"


def test_runs_of_the_demo_model_keep_the_fingerprints_that_they_had(tmp_path):
    "Those of the version before methods could be left open; results that are there stay good."
    cfg = with_methods(recipe(), tmp_path)
    assert (cfg["pretrain"]["method"], cfg["sft"]["method"]) == ("full", "lora")
    marks = {s: fingerprint(identifying(only(cfg, ("model", "vocab", s, "seed")))) for s in ("pretrain", "sft")}
    assert marks == dict(pretrain="6704296743e655fc", sft="5ebc3c1a8dafa359")


def test_a_stated_method_is_never_changed(tmp_path, monkeypatch):
    card(monkeypatch, 8)
    cfg = recipe(model=SEVEN, pretrain=dict(method="full"), sft=dict(method=None))
    found = with_methods(cfg, tmp_path)
    assert (found["pretrain"]["method"], found["sft"]["method"]) == ("full", "qlora")
    (said,) = (note["said"] for note in method_notes(found))
    assert "sft states no method and takes qlora" in said and "sft: {method: NAME}" in said
    off = with_methods(recipe(model=SEVEN, pretrain=False, sft=dict(method="full")), tmp_path)
    assert off["pretrain"] is None and off["method_open"] == {}


def test_a_resumed_run_keeps_its_method_on_another_card(tmp_path, monkeypatch):
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(dict(demo=8, model=SEVEN, pretrain=dict(probes=2))))
    card(monkeypatch, 80)
    first, _ = opened(path, out)
    assert (first["pretrain"]["method"], first["sft"]["method"]) == ("lora", "lora")
    card(monkeypatch, 8)
    assert opened(path, out)[0] == first
    path.write_text(yaml.safe_dump(dict(demo=8, model=SEVEN, pretrain=dict(method="qlora"))))
    again, _ = opened(path, out)
    assert (again["pretrain"]["method"], again["sft"]["method"]) == ("qlora", "lora")
    path.write_text(yaml.safe_dump(dict(demo=8, model="Qwen/Qwen2.5-14B-Instruct")))
    assert opened(path, out)[0]["pretrain"]["method"] == "qlora"


def test_a_model_that_cannot_be_looked_up_leaves_the_recipe_as_it_is(tmp_path):
    cfg = recipe(model="nobody/nothing")
    assert with_methods(cfg, tmp_path) == {**cfg, "method_open": {}}


def test_experiments_on_a_large_model_train_adapters(tmp_path, monkeypatch):
    card(monkeypatch, 80)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(dict(demo=8, model=SEVEN)))
    _, cfg, out = experiments._opened("mix", path, 1000, tmp_path / "out")
    assert cfg["pretrain"]["method"] == "lora"
    assert (out / keep.PRIVATE / "methods.json").exists()


def test_what_is_kept_is_of_the_stages_that_were_open(tmp_path, monkeypatch):
    card(monkeypatch, 80)
    keep.claim(tmp_path)
    keep_methods(with_methods(recipe(model=SEVEN, sft=dict(method="full")), tmp_path), tmp_path)
    card(monkeypatch, 8)
    found = with_methods(recipe(model=SEVEN), tmp_path)
    assert (found["pretrain"]["method"], found["sft"]["method"]) == ("lora", "qlora")
