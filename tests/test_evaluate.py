"""Evaluation: exact sums, trees against plain texts, lm-eval's picks, statistics by hand, readers and bad input."""

import gc
import importlib.util
import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import record_cmmlu
import torch

from domain_llm.core import InputError
from domain_llm.demo.general import common_questions
from domain_llm.demo.world import make_world
from domain_llm.judge import choice, stats
from domain_llm.judge.choice import asked_prompts, by_part, circular, multiple_choice, permute, question_paths, rate
from domain_llm.judge.lm_eval import export_lm_eval
from domain_llm.judge.plots import compare_plot
from domain_llm.judge.questions import check_questions, exam_summary, read_questions
from domain_llm.judge.retention import retention
from domain_llm.judge.score import (
    _parts,
    _score,
    _takes_trees,
    bits_per_byte,
    pack_trees,
    tree,
    tree_mask,
    value_bits,
)
from domain_llm.judge.screen import screen, screen_plot
from domain_llm.judge.stats import accuracy_interval, difference, paired, ratio_interval, said_interval, wilson
from domain_llm.models import load, load_tokenizer, tiny

ROOT = Path(__file__).resolve().parent.parent
MCQ = ROOT.parent / "shared/data/mcq"
QUESTIONS = [
    dict(
        question="Who wrote Hamlet?",
        choices=["William Shakespeare", "William the Conqueror", "Jane Austen"],
        answer=0,
        group="a",
    ),
    dict(question="What is 2 + 2?", choices=["4", "22"], answer=0, group="b"),
    dict(question="中国的首都是哪里?", choices=["上海", "北京", "广州市"], answer=1, group="c"),
    dict(
        question="Which unit has torque?\nChoose one.",
        choices=["newton", "newton metre", "newton metre per second", "newton"[::-1]],
        answer=1,
        group="d",
    ),
]


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model(tok):
    return tiny(tok)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_evaluate", ROOT / "tools/bench_evaluate.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def one_by_one(model, ids, start):
    "Log-likelihood of ids[start:], predicted a token at a time from the text alone."
    total = 0.0
    for i in range(start, len(ids)):
        with torch.no_grad():
            total += float(model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]])
    return total


def lm_eval_or_skip():
    pytest.importorskip("lm_eval")


# --- bits of a value


def test_bits_of_a_value_are_those_of_all_its_tokens(model, tok):
    before, value = "The relief valve opens at ", "145.5 bar"
    start, end = len(tok(before).input_ids), len(tok(before + value).input_ids)
    assert end - start > 3
    by_hand = -one_by_one(model, tok(before + value).input_ids, start) / math.log(2)
    got = value_bits(
        model, tok, [dict(before=before, value=value, group="valve"), dict(before="a b", value="c", group=2)]
    )
    assert got["groups"] == ["valve", 2] and got["values"][0] == pytest.approx(by_hand, rel=1e-5)


def test_a_chinese_value_begins_at_its_first_byte(model, tok):
    before, value = "闸门的密封材料是", "橡胶"
    ids = tok(before + value).input_ids
    starts = [i for i in range(len(ids)) if tok.decode(ids[:i]) == before]
    got = value_bits(model, tok, [dict(before=before, value=value, group=0)])["values"][0]
    assert got == pytest.approx(-one_by_one(model, ids, starts[0]) / math.log(2), rel=1e-5)


@pytest.mark.parametrize("before, value", [("", "cotton"), ("The", "")])
def test_a_fact_without_text_or_value_is_refused(model, tok, before, value):
    with pytest.raises(InputError, match="text before its value"):
        value_bits(model, tok, [dict(before=before, value=value, group=0)])


# --- bits per byte


def test_bits_per_byte_by_hand(model, tok):
    texts = ["The valve opens at 45 N·m.", "阀门每年检查一次。", "a", "", "🙂 mixed 文字 text"]
    got = bits_per_byte(model, tok, texts, per_doc=True)
    nats = [-one_by_one(model, [tok.bos_token_id] + tok(t).input_ids, 1) for t in texts if t]
    size = [len(t.encode()) for t in texts if t]
    assert got["bytes"] == sum(size) and got["tokens"] == sum(len(tok(t).input_ids) for t in texts)
    assert got["bpb"] == pytest.approx(sum(nats) / sum(size) / math.log(2), rel=1e-5)
    assert [b for _, b in got["docs"]] == size
    assert [n for n, _ in got["docs"]] == pytest.approx(nats, rel=1e-5)
    assert got["low"] < got["bpb"] < got["high"]


def test_first_token_without_bos(model):
    tok = load_tokenizer()
    tok.bos_token = None
    got = bits_per_byte(model, tok, ["ab"])
    assert got["bpb"] * 2 * math.log(2) == pytest.approx(
        -one_by_one(model, [tok.eos_token_id] + tok("ab").input_ids, 1), rel=1e-5
    )


def test_windows_follow_the_stated_rule(model, tok):
    text = "one two three four five six seven eight nine ten"
    ids, length, total = [tok.bos_token_id] + tok(text).input_ids, 4, 0.0
    for i in range(0, len(ids) - 1, length):
        end = min(i + length, len(ids) - 1)
        begin = max(0, end - length)
        total -= one_by_one(model, ids[begin : end + 1], i - begin + 1)
    assert (len(ids) - 1) % length  # the last window is a short one
    assert bits_per_byte(model, tok, [text], length=length)["bpb"] * len(text) * math.log(2) == pytest.approx(
        total, rel=1e-5
    )


def test_documents_do_not_see_each_other(model, tok):
    texts = ["alpha beta", "gamma delta epsilon zeta", "eta"]
    alone = [bits_per_byte(model, tok, [t], per_doc=True)["docs"][0][0] for t in texts]
    assert [
        n for n, _ in bits_per_byte(model, tok, [dict(text=t) for t in texts], per_doc=True)["docs"]
    ] == pytest.approx(alone, rel=1e-5)


def test_max_tokens_cuts_and_counts_the_cut_text(model, tok):
    text = "The gauge is read every morning. 每天早上读表。" * 20
    got = bits_per_byte(model, tok, [text, "never reached"], max_tokens=50, per_doc=True)
    assert 40 <= got["tokens"] <= 60 and len(got["docs"]) == 1
    assert text.encode()[: got["bytes"]].decode()  # whole characters
    assert bits_per_byte(model, tok, [text], max_tokens=10**6)["bytes"] == len(text.encode())


def test_no_text(model, tok):
    for docs in ([], ["", ""]):
        with pytest.raises(InputError, match="no text"):
            bits_per_byte(model, tok, docs)


def test_rolling_equals_lm_eval(model, tok):
    lm_eval_or_skip()
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = ["The cat sat on the mat. " * 12, "水在一百摄氏度沸腾。", "a"]
    lm = HFLM(pretrained=model, tokenizer=tok, batch_size=1, max_length=32)
    want = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), 0) for t in texts], disable_tqdm=True)
    assert [-n for n, _ in bits_per_byte(model, tok, texts, length=32, per_doc=True)["docs"]] == pytest.approx(
        want, rel=1e-5
    )


# --- trees


def test_tree_merges_common_prefixes():
    tokens, parents, nodes = tree([[1, 2, 3], [1, 2, 4], [1, 2], [5]])
    assert tokens == [1, 2, 3, 4, 5] and parents == [-1, 0, 1, 1, -1] and nodes == [[0, 1, 2], [0, 1, 3], [0, 1], [4]]
    mask, depth = tree_mask(parents, 6)
    assert list(depth) == [0, 1, 2, 2, 0, 0]
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_tree_scores_equal_one_at_a_time(model, tok, budget):
    got = multiple_choice(model, tok, QUESTIONS, batch_tokens=budget)
    for q, scores in zip(QUESTIONS, got["loglik"]):
        prompt = f"Question: {q['question']}\nAnswer:"
        want = [one_by_one(model, tok(f"{prompt} {c}").input_ids, len(tok(prompt).input_ids)) for c in q["choices"]]
        assert scores == pytest.approx(want, abs=1e-3)


def test_questions_share_a_row_and_a_beginning(model, tok):
    shots = "".join(f"Question: What is {i} + {i}?\nAnswer: {2 * i}\n\n" for i in range(8))
    questions = [
        dict(question=f"What is {i} + 1?", choices=[f"{i + 1}", f"{i} or more", f"{i}"], answer=0) for i in range(30)
    ]
    trees = [question_paths(tok, f"{shots}Question: {q['question']}\nAnswer:", q["choices"], 2048) for q in questions]
    groups = pack_trees(trees)
    assert sorted(i for g in groups for i in g) == list(range(30)) and len(groups) < 8
    merged = [len(tree([ids[:-1] for i in g for ids, _ in trees[i]])[0]) for g in groups]
    assert sum(merged) < 0.5 * sum(len(tree([ids[:-1] for ids, _ in t])[0]) for t in trees)
    got = multiple_choice(model, tok, questions, template=shots + "Question: {question}\nAnswer:")["loglik"]
    for t, scores in list(zip(trees, got))[::7]:
        assert scores == pytest.approx([x for (x,) in _score(model, _parts(model), [[p] for p in t])], abs=1e-3)


def test_mask_is_needed_and_used(model, tok):
    trees = [question_paths(tok, "Question: Who?\nAnswer:", QUESTIONS[0]["choices"], 2048)]
    assert _takes_trees(model, _parts(model), trees)

    class Deaf(torch.nn.Module):  # ignores the mask
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.device = model, model.config, model.device

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, use_cache=False, **kw):
            return self.inner(input_ids=input_ids, use_cache=False)

    deaf = Deaf()
    assert not _takes_trees(deaf, _parts(deaf), trees)
    assert multiple_choice(deaf, tok, QUESTIONS)["loglik"][0] == pytest.approx(
        multiple_choice(model, tok, QUESTIONS)["loglik"][0], abs=1e-3
    )


def test_model_that_refuses_a_mask_falls_back(model, tok):
    class Strict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.device = model, model.config, model.device

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, use_cache=False):
            return self.inner(input_ids=input_ids, use_cache=False)

    assert multiple_choice(Strict(), tok, QUESTIONS)["picks"] == multiple_choice(model, tok, QUESTIONS)["picks"]


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def test_sliding_window_model(tok):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    m = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tok),
            **SMALL,
            sliding_window=6,
        )
    ).eval()
    got = multiple_choice(m, tok, QUESTIONS[:2])
    for q, scores in zip(QUESTIONS, got["loglik"]):
        prompt = f"Question: {q['question']}\nAnswer:"
        assert scores == pytest.approx(
            [one_by_one(m, tok(f"{prompt} {c}").input_ids, len(tok(prompt).input_ids)) for c in q["choices"]], abs=1e-3
        )


def test_softcapped_logits(tok):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    m = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(tok),
            **SMALL,
            head_dim=16,
            final_logit_softcapping=0.05,
            sliding_window=4096,
            attn_implementation="eager",
        )
    ).eval()
    assert _parts(m) is None
    q = QUESTIONS[0]
    prompt = f"Question: {q['question']}\nAnswer:"
    assert multiple_choice(m, tok, [q])["loglik"][0] == pytest.approx(
        [one_by_one(m, tok(f"{prompt} {c}").input_ids, len(tok(prompt).input_ids)) for c in q["choices"]], abs=1e-3
    )


def test_eager_attention_and_bfloat16(tok):
    m = tiny(tok)
    want = multiple_choice(m, tok, QUESTIONS)["loglik"]
    m.set_attn_implementation("eager")
    for a, b in zip(multiple_choice(m, tok, QUESTIONS)["loglik"], want):
        assert a == pytest.approx(b, abs=1e-3)
    for a, b in zip(multiple_choice(tiny(tok).to(torch.bfloat16), tok, QUESTIONS)["loglik"], want):
        assert a == pytest.approx(b, rel=0.05)


def test_peft_model(tok):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    for config in (
        LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        torch.manual_seed(1)
        m = get_peft_model(tiny(tok), config).eval()
        got = multiple_choice(m, tok, QUESTIONS[:2])["loglik"]
        for q, scores in zip(QUESTIONS, got):
            prompt = f"Question: {q['question']}\nAnswer:"
            assert scores == pytest.approx(
                [one_by_one(m, tok(f"{prompt} {c}").input_ids, len(tok(prompt).input_ids)) for c in q["choices"]],
                abs=1e-3,
            )
        assert (
            abs(got[0][0] - multiple_choice(tiny(tok), tok, QUESTIONS[:1])["loglik"][0][0]) > 1e-3
        )  # the adapter counts
        text = "Torque 45"
        assert bits_per_byte(m, tok, [text])["bpb"] == pytest.approx(
            -one_by_one(m, [tok.bos_token_id] + tok(text).input_ids, 1) / len(text) / math.log(2), rel=1e-4
        )


def test_long_prompts_lose_their_beginning(tok):
    assert question_paths(tok, "one two three four five", ["six seven"], 4) == [
        (ids := tok("one two three four five six seven").input_ids[-5:], len(ids) - 2)
    ]
    with pytest.raises(InputError, match="takes 2"):
        question_paths(tok, "one", ["two three four five"], 2)


# --- multiple choice


def level(scores, most=1e-3):
    return np.diff(np.sort(scores)[-2:])[0] < most  # the two best options, within rounding


@pytest.mark.parametrize("name", ["demo", "mmlu", "cmmlu"])
def test_picks_equal_lm_eval(model, tok, bench, name):
    lm_eval_or_skip()
    if name == "demo":
        rows = make_world()["mcq"] + common_questions()
    elif not MCQ.is_dir():
        pytest.skip("no shared/data")
    elif name == "mmlu":
        rows = [r for r in bench.mmlu(100) if len(r["question"]) < 250][:15]
    else:
        rows = read_questions(MCQ / "cmmlu/nutrition_test.csv")[:12]
    ref = bench.lm_eval_run(model, tok, rows)
    got, norm = multiple_choice(model, tok, rows), multiple_choice(model, tok, rows, norm="chars")
    sure = [i for i, scores in enumerate(ref["loglik"]) if not level(scores)]
    assert [got["picks"][i] for i in sure] == [ref["picks"][i] for i in sure] and len(sure) > 0.95 * len(rows)
    per_char = [[s / len(c) for s, c in zip(scores, q["choices"])] for scores, q in zip(ref["loglik"], rows)]
    assert not [
        i for i, (a, b) in enumerate(zip(norm["picks"], ref["picks_norm"])) if a != b and not level(per_char[i])
    ]
    for a, b in zip(got["loglik"], ref["loglik"]):
        assert a == pytest.approx(b, abs=1e-3)


def test_picks_equal_lm_eval_on_real_questions(bench):
    "The demo model in float32 on short MMLU questions; a pick may differ only where two options are level."
    lm_eval_or_skip()
    rows = sorted(
        bench.mmlu(10**6), key=lambda r: len(r["question"]) * len(r["choices"]) + sum(map(len, r["choices"]))
    )[:500:5]
    if len(rows) < 100:
        pytest.skip("no shared/data")
    model, tok = load()
    ref, got = bench.lm_eval_run(model, tok, rows, 16), multiple_choice(model, tok, rows)
    assert not [
        i
        for i, (a, b, scores) in enumerate(zip(ref["picks"], got["picks"], ref["loglik"]))
        if a != b and not level(scores, 2e-3)
    ]
    for a, b in zip(ref["loglik"], got["loglik"]):
        assert a == pytest.approx(b, abs=2e-3)
    assert 0.25 < got["accuracy"] < 0.6 and len(set(got["picks"])) == 4


@pytest.mark.parametrize("style", ["cloze", "letter"])
def test_shots_equal_lm_eval(model, tok, bench, style):
    lm_eval_or_skip()
    shots, rows = QUESTIONS[2:4], common_questions()[:6] + QUESTIONS[:2]  # 2 to 4 options
    ref = bench.lm_eval_run(model, tok, rows, style=style, shots=shots)
    got = multiple_choice(model, tok, rows, style=style, shots=shots)
    assert [p for p, _ in asked_prompts(rows, style, shots=shots)] == ref["prompts"] and got["picks"] == ref["picks"]
    for a, b in zip(got["loglik"], ref["loglik"]):
        assert a == pytest.approx(b, abs=1e-3)
    assert got["loglik"][0] != pytest.approx(multiple_choice(model, tok, rows[:1], style=style)["loglik"][0], abs=1e-3)


def test_the_right_options_share_is_its_softmax(model, tok):
    got = multiple_choice(model, tok, QUESTIONS)
    for q, p, scores in zip(QUESTIONS, got["prob"], got["loglik"]):
        assert p == pytest.approx(float(torch.tensor(scores, dtype=torch.float64).softmax(0)[q["answer"]]), rel=1e-9)


def test_shots_by_hand(model, tok):
    shot = dict(question="What is 3 + 3?", choices=["33", "6"], answer=1)
    ((cloze, _),) = asked_prompts(QUESTIONS[1:2], "cloze", shots=[shot])
    ((letter, competing),) = asked_prompts(QUESTIONS[1:2], "letter", shots=[shot])
    assert cloze == "Question: What is 3 + 3?\nAnswer: 6\n\nQuestion: What is 2 + 2?\nAnswer:"
    assert (
        letter == "Question: What is 3 + 3?\nA. 33\nB. 6\nAnswer: B\n\nQuestion: What is 2 + 2?\nA. 4\nB. 22\nAnswer:"
        and competing == ["A", "B"]
    )
    got = multiple_choice(model, tok, QUESTIONS[1:2], shots=[shot])["loglik"][0]
    assert got == pytest.approx(
        [one_by_one(model, tok(f"{cloze} {c}").input_ids, len(tok(cloze).input_ids)) for c in ("4", "22")], abs=1e-3
    )


def test_faulty_shots(model, tok):
    turned = dict(QUESTIONS[1], choices=QUESTIONS[1]["choices"][::-1], answer=1)
    with pytest.raises(InputError, match="question 2 .*gives its answer away"):
        multiple_choice(model, tok, QUESTIONS, shots=[turned])
    with pytest.raises(InputError, match="shot 1: the answer is 7"):
        multiple_choice(model, tok, QUESTIONS[:1], shots=[dict(QUESTIONS[1], answer=7)])


# --- option order


def fake_choice(model, tok, questions, style="cloze", knows=()):
    "A reader that knows some questions and says A to the others."
    picks = [q["answer"] if q["question"] in knows else 0 for q in questions]
    return dict(picks=picks, correct=[p == q["answer"] for p, q in zip(picks, questions)])


def test_circular_by_hand(monkeypatch):
    monkeypatch.setattr(choice, "multiple_choice", fake_choice)
    r = circular(None, None, QUESTIONS, knows={QUESTIONS[2]["question"]})  # options 3, 2, 3, 4; right at 0, 0, 1, 1
    assert (
        r["correct"] == [False, False, True, False] and r["accuracy"] == 1 / 4 and (r["low"], r["high"]) == wilson(1, 4)
    )
    assert r["mean"] == pytest.approx((1 / 3 + 1 / 2 + 1 + 1 / 4) / 4) and r["single"] == 3 / 4 and r["n"] == 4
    assert r["chance"] == pytest.approx((1 / 27 + 1 / 4 + 1 / 27 + 1 / 256) / 4) and r["chance_one"] == pytest.approx(
        (1 / 3 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    )
    assert [p["letter"] for p in r["positions"]] == list("ABCD")
    assert [p["right"] for p in r["positions"]] == pytest.approx(
        [4 / 12, 4 / 12, 3 / 12, 1 / 12]
    )  # each question once at each of its positions
    assert [p["picked"] for p in r["positions"]] == pytest.approx([10 / 12, 1 / 12, 1 / 12, 0])
    assert all(p["low"] <= p["picked"] <= p["high"] for p in r["positions"])


def test_a_guess_is_right_in_all_rotations_as_often_as_chance_says(monkeypatch):
    rng = random.Random(0)

    def guess(model, tok, questions, style):
        picks = [rng.randrange(len(q["choices"])) for q in questions]
        return dict(picks=picks, correct=[p == q["answer"] for p, q in zip(picks, questions)])

    monkeypatch.setattr(choice, "multiple_choice", guess)
    many = [dict(question=str(i), choices=["a", "b"] if i % 2 else ["a", "b", "c"], answer=0) for i in range(6000)]
    r = circular(None, None, many)
    assert r["accuracy"] == pytest.approx(r["chance"], abs=0.015) and r["mean"] == pytest.approx(
        r["chance_one"], abs=0.015
    )


def test_circular_asks_every_rotation(model, tok):
    r = circular(model, tok, QUESTIONS, style="cloze")
    plain = multiple_choice(model, tok, QUESTIONS)
    assert r["accuracy"] == r["mean"] == r["single"] == plain["accuracy"] and r["correct"] == plain["correct"]
    q = QUESTIONS[0]
    texts = {asked_prompts([t], "letter")[0][0] for t in choice._rotations(q)}
    a, b, c = q["choices"]
    assert texts == {
        f"Question: {q['question']}\nA. {x}\nB. {y}\nC. {z}\nAnswer:" for x, y, z in ((a, b, c), (b, c, a), (c, a, b))
    }
    assert all(t["choices"][t["answer"]] == a for t in choice._rotations(q))
    assert circular(model, tok, QUESTIONS[:1])["mean"] == pytest.approx(
        np.mean([multiple_choice(model, tok, [t], style="letter")["accuracy"] for t in choice._rotations(q)])
    )


def test_circular_keeps_a_question_together(monkeypatch):
    monkeypatch.setattr(choice, "multiple_choice", fake_choice)
    rows = [dict(question=f"{i}", choices=["a", "b", "c", "d"], answer=i % 4) for i in range(30)]
    r = circular(None, None, rows, knows={str(i) for i in range(15)})
    assert r["groups"] == list(range(30)) and (r["low"], r["high"]) == wilson(15, 30)
    # A: a quarter of the known ones, all of the others; the interval is wider than that of 120 free picks
    share = 75 / 120
    first = r["positions"][0]
    assert first["picked"] == share and first["high"] - first["low"] > wilson(75, 120)[1] - wilson(75, 120)[0]


# --- tasks for lm-eval


def run_lm_eval(model, tok, folder, name):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    got = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tok, batch_size=4),
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return got["results"][name], [
        int(np.argmax([r[0][0] for r in s["resps"]])) for s in sorted(got["samples"][name], key=lambda s: s["doc_id"])
    ]


def test_exported_task_runs_in_lm_eval(model, tok, tmp_path, monkeypatch):
    lm_eval_or_skip()
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = QUESTIONS + [
        dict(question="When? {{x}} {% y %}", choices=["'\"", "it's"], answer=1)
    ]  # 2 to 4 options, quotes, template marks
    path = export_lm_eval(rows, tmp_path / "tasks", "domain_quiz")
    assert path == tmp_path / "tasks/domain_quiz.yaml" and sorted(p.name for p in path.parent.iterdir()) == [
        "domain_quiz.yaml",
        "domain_quiz_test.jsonl",
    ]
    found, picks = run_lm_eval(model, tok, path.parent, "domain_quiz")
    ours = multiple_choice(model, tok, rows)
    assert (
        picks == ours["picks"]
        and found["acc,none"] == ours["accuracy"]
        and found["acc_norm,none"] == multiple_choice(model, tok, rows, norm="chars")["accuracy"]
    )
    dates = [
        dict(question=f"In which year was treaty {i}?", choices=["1945-05-08", "1648-10-24"], answer=i % 2)
        for i in range(3)
    ]
    export_lm_eval(dates, tmp_path / "tasks", "domain_quiz")  # over the old one: no cached copy of it may be used
    assert run_lm_eval(model, tok, path.parent, "domain_quiz")[1] == multiple_choice(model, tok, dates)["picks"]


@pytest.mark.parametrize("name", ["", "a-b", "../x", "1st", "a b"])
def test_task_names(tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of a task"):
        export_lm_eval(QUESTIONS, tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_faulty_questions_are_not_exported(tmp_path):
    for rows in ([], [dict(QUESTIONS[0], answer=9)]):
        with pytest.raises(InputError, match="no questions|question 1"):
            export_lm_eval(rows, tmp_path, "quiz")
    with pytest.raises(InputError, match="cloze, letter"):
        export_lm_eval(QUESTIONS, tmp_path, "quiz", style="best")
    assert not list(tmp_path.iterdir())


def test_trailing_space_in_template_moves_to_the_option(model, tok):
    a, b = (multiple_choice(model, tok, QUESTIONS[:1], template=t)["loglik"] for t in ("{question}", "{question}  "))
    ids = tok(QUESTIONS[0]["question"] + "   " + "Jane Austen").input_ids
    assert b[0][2] == pytest.approx(one_by_one(model, ids, len(tok(QUESTIONS[0]["question"]).input_ids)), abs=1e-3)
    assert a != b


def test_order_of_options_does_not_matter_in_cloze(model, tok):
    mixed = permute(QUESTIONS, seed=3)
    assert [q["choices"] for q in mixed] != [q["choices"] for q in QUESTIONS]
    a, b = multiple_choice(model, tok, QUESTIONS), multiple_choice(model, tok, mixed)
    for q, m, x, y in zip(QUESTIONS, mixed, a["loglik"], b["loglik"]):
        assert m["choices"][m["answer"]] == q["choices"][q["answer"]]
        want = dict(zip(q["choices"], x))
        assert y == pytest.approx([want[c] for c in m["choices"]], abs=1e-3)
    assert a["correct"] == b["correct"]


def test_norms(model, tok):
    raw = multiple_choice(model, tok, QUESTIONS)
    for norm, size in (("raw", lambda c: 1), ("chars", len), ("bytes", lambda c: len(c.encode()))):
        got = multiple_choice(model, tok, QUESTIONS, norm=norm)
        assert got["picks"] == [
            int(np.argmax([s / size(c) for s, c in zip(ss, q["choices"])])) for ss, q in zip(raw["loglik"], QUESTIONS)
        ]


def test_letter_style(model, tok):
    q = QUESTIONS[1]
    prompt = "Question: What is 2 + 2?\nA. 4\nB. 22\nAnswer:"
    got = multiple_choice(model, tok, [q], style="letter")["loglik"][0]
    assert got == pytest.approx(
        [one_by_one(model, tok(f"{prompt} {c}").input_ids, len(tok(prompt).input_ids)) for c in "AB"], abs=1e-3
    )


def test_result_fields(model, tok):
    r = multiple_choice(model, tok, QUESTIONS)
    assert r["n"] == 4 and r["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert r["accuracy"] == sum(r["correct"]) / 4 and (r["low"], r["high"]) == wilson(sum(r["correct"]), 4)
    r = multiple_choice(model, tok, [dict(q, group=i // 2) for i, q in enumerate(QUESTIONS)])
    assert (r["low"], r["high"]) == accuracy_interval(r["correct"], [0, 0, 1, 1])


def test_braces_in_a_question_are_text(model, tok):
    multiple_choice(model, tok, [dict(question="f{x} = {0}?", choices=["{a}", "b"], answer=0)])


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(style="best"), "cloze, letter"),
        (dict(norm="tokens"), "raw, chars, bytes"),
        (dict(template="Answer:"), "leaves the question out"),
        (dict(template="{q}"), "Use {question}"),
        (dict(template="{question"), "does not work"),
    ],
)
def test_bad_arguments(model, tok, change, said):
    with pytest.raises(InputError) as e:
        multiple_choice(model, tok, QUESTIONS, **change)
    assert said in str(e.value)


def test_no_questions(model, tok):
    with pytest.raises(InputError, match="no questions"):
        multiple_choice(model, tok, [])


# --- questions from files

GOOD = dict(question="2 + 2?", choices=["3", "4"], answer=1)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(question=" "), "question is empty"),
        (dict(question=None), "no 'question'"),
        (dict(choices=["4"]), "at least 2"),
        (dict(choices="34"), "must be a list"),
        (dict(choices=["3", " "]), "choice is empty"),
        (dict(choices=["3", 4]), "not a text"),
        (dict(choices=["4", " 4"]), "twice"),
        (dict(answer=2), "numbered 0 to 1"),
        (dict(answer=-1), "numbered 0 to 1"),
        (dict(answer="B"), "counted from 0"),
        (dict(answer=True), "counted from 0"),
        (dict(answer=None), "no 'answer'"),
    ],
)
def test_faulty_rows(tmp_path, change, said):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, {**GOOD, **change}])))
    with pytest.raises(InputError) as e:
        read_questions(path)
    assert said in str(e.value) and "q.jsonl, question 2" in str(e.value)
    with pytest.raises(InputError, match="question 2"):
        check_questions([GOOD, {**GOOD, **change}])
    with pytest.warns(UserWarning, match="1 of 2"):
        assert len(read_questions(path, skip_faulty=True)) == 1


def test_jsonl(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(dict(GOOD, group="sums")) + "\n\n" + json.dumps(GOOD) + "\n", encoding="utf-8-sig")
    assert read_questions(path) == [dict(GOOD, group="sums"), dict(GOOD, group="q:2")]


def test_parts_are_kept_and_taken_apart(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        "\n".join(json.dumps(dict(GOOD, **more)) for more in (dict(part="taught"), dict(), dict(part="held-out")))
    )
    assert [q.get("part") for q in read_questions(path)] == ["taught", None, "held-out"]
    path.write_text(json.dumps(dict(GOOD, part=1)))
    with pytest.raises(InputError, match="part must be a text"):
        read_questions(path)


def test_by_part_is_the_accuracy_of_each_part():
    parts, groups = ["taught"] * 20 + ["held-out"] * 20 + [None] * 2, [i // 4 for i in range(42)]
    right = [True] * 15 + [False] * 5 + [True, False] * 10 + [True] * 2
    found = by_part(rate(right, groups), parts)
    assert (
        list(found) == ["taught", "held-out"]
        and [r["accuracy"] for r in found.values()] == [0.75, 0.5]
        and [r["n"] for r in found.values()] == [20, 20]
    )
    assert (found["taught"]["low"], found["taught"]["high"]) == accuracy_interval(right[:20], groups[:20])
    with pytest.raises(InputError, match="42 questions"):
        by_part(rate(right, groups), parts[:5])


def test_mmlu_csv(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        'question,choice0,choice1,choice2,choice3,answer\n"Two\nlines, quoted",a,b,c,d,3\nThree choices,a,b,c,,0\n'
    )
    assert read_questions(path) == [
        dict(question="Two\nlines, quoted", choices=list("abcd"), answer=3, group="m:1"),
        dict(question="Three choices", choices=list("abc"), answer=0, group="m:2"),
    ]
    path.write_text("question,choice0,choice1,answer\nq,a,b,0\nq,a,b,5\n")
    with pytest.raises(InputError, match=r"m.csv, question 2 \(ends on line 3\): the answer is 5"):
        read_questions(path)
    path.write_text("question,choice0,choice1,answer\nq,a,b\n")
    with pytest.raises(InputError, match="question 1"):
        read_questions(path)


def test_cmmlu_csv(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("\ufeff,Question,A,B,C,D,Answer\n0,中国的首都是,上海,北京,广州,深圳,B\n", encoding="utf-8")
    assert read_questions(path) == [
        dict(question="中国的首都是", choices=["上海", "北京", "广州", "深圳"], answer=1, group="c:1")
    ]
    path.write_text(",Question,A,B,C,D,Answer\n0,q,1,2,3,4,F\n")
    with pytest.raises(InputError, match="'F'"):
        read_questions(path)


OWN_CMMLU = """,Question,A,B,C,D,Answer
0,中国的首都是,上海,北京,广州,深圳,B
1,一年有多少个月,十个月,十一个月,十二个月,十三个月,C
2,“大”的反义词是,小,高,多,长,A
"""


def test_a_chinese_exam_with_permuted_options(model, tok, tmp_path):
    path = tmp_path / "own_test.csv"
    path.write_text(OWN_CMMLU, encoding="utf-8")
    rows = read_questions(path)
    how = dict(norm="bytes", template="问题：{question}\n答案：")
    own, other = (multiple_choice(model, tok, asked, **how) for asked in (rows, permute(rows, seed=3)))
    texts = [
        [q["choices"][pick] for q, pick in zip(asked, found["picks"])]
        for asked, found in ((rows, own), (permute(rows, seed=3), other))
    ]
    assert texts[0] == texts[1] and own["correct"] == other["correct"]  # no option sees another
    assert own["chance"] == 0.25 and own["groups"] == ["own_test:1", "own_test:2", "own_test:3"]
    turned = circular(model, tok, rows, template="问题：{question}\n{choices}\n答案：")
    assert turned["chance"] == 0.25**4 and [p["right"] for p in turned["positions"]] == [0.25] * 4


def test_the_subset_of_cmmlu_that_is_recorded(tmp_path):
    from statsmodels.stats.proportion import proportion_confint

    (tmp_path / "own_test.csv").write_text(OWN_CMMLU, encoding="utf-8")
    (tmp_path / "other.csv").write_text(OWN_CMMLU, encoding="utf-8")
    (tmp_path / "own_dev.csv").write_text("no questions", encoding="utf-8")
    rows = record_cmmlu.subset(tmp_path, [], 2)
    assert len(rows) == 4 and {row["group"].partition(":")[0] for row in rows} == {"own", "other"}
    assert rows == record_cmmlu.subset(tmp_path, [], 2)
    with pytest.raises(InputError, match="holds no law"):
        record_cmmlu.subset(tmp_path, ["law"], 2)
    least, draws = record_cmmlu.told_from_chance(200), np.random.default_rng(0)
    above = [
        np.mean([proportion_confint(k, 200, method="wilson")[0] > 0.25 for k in draws.binomial(200, p, 4000)])
        for p in (least - 0.01, least)
    ]
    assert above[0] < 0.81 and above[1] > 0.79


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.csv", b"a,b\n1,2\n", "header is a,b"),
        ("x.csv", b"", "header is empty"),
        ("x.csv", b"question,choice0,answer\n\xff,1,0\n", "UTF-8"),
        ("x.csv", b"question,choice0,choice1,answer\n", "has no questions"),
        ("x.jsonl", b"", "has no questions"),
        ("x.jsonl", b"{", "line 1"),
        ("x.txt", b"q", ".jsonl or .csv"),
        ("x.jsonl", b'{"question": "q", "choices": ["a"], "answer": 0}', "at least 2"),
    ],
)
def test_faulty_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as e:
        read_questions(tmp_path / name)
    assert said in str(e.value) and name in str(e.value)


def test_missing_file_and_all_faulty(tmp_path):
    for name in ("no.jsonl", "no.csv"):
        with pytest.raises(InputError, match="cannot read"):
            read_questions(tmp_path / name)
    (tmp_path / "q.jsonl").write_text(json.dumps(dict(GOOD, answer=9)))
    with pytest.warns(UserWarning), pytest.raises(InputError, match="every question is faulty"):
        read_questions(tmp_path / "q.jsonl", skip_faulty=True)


def test_real_files():
    if not MCQ.is_dir():
        pytest.skip("no shared/data")
    for p in sorted(MCQ.glob("*/*_test.csv")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = read_questions(p, skip_faulty=True)
        assert len(rows) >= 95 and all(len(r["choices"]) == 4 for r in rows)
    with pytest.raises(InputError, match="twice"):
        read_questions(MCQ / "mmlu/sociology_test.csv")


def test_exam_summary_by_hand():
    rows = [dict(question=f"{i}?", choices=list("abcd"), answer=i % 2, group=i // 4) for i in range(80)]
    rows += [dict(GOOD, group="sums"), dict(rows[0], choices=list("dcba")), dict(GOOD, answer=2)]
    r = exam_summary(rows)
    assert (r["number"], r["groups"], r["options"]) == (82, 21, {2: 1, 4: 81})
    assert r["chance"] == pytest.approx((81 / 4 + 1 / 2) / 82)
    assert r["positions"] == pytest.approx({"A": 41 / 82, "B": 41 / 82, "C": 0, "D": 0})
    assert r["detectable"] is None or r["detectable"] == stats.detectable(21)
    assert len(r["faults"]) == 2 and "82 is question 1" in r["faults"][0] and "83: the answer is 2" in r["faults"][1]
    many = [dict(GOOD, question=f"{i}?") for i in range(113)]
    assert exam_summary(many)["detectable"] == pytest.approx(0.117, abs=5e-4)  # without groups each is its own
    assert exam_summary([dict(q, group="one") for q in many])["detectable"] is None
    json.dumps([r, exam_summary(many)], allow_nan=False)
    with pytest.raises(InputError, match="no sound question"):
        exam_summary([dict(GOOD, answer=2)])


def test_questions_from_the_hub(monkeypatch):
    import datasets

    asked = []
    sets = {
        "cais/mmlu": [dict(question="Q?", subject="nutrition", choices=list("abcd"), answer=2)],
        "haonan-li/cmmlu": [dict(Question="Q?", A="a", B="b", C="c", D="d", Answer="C")],
        "x/text": [dict(text="no question")],
    }
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, subset, split, streaming: (
            asked.append((name, subset, split)) or datasets.Dataset.from_list(sets[name])
        ),
    )
    for name in ("cais/mmlu:nutrition", "haonan-li/cmmlu"):
        assert [(r["question"], r["choices"], r["answer"]) for r in read_questions(name)] == [("Q?", list("abcd"), 2)]
    assert asked == [("cais/mmlu", "nutrition", "test"), ("haonan-li/cmmlu", None, "test")]
    for name, says in (("x/text", "has the columns text"), ("x/absent", "neither a file here nor a data set")):
        with pytest.raises(InputError, match=says):
            read_questions(name)


# --- statistics


def test_wilson_known_values():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), Table I, method 3
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    for k, n in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(InputError):
            wilson(k, n)


def test_paired_is_the_paired_t_test():
    from scipy.stats import ttest_rel

    before = [1] * 50 + [0] * 50
    after = [1] * 48 + [0] * 2 + [1] * 9 + [0] * 41
    r, want = paired(before, after), ttest_rel(after, before)
    assert (r["gained"], r["lost"], r["diff"]) == (9, 2, pytest.approx(0.07))
    assert (r["low"], r["high"]) == pytest.approx(tuple(want.confidence_interval())) and r["p"] == pytest.approx(
        want.pvalue
    )
    same = paired(before, before)
    assert (same["diff"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_paired_by_group_is_the_t_test_of_the_groups():
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(0)
    before, after = rng.random((2, 80)) < [[0.4], [0.6]]
    want = ttest_1samp((after.astype(float) - before).reshape(8, 10).mean(1), 0)
    r = paired(before, after, np.repeat(np.arange(8), 10))
    assert (r["low"], r["high"], r["p"]) == pytest.approx((*want.confidence_interval(), want.pvalue))


def test_paired_needs_the_same_questions():
    for a, b in (([1], [1, 0]), ([], [])):
        with pytest.raises(InputError, match="same questions twice"):
            paired(a, b)


def test_interval_of_a_mean_is_the_t_interval():
    from scipy.stats import t

    x = np.random.default_rng(0).normal(3, 2, 12)
    assert ratio_interval(x) == pytest.approx(t.interval(0.95, 11, x.mean(), x.std(ddof=1) / 12**0.5))


def test_interval_of_a_ratio_by_hand():
    "Three documents: the ratio is 12 / 6 = 2, without one of them 11 / 5, 9 / 4 and 4 / 3; t(2) is 4.3027."
    se = math.sqrt(2 / 3 * (0.2**2 + 0.25**2 + (2 / 3) ** 2))
    assert ratio_interval([1, 3, 8], [1, 2, 3]) == pytest.approx((2 - 4.3027 * se, 2 + 4.3027 * se), rel=1e-4)


def test_a_ratio_keeps_pairs_together():
    size = np.array([1, 10, 100, 1000] * 20)
    assert ratio_interval(2.5 * size, size) == pytest.approx((2.5, 2.5))


def test_clusters_widen_the_interval():
    x = np.random.default_rng(0).integers(0, 2, 50)
    eight, facts = np.repeat(x, 8), np.repeat(np.arange(50), 8)
    free, tied = ratio_interval(eight), ratio_interval(eight, groups=facts)
    assert tied == pytest.approx(ratio_interval(x)) and (tied[1] - tied[0]) / (free[1] - free[0]) == pytest.approx(
        8**0.5, rel=0.05
    )
    assert accuracy_interval(eight, facts) == tied
    assert accuracy_interval(x, np.arange(50)) == wilson(int(x.sum()), 50)


def test_all_right_counts_each_group_once():
    assert accuracy_interval([1] * 40, [0, 1] * 20) == wilson(2, 2) and accuracy_interval(
        [0] * 40, [0, 1] * 20
    ) == wilson(0, 2)


def test_one_group_has_no_interval():
    assert accuracy_interval([1, 0, 1], ["a"] * 3) == (None, None) and ratio_interval([1.0]) == (None, None)
    assert "no interval" in said_interval(None, None) and said_interval(0.25, 0.5) == "95% interval 25% to 50%"


@pytest.mark.parametrize("n", [20, 113, 500])
def test_wilson_covers(n):
    "Exact coverage, summed over all outcomes, at rates from 2% to 98%."
    from scipy.stats import binom

    bounds, k = np.array([wilson(k, n) for k in range(n + 1)]), np.arange(n + 1)
    cover = [binom.pmf(k, n, p)[(bounds[:, 0] <= p) & (p <= bounds[:, 1])].sum() for p in np.linspace(0.02, 0.98, 193)]
    assert 0.945 < np.mean(cover) < 0.96 and min(cover) > 0.88


@pytest.mark.parametrize("G", [3, 5, 10, 30])
def test_accuracy_interval_covers(G):
    "1,500 sets of a few groups with 4 to 12 questions each; how much of a group is known differs from group to group."
    rng, inside = np.random.default_rng(G), []
    for _ in range(1500):
        size = rng.integers(4, 13, G)
        known = rng.binomial(size, rng.beta(2, 2, G))
        correct = np.concatenate([np.arange(n) < k for n, k in zip(size, known)])
        low, high = accuracy_interval(correct, np.repeat(np.arange(G), size))
        inside.append(low <= 0.5 <= high)
    assert 0.92 < np.mean(inside) < 0.985


@pytest.mark.parametrize("G", [3, 5, 10, 30])
def test_all_or_none_of_a_group_covers(G):
    "Machines of which all is known, four in five of them, or nothing: often all answers are right."
    rng = np.random.default_rng(G)
    found = [accuracy_interval(np.repeat(rng.random(G) < 0.8, 8), np.repeat(np.arange(G), 8)) for _ in range(1500)]
    assert np.mean([low <= 0.8 <= high for low, high in found]) > 0.93


@pytest.mark.parametrize("G", [3, 5, 10, 30])
def test_ratio_interval_covers(G):
    "3,000 sets of documents of unequal length, whose bits per byte scatter around 0.8."
    rng, inside = np.random.default_rng(G), []
    for _ in range(3000):
        size = rng.lognormal(6, 0.5, G)
        low, high = ratio_interval(size * rng.normal(0.8, 0.15, G), size)
        inside.append(low <= 0.8 <= high)
    assert 0.92 < np.mean(inside) < 0.97


@pytest.mark.parametrize("G", [2, 3, 5, 8])
@pytest.mark.parametrize("luck", [0, 0.2])
def test_a_change_by_luck_is_rarely_resolved(G, luck):
    "Null effects: the ten questions of a group share their luck, which is as often good as bad."
    rng, labels, seen, low_p = np.random.default_rng(G), np.repeat(np.arange(G), 10), 0, 0
    for _ in range(1000):
        up = np.repeat(rng.uniform(-luck, luck, G), 10)
        r = paired(rng.random(10 * G) < 0.5, rng.random(10 * G) < 0.5 + up, labels)
        seen += r["low"] is not None and not r["low"] <= 0 <= r["high"]
        low_p += r["p"] < 0.05
    assert low_p == seen <= 65  # 50 expected; 65 is two standard deviations more


def test_paired_covers():
    "1,000 changes of +10 points on 60 facts with 3 questions each; half of the facts get better, half worse."
    rng, facts, inside = np.random.default_rng(1), np.repeat(np.arange(60), 3), []
    for _ in range(1000):
        base, change = np.repeat(rng.uniform(0.3, 0.6, 60), 3), np.repeat(rng.choice([-0.1, 0.3], 60), 3)
        r = paired(rng.random(180) < base, rng.random(180) < base + change, facts)
        inside.append(r["low"] <= 0.1 <= r["high"])
    assert 0.92 < np.mean(inside) < 0.97


def test_one_group_tells_no_change_from_luck():
    r = paired([1, 0, 0], [1, 1, 1], ["a"] * 3)
    assert (r["low"], r["high"], r["p"], r["gained"], r["lost"]) == (None, None, 1.0, 2, 0) and r[
        "diff"
    ] == pytest.approx(2 / 3)


def test_results_without_an_interval_are_json(model, tok):
    text = bits_per_byte(model, tok, ["One text."], per_doc=True)
    quiz = multiple_choice(model, tok, [dict(q, group="one") for q in QUESTIONS])
    assert (text["low"], text["high"], quiz["low"], quiz["high"]) == (None,) * 4
    r = retention({"text": text, "quiz": quiz}, {"text": text, "quiz": quiz})
    assert (r["text"]["low"], r["quiz"]["low"]) == (None, None) and "too few groups to tell" in r["verdict"]
    json.dumps([text, quiz, r, screen({1: quiz, 2: quiz}), by_part(quiz, list("aabb"))], allow_nan=False)


def test_retention():
    def text(f):
        return dict(
            bpb=0.8 * f, low=0.7 * f, high=0.9 * f, bytes=300, tokens=90, docs=[(f * n, 100) for n in (50, 60, 70)]
        )

    def quiz(c):
        return dict(
            accuracy=sum(c) / len(c), correct=c, low=0.3, high=0.9, chance=0.25, n=len(c), groups=list(range(len(c)))
        )

    a, b = [True] * 61 + [False] * 39, [True] * 60 + [False] * 40
    r = retention(
        {"general ability": text(1), "common knowledge": quiz(a)},
        {"general ability": text(1.021), "common knowledge": quiz(b)},
    )
    assert r["general ability"]["ratio"] == pytest.approx(1.021) and r["general ability"]["low"] == pytest.approx(1.021)
    assert (
        r["verdict"] == "general ability: 2.1% more bits per byte (95% interval +2.1% to +2.1%); "
        "common knowledge: 61% -> 60%, no significant change (p=0.32, 95% interval -3 to +1 points)"
    )  # one of a hundred: t(99) is 1
    assert "a significant change" in retention({"q": quiz(a)}, {"q": quiz([False] * 100)})["verdict"]
    assert "fewer bits" in retention({"t": text(1)}, {"t": text(0.9)})["verdict"]
    with pytest.raises(InputError, match="300 bytes before and 200"):
        retention({"t": text(1)}, {"t": dict(text(1), bytes=200)})
    for x, y in (({"a": text(1)}, {"b": text(1)}), ({}, {})):
        with pytest.raises(InputError, match="same probes twice"):
            retention(x, y)


# --- screening

FACTS = np.repeat(np.arange(40), 3)


def quiz(correct, groups=None):
    "A result of multiple_choice with these outcomes."
    return dict(
        rate([bool(c) for c in correct], list(range(len(correct))) if groups is None else list(groups)), chance=0.25
    )


def test_screen_by_hand():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    right = {
        200: rng.random(100) < 0.6,
        400: np.arange(100) < 75,
        600: rng.random(100) < 0.6,
        800: rng.random(100) < 0.2,
    }
    r = screen({k: quiz(v) for k, v in right.items()})
    raw = {
        (a, b): ttest_rel(right[a].astype(float), right[b].astype(float)).pvalue for a in right for b in right if a < b
    }
    order, low, want = sorted(raw, key=raw.get), 0.0, {}
    for i, pair in enumerate(order):
        want[pair] = low = max(low, min(1, (len(order) - i) * raw[pair]))  # Holm (1979)
    for k, row in r["checkpoints"].items():
        assert row["accuracy"] == right[k].mean() and (row["low"], row["high"]) == wilson(int(right[k].sum()), 100)
        if k == 400:
            assert (row["diff"], row["p"]) == (0, 1)
        else:
            assert row["p"] == pytest.approx(want[tuple(sorted((k, 400)))]) and row["diff"] == pytest.approx(
                right[k].mean() - 0.75
            )
            assert row["diff_low"] < row["diff"] < row["diff_high"]
    assert r["best"] == 400 and 800 not in r["tied"] and r["n"] == 100


def test_screen_says_it_in_a_sentence():
    a, b = [True] * 60 + [False] * 40, [True] * 62 + [False] * 38
    bad = [False] * 80 + [True] * 20
    assert (
        screen({200: quiz(a), 400: quiz(b), 600: quiz(a), 800: quiz(bad)})["said"]
        == "step 400 is best, but 200 and 600 cannot be told from it on 100 questions"
    )
    assert (
        screen({"base": quiz(bad), "tuned": quiz(b)})["said"]
        == "tuned is best, and every other one is worse on 100 questions"
    )
    same = screen({"a": quiz(a), "b": quiz(a)})
    assert (
        same["said"] == "a is best, but b cannot be told from it on 100 questions"
        and same["checkpoints"]["b"]["p"] == 1
    )


def test_screen_draws_groups_together():
    rng = np.random.default_rng(3)
    fact = {k: np.repeat(rng.random(12) < p, 10) for k, p in (("a", 0.3), ("b", 0.7))}
    p = [
        screen({k: quiz(v) for k, v in fact.items()}, groups)["checkpoints"]["a"]["p"]
        for groups in (None, np.repeat(np.arange(12), 10))
    ]
    assert p[0] < 1e-4 < 0.02 < p[1]
    assert screen({k: quiz(v, np.repeat(np.arange(12), 10)) for k, v in fact.items()})["checkpoints"]["a"]["p"] == p[1]


def draw(rng, rates, luck=0.1):
    "Answers of checkpoints with these rates on 40 facts of unequal difficulty; each has its luck with each fact."
    hard = np.repeat(rng.uniform(-0.2, 0.2, 40), 3) + rng.uniform(-0.15, 0.15, 120)
    return {
        i: quiz(rng.random(120) < rate + hard + np.repeat(rng.choice([-luck, luck], 40), 3), FACTS)
        for i, rate in enumerate(rates)
    }


def skip_what_is_not_tested(monkeypatch):
    "For speed: no intervals of single figures, and no garbage collection in every call of statsmodels."
    monkeypatch.setattr(stats, "accuracy_interval", lambda *a: (0, 1))
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_equal_checkpoints_are_called_equal(monkeypatch):
    from statsmodels.stats.multitest import multipletests

    skip_what_is_not_tested(monkeypatch)

    def holm(p):
        return multipletests(p, method="holm")[0]

    rng, runs = np.random.default_rng(0), 200
    sets = [draw(rng, [0.5] * 8) for _ in range(runs)]
    found = [screen(s) for s in sets]
    assert np.mean([len(r["tied"]) < 7 for r in found]) <= 0.08
    naive = [any(row["diff_high"] < 0 for row in r["checkpoints"].values()) for r in found]
    assert np.mean(naive) > 0.2  # each difference to the best by itself: what the correction is for
    best_only = [
        holm([difference([s[i]["correct"]], [s[r["best"]]["correct"]], FACTS)["p"] for i in s if i != r["best"]]).any()
        for s, r in zip(sets, found)
    ]
    assert np.mean(best_only) > 0.09  # the data chose the best, so a correction over its own seven pairs is not enough
    assert np.mean([r["checkpoints"][r["best"]]["accuracy"] for r in found]) > 0.54  # the winner's curse


def test_a_worse_checkpoint_is_found(monkeypatch):
    skip_what_is_not_tested(monkeypatch)
    rng = np.random.default_rng(1)
    found = [screen(draw(rng, [0.3, 0.6, 0.6, 0.6, 0.6])) for _ in range(50)]
    assert np.mean([0 not in r["tied"] for r in found]) > 0.8 and np.mean([r["best"] != 0 for r in found]) == 1


def test_screen_needs_the_same_questions():
    a = quiz([True, False, True])
    for found, said in (
        ({}, "at least two"),
        ({1: a}, "at least two"),
        ({1: a, 2: quiz([True, False])}, "same questions"),
        ({1: a, 2: quiz([True] * 3, "xyz")}, "'1' and '2'"),
    ):
        with pytest.raises(InputError, match=said):
            screen(found)


def test_screen_plot():
    import matplotlib

    matplotlib.use("Agg")
    good, bad = [True] * 60 + [False] * 40, [False] * 80 + [True] * 20
    fig = screen_plot(screen({200: quiz(good), 400: quiz([True] * 62 + [False] * 38), 600: quiz(bad)}))
    points = [c[0] for c in fig.axes[0].containers]
    assert [p.get_color() for p in points] == ["C0", "C0", "grey"] and [
        t.get_text() for t in fig.axes[0].get_xticklabels()
    ] == ["200", "400", "600"]
    assert [p.get_markerfacecolor() for p in points] == ["white", "C0", "white"] and [
        float(p.get_ydata()[0]) for p in points
    ] == pytest.approx([60, 62, 20])
    matplotlib.pyplot.close(fig)


def test_compare_plot():
    import matplotlib

    matplotlib.use("Agg")
    exam = dict(quiz([True] * 50 + [False] * 50), chance=0.25)
    better = dict(quiz([True] * 60 + [False] * 40), chance=0.25)
    before = {"text": dict(bpb=1.0, low=None, high=None, bytes=300), "quiz": exam}
    after = {"text": dict(bpb=1.2, low=1.1, high=1.3, bytes=300), "quiz": better}
    fig = compare_plot(before, after)
    change = paired(exam["correct"], better["correct"])
    left, right = fig.axes
    assert (
        "bits per byte" in left.get_ylabel()
        and right.get_ylabel() == "correct (%)"
        and right.get_title().startswith("quiz\n+10")
    )
    assert f"({100 * change['low']:+.0f} to {100 * change['high']:+.0f})" in right.get_title()
    assert "no interval" in left.get_title()
    assert any(list(line.get_ydata()) == [25, 25] for line in right.lines)
    matplotlib.pyplot.close(fig)
