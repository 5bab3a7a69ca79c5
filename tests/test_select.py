"Data selection against independent truth: the formula by hand, known facts, planted copies, English and Chinese."

import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import spearmanr

from domain_llm.core import InputError
from domain_llm.data.dedup import shingles
from domain_llm.data.density import PRIORS, _found, _top_gram, density, explain, quality
from domain_llm.data.read import KINDS
from domain_llm.data.rows import as_dataset, remove_file
from domain_llm.data.select import SCORES, dsir, embed, ranks, select, semantic, to_budget, tokens_of
from domain_llm.demo.general import python_docs
from domain_llm.demo.world import make_world

CLAUSES = [
    "4.1 The pressure of the pump shall not exceed 40 bar; the seal must be replaced every 6 months, see clause 5.2.\n"
    "| part | torque |\n| bolt | 25 Nm |",
    "4.1 水泵的压力不得超过40巴，密封圈必须每六个月更换一次，见第五条。\n| 部件 | 力矩 |\n| 螺栓 | 25 牛米 |",
]
CHATS = [
    "Hello! I went to see the pump with my brother yesterday. Has anyone been there? "
    "It was great fun, thanks for the tip!",
    "你好！我昨天和弟弟去看了水泵。有人去过吗？真好玩啊，谢谢大家！",
]
PROSE = [
    "A pump moves water by means of a wheel that turns inside a casing, "
    "and the pressure of the water rises with the speed of the wheel.",
    "水泵利用在泵壳里旋转的叶轮来输送水，叶轮转得越快，水的压力就越高。",
]


def row(text, kind="web", name="d"):
    return dict(text=text, source=name, kind=kind, id=name)


@pytest.fixture(scope="module")
def world():
    "Documents of the demo and, for each, the facts it states and their number per 1,000 characters."
    made = make_world(seed=3, entities=20)  # not the world of the chapter
    facts = {
        r["id"]: {f["id"] for f in made["facts"] if f["entity"] in r["text"] and f["value"] in r["text"]}
        for r in made["documents"]
    }
    return made, facts, np.array([1000 * len(facts[r["id"]]) / len(r["text"]) for r in made["documents"]])


# ---- scores


@pytest.mark.parametrize("lang", (0, 1), ids=("english", "chinese"))
def test_density_ranks_clause_prose_chat(lang):
    clause, prose, chat = (density(t[lang])["score"] for t in (CLAUSES, PROSE, CHATS))
    assert 1 >= clause > prose + 0.2 and prose > chat + 0.05 and chat >= 0


def test_density_counts_what_is_there():
    text = "The valve must open at 4 bar within 30 s. " + "x" * 158
    assert len(text.encode()) == 200
    parts = density(text)["parts"]
    assert parts["quantities"] == pytest.approx(1)  # two in 200 bytes are 10 per 1,000
    assert parts["statements"] == pytest.approx(0.5)
    assert parts["codes"] == parts["rows"] == parts["filler"] == 0
    said = explain(text)
    assert "2 quantities (4 bar, 30 s)" in said and "1 statements (must)" in said
    assert f"{density(text)['score']:.2f}" in said


@pytest.mark.parametrize(
    "text, n",
    [
        ("压力为4巴", 1),
        ("每三十天检查", 1),
        ("供应商反应很快，适应应用", 0),
        ("in 1990 we met", 0),
        ("第3条", 0),
        ("百分之五", 1),
        ("-10 °C and 3.5 kN", 2),
        ("two hundred and 12 rpm", 1),
    ],
)
def test_quantities_in_both_languages(text, n):
    assert len(_found(text)["quantities"]) == n


def test_chinese_words_that_only_contain_a_norm():
    assert _found("供应商的反应很快，适应应用效应")["statements"] == [] and _found("闸门应关闭")["statements"] == ["应"]


@pytest.mark.parametrize("score", (density, quality))
@pytest.mark.parametrize("text", ("", " \n", "|", "a", "。", "🙂" * 5, "\n\n#\n", "\ud800 x"))
def test_scores_of_odd_texts_are_between_0_and_1(score, text):
    got = score(text)
    assert 0 <= got["score"] <= 1 and all(0 <= v <= 1 for v in got["parts"].values())


def test_scores_stay_between_0_and_1_on_real_prose():
    for r in python_docs()[:60]:
        for score in (density, quality):
            got = score(r["text"])
            assert 0 < got["score"] <= 1 and all(0 <= v <= 1 for v in got["parts"].values())


def test_quality_rules_fall_where_they_should():
    sound = (
        "The keeper of the lock opens the gate in the morning and closes it with the tide.\n"
        "In winter the gate stays shut for most of the day."
    )
    assert quality(sound)["score"] == 1
    for broken, part in (
        (sound.replace(" ", " # "), "symbols (Gopher)"),
        ("\n".join(f"- {w}" for w in sound.split()), "lines of five words (C4)"),
        (sound.replace(".", " ..."), "trailing dots (Gopher)"),
        ("\n".join([sound] * 6), "repeated lines (Gopher)"),
        ("12 34 56 78 90 of the 12 34 56.", "words with letters (Gopher)"),
        (sound.replace(".", ""), "end punctuation (C4)"),
        (
            "supercalifragilistic " * 3 + "expialidociousness of that antidisestablishmentarianism.",
            "word length (Gopher)",
        ),
    ):
        assert quality(broken)["parts"][part] < 1 and quality(broken)["score"] < 1
    assert quality(PROSE[1])["score"] > 0.9 > 0.8 > quality("好好好好好好好好好好好好好好好好")["score"]


def test_top_gram_by_hand():
    twice = ["ab", "c", "ab", "c", "d"]  # "ab c" twice, three letters each, of seven
    assert _top_gram(twice, 2) == pytest.approx(6 / 7)
    assert _top_gram(["a", "b"], 2) == 0 and _top_gram(["a"], 2) == 0


# ---- DSIR


def test_dsir_is_the_published_formula():
    docs = [row("pump seal pump"), row("seal feast")]
    target = [row("pump seal")]
    # n-grams: pump x2, seal x1, "pump seal", "seal pump" | seal, feast, "seal feast"
    # the target has pump, seal and "pump seal", a third each
    raw = {"pump": 2 / 8, "seal": 2 / 8, "pump seal": 1 / 8, "seal pump": 1 / 8, "feast": 1 / 8, "seal feast": 1 / 8}
    p = {"pump": 1 / 3, "seal": 1 / 3, "pump seal": 1 / 3}

    def term(gram):
        return math.log(p.get(gram, 0) + 1e-8) - math.log(raw[gram] + 1e-8)

    first = 2 * term("pump") + term("seal") + term("pump seal") + term("seal pump")
    second = term("seal") + term("feast") + term("seal feast")
    assert dsir(docs, target, mean=False) == pytest.approx([first, second])
    assert dsir(docs, target) == pytest.approx([first / 5, second / 3])


def test_dsir_mean_does_not_depend_on_length_and_the_sum_does():
    docs = [row("pump seal gate valve. " * k) for k in (1, 10)] + [row("choir feast ship bread. " * k) for k in (1, 10)]
    total, mean = (dsir(docs, docs[1:2], mean=m) for m in (False, True))
    assert total[1] > 5 * total[0] > 0 and total[3] < 5 * total[2] < 0
    assert abs(mean[1] - mean[0]) < 0.1 * (mean[0] - mean[2])


def test_dsir_in_chinese_finds_the_subject():
    docs = [row("水闸的安全阀门由班长检查"), row("合唱团在市政厅排练新歌"), row("闸门的压力由安全阀控制")]
    w = dsir(docs, [row("检查水闸安全阀门的压力")])
    assert w[0] > w[1] and w[2] > w[1]


def test_dsir_is_the_same_in_another_process():
    code = """
from domain_llm.data.select import dsir
print([float(x) for x in dsir([{"text": "a b c"}, {"text": "d 水 e"}], [{"text": "b c"}])])
"""
    out = set()
    for seed in (1, 2):
        env = {"PYTHONHASHSEED": str(seed), "PATH": "", **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"}}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        out.add(done.stdout)
    here = [float(x) for x in dsir([{"text": "a b c"}, {"text": "d 水 e"}], [{"text": "b c"}])]
    assert len(out) == 1 and eval(out.pop()) == here


# ---- near in meaning


def test_embedding_is_the_mean_of_the_last_hidden_states(tiny_model):
    import torch

    model, tok = tiny_model
    texts = [
        "one short text",
        "a text that is a good deal longer than the others, so that they are padded",
        "三个字",
        "",
    ]
    made = embed(model, tok, texts, batch_size=3)
    for text, vector in zip(texts[:3], made):
        with torch.inference_mode():
            states = model(
                torch.tensor([tok(text, add_special_tokens=False).input_ids]), output_hidden_states=True
            ).hidden_states[-1]
        assert np.allclose(vector, states[0].mean(0).numpy(), atol=1e-5)
    assert made.shape == (4, model.config.hidden_size) and np.isfinite(made).all()


def test_semantic_is_the_cosine_with_the_mean_direction():
    from sklearn.metrics.pairwise import cosine_similarity

    made = np.random.default_rng(0).normal(size=(7, 5))
    vectors = dict(zip("abcdefg", made))
    found = semantic([row(c) for c in "abcd"], [row(c) for c in "efg"], lambda texts: [vectors[t] for t in texts])
    aim = (made[4:] / np.linalg.norm(made[4:], axis=1, keepdims=True)).mean(0)
    assert found == pytest.approx(cosine_similarity(made[:4], aim[None])[:, 0])


def test_near_leaves_out_another_subject(world):
    docs = world[0]["documents"]
    text = "The village feast began with music, and the children danced in the garden until the evening."
    feast = [row(text, name=f"feast-{i}") for i in range(20)]

    def words(texts):
        return [[t.lower().count(w) for w in ("music", "children", "garden", "the ")] for t in texts]

    kept = select(docs + feast, 10**6, by="random", near=len(docs) / len(docs + feast), embed=words)
    assert len(kept) == len(docs) and not any(r["id"].startswith("feast") for r in kept)
    web = select(docs, 500, kinds=["web"], near=0.5, embed=words)  # the target is the densest kind of all documents
    assert {r["kind"] for r in web} == {"web"}
    everything = select(docs + feast, 10**6, near=1, embed=words)
    assert [r["id"] for r in everything] == [r["id"] for r in select(docs + feast, 10**6)]


# ---- the budget


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("diversity", (0, 0.5, 1))
def test_budget_is_kept_and_used(seed, diversity):
    rng = random.Random(seed)
    docs = [row(" ".join(rng.choices("abcdefgh", k=rng.randint(1, 60)))) for _ in range(60)]
    tokens = rng.randint(10, 400)
    chosen = to_budget(docs, [rng.random() for _ in docs], tokens, diversity=diversity)
    left = tokens - sum(tokens_of(docs[i]["text"]) for i in chosen)
    assert left >= 0 and len(set(chosen)) == len(chosen)
    assert all(tokens_of(d["text"]) > left for i, d in enumerate(docs) if i not in chosen)  # nothing more would fit


def slow_greedy(docs, scores, tokens, diversity):
    "The definition, without laziness: in every step the document with the highest gain that fits."
    own = [set(shingles(d["text"]).tolist()) for d in docs]
    size, seen, chosen, rest = [tokens_of(d["text"]) for d in docs], set(), [], set(range(len(docs)))

    def gain(i):
        return scores[i] * (1 - diversity * len(own[i] & seen) / len(own[i]))

    while rest := {i for i in rest if size[i] <= tokens}:
        best = min(rest, key=lambda i: (-gain(i), i))
        chosen.append(best)
        seen |= own[best]
        tokens -= size[best]
        rest.remove(best)
    return chosen


@pytest.mark.parametrize("diversity", (0, 0.5, 1))
@pytest.mark.parametrize("seed", range(4))
def test_lazy_greedy_is_greedy(seed, diversity):
    rng = random.Random(seed)
    sentences = ["".join(rng.choices("abcdefghijklmnop", k=40)) + ". " for _ in range(25)]
    docs = [row("".join(rng.sample(sentences, rng.randint(1, 8)))) for _ in range(40)]
    scores = [rng.random() for _ in docs]
    assert to_budget(docs, scores, 900, diversity=diversity) == slow_greedy(docs, scores, 900, diversity)


def test_count_of_the_caller_decides():
    docs = [row("one two three"), row("four")]
    assert to_budget(docs, [1, 0], 3, count=lambda t: len(t.split())) == [0]
    assert tokens_of("abcde") == 2 and tokens_of("水闸") == 2


def test_diversity_leaves_out_planted_copies(world):
    made, _, _ = world
    twin = {b: a for a, b in made["planted"]["duplicates"]}
    docs = [r for r in made["documents"] if r["kind"] == "standard" or r["id"] in twin]

    def both(by):
        got = {r["id"] for r in select(docs, 3000, by=by)}
        return sum(b in got and a in got for b, a in twin.items())

    assert both("density") >= 2 > both("diverse") == 0


# ---- the demo's truth


def test_density_follows_the_known_facts_and_random_does_not(world):
    made, _, truth = world
    docs = made["documents"]
    rho = {by: spearmanr(SCORES[by](docs, None), truth)[0] for by in ("prior", "density", "dsir")}
    assert all(r > 0.2 for r in rho.values()), rho  # 0.28 to 0.39 for density over five worlds
    chance = [spearmanr(np.random.default_rng(s).random(len(docs)), truth)[0] for s in range(20)]
    assert abs(np.mean(chance)) < 0.08 and rho["density"] > max(chance)


def test_selections_state_more_facts_than_chance(world):
    made, facts, _ = world

    def found(by, seed=0):
        return len(set().union(*(facts[r["id"]] for r in select(made["documents"], 4000, by=by, seed=seed))))

    chance = [found("random", s) for s in range(20)]
    assert min(found(by) for by in ("prior", "both", "dsir", "diverse")) > max(chance)


# ---- one call


@pytest.mark.parametrize("by", SCORES)
def test_rows_on_disk_are_selected_as_those_in_memory(world, by, monkeypatch):
    docs = world[0]["documents"]
    few = dict(kinds=["book", "web"]) if by == "prior" else {}
    want = select(docs, 2500, by=by, seed=7, **few)
    monkeypatch.setattr("domain_llm.data.rows.IN_MEMORY", 1000)
    stored = as_dataset(docs)
    assert stored.cache_files and select(stored, 2500, by=by, seed=7, **few).to_list() == want
    remove_file(stored)


@pytest.mark.parametrize("by", SCORES)
def test_same_seed_same_rows_within_the_budget(world, by):
    docs = world[0]["documents"]
    a, b = (select(docs, 2500, by=by, seed=7) for _ in range(2))
    assert a == b and 2000 < sum(tokens_of(r["text"]) for r in a) <= 2500 and all(r in docs for r in a)


def test_seed_and_order_of_the_documents(world):
    docs = world[0]["documents"]

    def ids(rows):
        return [r["id"] for r in rows]

    assert ids(select(docs, 2500, "random", seed=1)) != ids(select(docs, 2500, "random", seed=2))
    assert ids(select(docs, 2500, "prior", seed=1)) != ids(select(docs, 2500, "prior", seed=2))  # equal scores
    assert ids(select(docs, 1000, "density", seed=1)) == ids(select(docs, 1000, "density", seed=2))  # different ones


def test_prior_keeps_the_order_of_kinds(world):
    docs = world[0]["documents"]
    at = [KINDS.index(r["kind"]) for r in select(docs, 10**6, by="prior")]
    assert at == sorted(at) and len(at) == len(docs) and list(PRIORS) == list(KINDS)


def test_kinds_and_target_and_datasets(world):
    import datasets

    docs = world[0]["documents"]
    assert {r["kind"] for r in select(datasets.Dataset.from_list(docs), 3000, kinds=["news", "web"])} <= {"news", "web"}
    news = [r for r in docs if r["kind"] == "news"]
    assert [r["kind"] for r in select(docs, 500, by="dsir", target=news)].count("news") >= 3


def test_ranks_are_comparable():
    assert ranks([5, -1e9, 5, 7]).tolist() == [0.625, 0.25, 0.625, 1.0]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda d: select(d, 500, by="densty"), "did you mean 'density'"),
        (lambda d: select(d, 500, kinds=["standards"]), "did you mean 'standard'"),
        (lambda d: select(d, 500, kinds=["paper"]), "no document of kind paper"),
        (lambda d: select(d, 500, kinds=["news"], by="dsir"), "give target="),
        (lambda d: select([], 500), "no document"),
        (lambda d: select(d, 3), "less than the smallest document"),
        (lambda d: select([row("text", "law")], 50, by="prior"), "is of kind 'law'"),
        (lambda d: to_budget(d[:2], [1], 500), "1 scores for 2 documents"),
        (lambda d: to_budget(d[:2], [1, float("nan")], 500), "document 1 is not a number"),
        (lambda d: to_budget(d[:2], [1, -1], 500, diversity=1), "use ranks"),
        (lambda d: to_budget(d[:2], [1, 1], 500, diversity=2), "not between 0"),
        (lambda d: dsir(d, [row("")]), "no words"),
        (lambda d: select(d, 500, near=0.5), "near needs embed"),
        (lambda d: select(d, 500, near=50, embed=len), "not a share"),
        (lambda d: semantic(d[:2], d[:1], lambda texts: [1, 2, 3]), "must be .texts, dimensions."),
    ],
)
def test_errors_name_the_input(world, call, says):
    with pytest.raises(InputError, match=says):
        call(world[0]["documents"])
