import sys
from collections import Counter
from pathlib import Path

import pytest

from domain_llm.core import InputError, read_json
from domain_llm.demo.facts import LANGS, demo_strings
from domain_llm.demo.lab import as_instructions, make_lab, stated_facts, with_wrong_answers
from domain_llm.models import chat, load
from domain_llm.run import training
from domain_llm.run.pipeline import run_recipe
from domain_llm.small_world import SMALL_WORLDS, small_model, small_tokenizer

ROOT = Path(__file__).resolve().parent.parent
both = pytest.mark.parametrize("lang", LANGS)


@both
def test_every_document_states_the_four_facts_of_its_machine_and_no_others(lang):
    lab, values = make_lab(seed=3, entities=20, renderings=5, lang=lang), {}
    for q in lab["questions"]:
        values.setdefault(q["group"], {})[q["attribute"]] = q["value"]
    assert len(values) == 20 and all(len(own) == 4 for own in values.values())
    named = Counter(d["source"] for d in lab["documents"])
    assert set(named.values()) == {5} and set(named) == set(values)
    for d in lab["documents"]:
        assert all(value in d["text"] for value in values[d["source"]].values())
        assert not any(other in d["text"] for other in values if other != d["source"])


@both
def test_stated_facts_are_values_of_the_machine_that_was_named_before(lang):
    lab = make_lab(seed=2, entities=20, renderings=6, lang=lang)
    values = {(q["group"], q["value"]) for q in lab["questions"]}
    texts = {d["text"] for d in lab["documents"]}
    facts = stated_facts(lab["documents"], lab["questions"])
    assert len(facts) > 0.7 * 20 * 6 * 4
    for fact in facts:
        assert (fact["group"], fact["value"]) in values and fact["group"] in fact["before"]
        assert any(text.startswith(fact["before"] + fact["value"]) for text in texts)


@both
def test_only_taught_machines_are_in_the_conversations(lang):
    lab = make_lab(seed=1, entities=20, renderings=1, wordings=8, lang=lang)
    part = {q["group"]: q["part"] for q in lab["questions"]}
    assert Counter(part.values()) == {"taught": 10, "held-out": 10}
    text = " ".join(turn["content"] for row in lab["instructions"] for turn in row["messages"])
    assert {m for m in part if m in text} == {m for m in part if part[m] == "taught"}
    assert len(lab["instructions"]) == 10 * 4 * 8 and len(lab["questions"]) == 20 * 4 * 8
    asked = [q["question"] for q in lab["questions"]]
    assert len(set(asked)) == len(asked)


@both
def test_values_are_equally_frequent_so_that_guessing_gives_one_in_ten(lang):
    strings = demo_strings(lang)["attributes"]
    lab = make_lab(entities=100, renderings=1, wordings=1, lang=lang)
    for a in strings:
        counts = Counter(q["value"] for q in lab["questions"] if q["attribute"] == a)
        assert set(counts) == set(strings[a]["values"]) and max(counts.values()) - min(counts.values()) <= 1


@both
def test_one_wording_gives_equal_documents_and_many_give_different_ones(lang):
    one = make_lab(entities=8, renderings=4, one_wording=True, lang=lang)["documents"]
    many = make_lab(entities=8, renderings=4, lang=lang)["documents"]
    assert len({d["text"] for d in one}) == 8 and len({d["text"] for d in many}) > 24


def test_seeds_redraw_names_values_and_halves():
    a, b = make_lab(seed=0, entities=20, renderings=1), make_lab(seed=1, entities=20, renderings=1)
    assert a == make_lab(seed=0, entities=20, renderings=1)
    assert {q["group"] for q in a["questions"]} != {q["group"] for q in b["questions"]}


@both
def test_wrong_answers_keep_the_form_and_are_wrong(lang):
    questions = make_lab(seed=2, entities=20, renderings=1, lang=lang)["questions"]
    wrong = with_wrong_answers(questions, seed=0)
    right = {q["question"]: q for q in questions}
    assert {w["question"] for w in wrong} == set(right)
    for w in wrong:
        q = right[w["question"]]
        assert w["value"] != q["value"] and w["reference"] == q["reference"].replace(q["value"], w["value"])
    rows = as_instructions(wrong)
    assert rows[0]["messages"][1] == dict(role="assistant", content=wrong[0]["reference"])


def test_an_answer_that_nobody_else_gives_otherwise_has_no_wrong_one():
    question = make_lab(entities=8, renderings=1)["questions"][0]
    with pytest.raises(InputError, match="more machines"):
        with_wrong_answers([question])


@pytest.mark.parametrize("name", SMALL_WORLDS)
def test_training_goes_back_to_the_weights_that_it_started_from(name):
    "Interpolation asks for the weights before training: those of the run's seed."
    before = training._weights(name, dict(seed=1, trust_remote_code=False, chat_model=None))
    want = dict(small_model(small_tokenizer(SMALL_WORLDS[name]), 1).named_parameters())
    assert all((before[name] == want[name]).all() for name in want)


@pytest.mark.parametrize("wrong", [dict(entities=7), dict(renderings=0), dict(wordings=9), dict(wordings=0)])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(InputError, match="8 entities"):
        make_lab(**wrong)


@both
def test_the_tokenizer_is_what_its_script_makes_and_loses_nothing(lang):
    sys.path.insert(0, str(ROOT / "tools"))
    import make_small_world

    assert make_small_world.FILES[lang].read_text(encoding="utf-8") == make_small_world.train(lang) + "\n"
    tok = small_tokenizer(lang)
    for text in ("The Turner 66 takes corn oil.", "液压油：全角，１２３。", "a\n\tb  <x> é", "12345 kg"):
        assert tok.decode(tok(text).input_ids) == text
    assert len(tok("12345").input_ids) == 5


def test_a_chinese_world_needs_a_third_of_the_tokens_with_its_own_tokenizer():
    texts = [row["text"] for row in make_lab(entities=20, renderings=2, lang="zh")["documents"]]
    en, zh = (sum(len(ids) for ids in small_tokenizer(lang)(texts).input_ids) for lang in LANGS)
    assert 2.5 * zh < en and zh < sum(map(len, texts))


@pytest.mark.parametrize("name", SMALL_WORLDS)
def test_small_world_loads_like_any_model_and_seeds_draw_weights(name):
    model, tok = load(name)
    assert tok.get_vocab() == small_tokenizer(SMALL_WORLDS[name]).get_vocab()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    a, b = small_model(tok, 0), small_model(tok, 1)
    same = [(x == y).all() for x, y in zip(model.parameters(), a.parameters())]
    assert all(same) and any((x != y).any() for x, y in zip(a.parameters(), b.parameters()))
    assert len(chat(model, tok, ["What?"], max_new_tokens=3)) == 1


def test_a_recipe_trains_the_small_world_from_weights_of_its_seed(tmp_path, in_32_bits):
    "Two seeds of one recipe start from other weights, so one step of hardly any rate leaves them different."
    from safetensors.torch import load_file

    weights = []
    for seed in (0, 1):
        text = f"""
model: small-world
seed: {seed}
demo: 8
sft: false
quantize: false
mix: {{parts: {{domain: 1}}, tokens: 300}}
pretrain: {{learning_rate: 1e-9, probes: 1, length: 128, tokens_per_step: 512}}
evaluate: {{questions: 8, probe_tokens: 100}}
"""
        (tmp_path / "r.yaml").write_text(text)
        run_recipe(tmp_path / "r.yaml", tmp_path / f"out{seed}")
        weights.append(load_file(tmp_path / f"out{seed}" / "pretrain" / "model" / "model.safetensors"))
        assert read_json(tmp_path / f"out{seed}" / "metrics.json")
    start = dict(small_model(small_tokenizer(), 1).named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[1][name] - start[name]).abs().max() < 1e-5 < (weights[0][name] - start[name]).abs().max()
