"""Recipes that do as published works did: the checker takes them, and what they say was measured is in the records."""

import re
from importlib.resources import files

import pytest

from domain_llm import cli
from domain_llm.data.mix import PUBLISHED
from domain_llm.results import load_result
from domain_llm.run.recipe import PRESETS, init_recipe, read_recipe


@pytest.fixture
def folder(tmp_path):
    docs = tmp_path / "manuals"
    docs.mkdir()
    (docs / "a.txt").write_text("The relief valve opens at 40 bar.\n" * 20)
    return docs


@pytest.mark.parametrize("like", PRESETS)
def test_a_preset_is_a_recipe_for_the_folder(like, folder, tmp_path):
    assert cli.main(["init", str(folder), "--recipe", str(tmp_path / "r.yaml"), "--like", like]) == 0
    cfg = read_recipe(tmp_path / "r.yaml")
    assert cfg["data"]["documents"] == [str(folder)] and cfg["name"] == "manuals"


def test_presets_do_what_the_works_did(folder, tmp_path):
    def recipe(like):
        return read_recipe(init_recipe(folder, tmp_path / f"{like}.yaml", force=True, like=like))

    def share(like, source):
        parts = recipe(like)["mix"]["parts"]
        return parts.get(source, 0) / sum(parts.values())

    general = {row["name"]: row["general"] for row in PUBLISHED}
    assert share("bloomberggpt", "general") == pytest.approx(general["BloombergGPT"], abs=0.02)
    parts = recipe("chathome")["mix"]["parts"]
    assert parts["general"] / (parts["general"] + parts["domain"]) == pytest.approx(general["ChatHome"])
    assert parts["instructions"] > 0 and recipe("chathome")["sft"]
    assert share("glm130b", "instructions") == 0.05 and recipe("glm130b")["sft"] is None
    alpaca = recipe("alpaca")
    assert alpaca["pretrain"] is None and alpaca["sft"]["method"] == "full" and alpaca["sft"]["epochs"] == 3


def preset(like):
    "The text of a preset, its comment lines joined."
    text = (files("domain_llm") / "assets" / "presets" / f"{like}.yaml").read_text(encoding="utf-8")
    return re.sub(r"\n# ", " ", text)


def claim(record, text):
    return next(c for c in load_result(record)["claims"] if c["text"] == text)


def test_presets_quote_the_records():
    one = claim("ablate_mix", "replay at 1:1 keeps general text better than no replay")
    assert f"{-one['diff']:.2f} bits per byte ({-one['high']:.2f} to {-one['low']:.2f})" in preset("bloomberggpt")
    cost = claim("ablate_mix", "at equal tokens, 1:1 costs domain accuracy against no replay")
    assert cost["verdict"].startswith("not resolved") and "not resolved" in preset("bloomberggpt")
    five = claim("ablate_mix", "replay at 1:5 keeps general text better than 1:1")
    said = f"{-five['diff']:.2f} bits per byte better ({-five['low']:.2f} better to {five['high']:.2f} worse"
    assert said in preset("chathome") and five["verdict"].startswith("not resolved")
    mip = claim("mip", "questions among the documents teach more than questions afterwards")
    points, low, high = (round(100 * mip[key]) for key in ("diff", "low", "high"))
    for like in ("chathome", "glm130b"):
        assert f"{points} points more ({low} to {high})" in preset(like)
    for samples in (16, 64):
        lead = claim("start", f"{samples} samples teach a chat model more than its base")
        points, low, high = (round(100 * lead[key]) for key in ("diff", "low", "high"))
        assert re.search(rf"{points}( points)? \({low} to {high}\)", preset("alpaca"))


def test_every_preset_names_its_source_and_what_differs():
    for like in PRESETS:
        text = preset(like)
        assert all(part in text for part in ("Source: ", "What differs: ", "Measured here"))
        assert "arXiv" in text or "https://" in text


def test_an_unknown_work_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        init_recipe(folder, tmp_path / "r.yaml", like="alpacca")
    assert not (tmp_path / "r.yaml").exists()
