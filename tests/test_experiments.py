import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from domain_llm.core import InputError
from domain_llm.run import experiments
from domain_llm.run.recipe import check_recipe


def small(folder):
    return dict(
        name="x",
        model=str(folder),
        demo=8,
        pretrain=dict(length=64, tokens_per_step=256),
        mix=dict(tokens=1500),
        evaluate=dict(questions=40, probe_tokens=200),
    )


def command(*words):
    return subprocess.run(
        [str(Path(sys.executable).parent / "domain-llm"), *map(str, words)], capture_output=True, text=True, timeout=600
    )


def test_an_experiment_on_a_recipe_from_the_command_line(tiny_folder, tmp_path):
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(small(tiny_folder)))
    first = command("ablate", "mix", "--recipe", path, "--seeds", 2, "--output", out)
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads((out / "result.json").read_text())
    assert (
        list(result["runs"]) == ["1:0", "1:1", "1:2", "1:5", "1:10"]
        and min((out / f).stat().st_size for f in ("trade.png", "effects.png")) > 5000
    )
    assert (
        result["model"] == tiny_folder.name
        and result["data"]["questions"] == ["domain_mcq.jsonl"]
        and result["provenance"]["machine"]["versions"]["torch"]
        and str(tmp_path) not in json.dumps(result)
    )
    for arm in result["runs"].values():
        assert set(arm) == {"0", "1"}
        for m in arm.values():
            assert len(m["domain_mcq"]["values"]) == 40 == len(m["domain_mcq"]["groups"]) and set(
                m["domain_mcq"]["values"]
            ) <= {0, 1}
    assert {c["verdict"] for c in result["claims"]} <= {"supported", "refuted", "not resolved at this size"}
    assert result["runs"]["1:0"]["0"] != result["runs"]["1:5"]["0"] and "against 1:0" in first.stdout
    (kept,) = (out / "runs").glob("1-5-1-*.json")
    kept.unlink()
    (out / "runs" / "run-killed.part" / "model").mkdir(parents=True)
    again = command("ablate", "mix", "--recipe", path, "--seeds", 2, "--output", out)
    assert again.stdout.count("run ") == 1 and "1:5, seed 1" in again.stdout and not list(out.rglob("*.part"))
    assert (
        json.loads((out / "result.json").read_text())["runs"] == result["runs"]
    )  # the same settings and seed, the same figures


@pytest.mark.parametrize(
    "name, arms",
    [
        ("rehearse", {"no replay", "general text", "rehearsal"}),
        ("rewarm", {"no replay, re-warmed", "no replay, low and constant", "1:1, re-warmed", "1:1, low and constant"}),
        (
            "select",
            {
                "standard",
                "book",
                "web",
                "news",
                *(f"by {b}" for b in ("random", "prior", "density", "both", "quality", "dsir", "diverse")),
                "near in meaning",
            },
        ),
    ],
)
def test_the_other_experiments_train(tiny_folder, tmp_path, name, arms):
    recipe = small(tiny_folder) | dict(
        mix=dict(tokens=600),
        evaluate=dict(questions=8, probe_tokens=100),
        select=dict(tokens=450 if name == "select" else None),
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = experiments.ablation(name, tmp_path / "r.yaml", seeds=1, output=tmp_path / "out")
    assert set(result["runs"]) == arms and result["claims"]
    if name == "select":
        assert len(result["before"]["domain_bpb"]["values"]) == 5 and {c["metric"] for c in result["claims"]} == {
            "domain_prob",
            "domain_bpb",
        }
    seen = [m["0"]["domain_bpb"]["values"] for m in result["runs"].values()]
    assert all(
        a != b for i, a in enumerate(seen[:5]) for b in seen[:i]
    )  # scorers may agree on so small a corpus; the first five arms trained on different texts
    if name == "rewarm":
        assert {(a["pretrain"]["schedule"], a["pretrain"]["learning_rate"]) for a in result["arms"].values()} == {
            ("cosine", 2e-4),
            ("constant", 2e-5),
        }
    if name == "rehearse":
        (written,) = (tmp_path / "out" / "runs").glob("rehearsal-*.jsonl")
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        assert (
            rows[0]["source"] == "rehearsal" and sum(len(r["text"]) for r in rows) > 300
        )  # half of 600 tokens, each at least a character


def test_a_claim_needs_two_groups_of_items():
    "A single document, or questions on one thing, say nothing about others."
    metrics = dict(
        one=dict(values=[1.0]),
        same=dict(values=[1, 0, 1], groups=["a", "a", "a"]),
        two=dict(values=[1, 0], groups=["a", "b"]),
        texts=dict(values=[1.0, 2.0]),
    )
    assert [experiments._groups(metrics, name) for name in ("one", "same", "two", "texts", "absent")] == [1, 1, 2, 2, 0]


def test_help_names_every_experiment():
    said = command("ablate", "--help").stdout
    for name in experiments.EXPERIMENTS:
        assert name in said


@pytest.mark.parametrize(
    "words, says",
    [
        (("ablate", "mux"), "did you mean 'mix'"),
        (("ablate", "mix", "--seeds", 0), "at least 1 seed"),
        (("ablate", "mix-domain", "--tokens", 100), "mix.epochs"),
    ],
)
def test_bad_input_is_one_line(words, says, tmp_path):
    p = command(*words, "--output", tmp_path / "o")
    assert p.returncode == 2 and says in p.stderr and "Traceback" not in p.stderr


def test_an_experiment_on_documents_without_questions(tiny_folder, tmp_path):
    "Claims on accuracy fall away, those on bits per byte stay, and the text to replay may be named."
    docs, rng = tmp_path / "docs", random.Random(0)
    docs.mkdir()
    for i in range(12):
        (docs / f"{i}.md").write_text(
            f"# Manual {i}\n\n"
            + " ".join(rng.choices("pump valve seal flange gasket torque rotor stator".split(), k=80))
            + ".\n"
        )
    recipe = small(tiny_folder) | dict(
        data=dict(documents=[str(docs)]), mix=dict(parts=dict(domain=1, general=1), tokens=1200)
    )
    del recipe["demo"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    result = experiments.ablation("mix", tmp_path / "r.yaml", seeds=1, output=tmp_path / "out")
    assert set(result["before"]) == {"domain_bpb", "general_bpb", "general_mcq", "general_prob"} and {
        c["metric"] for c in result["claims"]
    } == {"general_bpb"}
    assert len(result["before"]["general_bpb"]["values"]) > 1


def test_kinds_that_are_not_there_give_no_arm(tmp_path):
    cfg = check_recipe(dict(demo=8, mix=dict(tokens=1000)))
    docs = [dict(text="x" * 640, kind=k) for k in ("standard", "web")]
    arms, without = experiments._arms(experiments.EXPERIMENTS["select"], cfg, docs, "mark")
    assert (
        list(arms)[:3] == ["standard", "web", "by random"]
        and list(without) == ["book", "news", "near in meaning"]
        and "0 tokens" in without["book"]
    )
    assert {a["select"]["tokens"] for a in arms.values()} == {80}  # a quarter of 1,280 bytes at four bytes a token
    assert arms["by dsir"]["select"]["by"] == "dsir" and arms["web"]["select"]["kinds"] == ["web"]


def test_one_kind_has_no_target_for_dsir():
    cfg = check_recipe(dict(demo=8, mix=dict(tokens=1000)))
    arms, without = experiments._arms(
        experiments.EXPERIMENTS["select"], cfg, [dict(text="x" * 640, kind="book")] * 3, "mark"
    )
    assert list(arms) == ["book", "by random", "by prior", "by density", "by both", "by quality", "by diverse"]
    assert (
        list(without) == ["standard", "web", "news", "by dsir", "near in meaning"] and "one kind" in without["by dsir"]
    )


def test_a_kind_with_less_text_than_the_budget_gives_no_arm():
    cfg = check_recipe(dict(demo=8, mix=dict(tokens=1000), select=dict(tokens=100)))
    arms, without = experiments._arms(
        experiments.EXPERIMENTS["select"],
        cfg,
        [dict(text="x" * n, kind=k) for n, k in ((1000, "standard"), (396, "news"))],
        "mark",
    )
    assert "standard" in arms and without["news"] == "about 99 tokens of this kind, where 100 are selected"
    assert experiments.told(dict(experiment="select", before={}, runs={}, claims=[], without=without)).count(
        "no arm"
    ) == len(without)


def test_equal_domain_tokens_take_no_total(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(demo=8, mix=dict(tokens=30_000, epochs=2))))
    assert experiments._checked("mix-domain", tmp_path / "r.yaml", 1, None)[1]["mix"]["tokens"] is None
    assert experiments._checked("mix", tmp_path / "r.yaml", 1, None)[1]["mix"]["tokens"] == 30_000


def test_an_arm_that_ran_dry_is_refused():
    made = dict(
        tokens_per_source=dict(domain=300, general=300),
        epochs_per_source=dict(domain=1.2),
        notes=["'general' has only 100 tokens."],
    )
    experiments._check_size(made, dict(tokens=600, epochs=1))
    experiments._check_size(made, dict(tokens=None, epochs=1.2))
    with pytest.raises(InputError, match="600 tokens.*1,000.*only 100 tokens.*max_epochs"):
        experiments._check_size(made, dict(tokens=1000, epochs=1))
    with pytest.raises(InputError, match="1.2 passes.*where the experiment gives 2"):
        experiments._check_size(made, dict(tokens=None, epochs=2))


def planned(shares, tokens, law):
    "A result of `mix-pilots` whose losses follow a law exactly."
    name = lambda g, t: f"{g:.2f} {t}"
    arms = {
        name(g, t): dict(
            mix=dict(parts=dict(domain=1, instructions=1, **({"general": 2 * g / (1 - g)} if g else {})), tokens=t)
        )
        for g in shares
        for t in tokens
    }
    runs = {
        name(g, t): {
            "0": dict(domain_bpb=dict(values=[law(1 - g, t)[0]] * 2), general_bpb=dict(values=[law(g, t)[1]] * 2))
        }
        for g in shares
        for t in tokens
    }
    return dict(
        arms=arms,
        runs=runs,
        before=dict(general_bpb=dict(values=[1.0, 1.0])),
        mix=dict(tokens=30_000),
        pretrain=dict(forgetting_budget=0.15),
        claims=[],
        experiment="mix-pilots",
    )


def test_pilots_count_everything_but_general_text_as_domain():
    result = planned((0, 0.5), (1000,), lambda share, t: (share, share))
    assert [p["share"] for p in experiments.pilots(result, "general_bpb")] == pytest.approx([0, 0.5])
    assert [p["share"] for p in experiments.pilots(result, "domain_bpb")] == pytest.approx([1, 0.5])
    assert {p["tokens"] for p in experiments.pilots(result, "domain_bpb")} == {1000}


def test_advice_finds_the_share_that_keeps_the_budget():
    "General loss 1 + 0.02 (t / 1000)^0.5 / (g + 0.1) at 30,000 tokens: within 15% from g = 0.63; the domain's loss falls with its share."
    law = lambda share, t: (
        0.5 + 0.1 / (share + 0.2) + 0.2 * (1000 / t) ** 0.5,
        1 + 0.02 * (t / 1000) ** 0.5 / (share + 0.1),
    )
    result = planned((0, 0.25, 0.5, 0.75, 0.9), (3000, 6000, 9000), law)
    found, _ = experiments.advise(result, 0.15)
    want = 0.02 * 30**0.5 / 0.15 - 0.1
    assert found["feasible"] and abs((1 - found["share"]) - want) < 0.03
