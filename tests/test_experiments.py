import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from domain_llm.core import InputError
from domain_llm.demo.lab import lab_rows
from domain_llm.run import experiments, measuring, training
from domain_llm.run.arms import UNITS, abouts, arm_recipes, base_recipe, read_experiment, shipped
from domain_llm.run.forecast import ceiling, claim_lines, group_count, plan_text, run_tokens
from domain_llm.run.recipe import check_recipe, read_recipe
from domain_llm.small_world import SMALL_WORLDS, small_tokenizer
from domain_llm.train.sft import encode_all

ROOT = Path(__file__).resolve().parent.parent
NEWER = dict(batch=1, optimizer="adamw", gradient_checkpointing="auto")  # of pretrain, than the table of experiments
TABLE = json.loads((ROOT / "tests" / "fixtures" / "experiments.json").read_text())
KINDS = [dict(text="x" * 80000, kind=kind) for kind in ("standard", "book", "web", "news")]


def arms_of(name, cfg, docs, tokens=None):
    "Arms and reasons of an experiment, without running it."
    what = read_experiment(name)
    return arm_recipes(what, base_recipe(what, cfg, tokens), docs)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_files_give_the_settings_that_the_code_before_them_gave(name):
    "The table was written by the experiments as Python code, on four kinds of documents and the recorded recipes."
    want = TABLE[name]
    cfg = read_recipe(ROOT / "nbs" / "recipes" / f"{want['recipe']}.yaml")
    arms, without = arms_of(name, cfg, KINDS, want["tokens"])
    got = {arm: {k: made["recipe"][k] for k in ("mix", "select", "pretrain")} for arm, made in arms.items()}
    for arm in want["arms"].values():
        arm["pretrain"] |= NEWER
    assert got == want["arms"] and list(got) == list(want["arms"]) and without == want["without"]
    assert read_experiment(name)["claims"] == [dict({"more": True}, **c) for c in want["claims"]]
    assert {a for a in arms if arms[a]["rehearsed"]} == ({"rehearsal"} if name == "rehearse" else set())


def record(stem):
    return json.loads((ROOT / "nbs" / "results" / f"ablate_{stem}.json").read_text())


def among(part, whole):
    "Whether every setting of `part` has the same value in `whole`; a record lacks settings that came later."
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(among(v, whole.get(k)) for k, v in part.items())
    return part == whole


@pytest.mark.parametrize("stem", ["mix", "mix-domain", "mix-pilots", "rewarm", "rehearse", "select", "select-security"])
def test_files_would_run_what_was_recorded(stem):
    result = record(stem)
    name = result["experiment"]
    recipe = yaml.safe_load((ROOT / "nbs" / "recipes" / f"{RECIPES.get(stem, 'ablate')}.yaml").read_text())
    recipe.pop("data", None)
    kinds = 10 * KINDS[:3] if stem == "select-security" else KINDS  # its corpus was larger, without news
    cfg = check_recipe({"demo": 8, **recipe})
    arms, without = arms_of(name, cfg, kinds, result["mix"]["tokens"])
    assert list(arms) == list(result["runs"]) and without == result.get("without", {})
    for arm, made in result.get("arms", {}).items():
        assert among(made["mix"], arms[arm]["recipe"]["mix"])
        assert among(made["pretrain"], arms[arm]["recipe"]["pretrain"])
        if name == "select":
            assert among(made["select"], arms[arm]["recipe"]["select"])
    keys = ("text", "metric", "arm", "base")
    stated = [[c[k] for k in keys] for c in read_experiment(name)["claims"] if {c["arm"], c["base"]} <= set(arms)]
    assert [[c[k] for k in keys] for c in result["claims"]] == stated


RECIPES = {"select": "select", "select-security": "select-security", "rehearse": "rehearse"}

FILE = """
about: two arms
equal: tokens
arms:
  low: {pretrain: {learning_rate: 10%}}
  high: {}
claims:
  - {text: high learns more, metric: domain_bpb, arm: high, base: low, direction: less}
"""


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("arm: high", "arm: hihg", "claim 1: the arm is 'hihg' (did you mean 'high'?)"),
        ("domain_bpb", "domain_bbp", "claim 1: the metric is 'domain_bbp' (did you mean 'domain_bpb'?)"),
        ("direction: less", "direction: down", "one of: more, less"),
        ("base: low", "base: high", "with itself"),
        ("about: two arms", "about: [two", "line 3 is not valid YAML"),
        ("  high: {}", "  low: {}", "line 6 is not valid YAML: 'low' stands twice"),
        ("  high: {}", "  1:0: {}", "in quotes"),
        ("  high: {}", "  high: {mix: {tokens: 5}}", "arm 'high' changes mix.tokens, but the experiment says"),
        ("  high: {}", "  high: {corpus: {held_out: 0.2}}", "changes corpus, which is the same for all arms"),
        ("  high: {}", "  high: {data: {questions: x}}", "changes data.questions"),
        ("  high: {}", "  high: {stages: [pretrane]}", "did you mean 'pretrain'"),
        ("  high: {}", "  high: 5", "must be a change to the recipe"),
        ("  high: {}\n", "", "at least two"),
        ("equal: tokens", "equal: token", "did you mean 'tokens'"),
        ("equal: tokens", "equals: tokens", "unknown key 'equals' (did you mean 'equal'?)"),
        ("text: high learns more, ", "", "claim 1 needs 'text'"),
        ("direction: less", "matters: 0", "must be a number above 0"),
        ("equal: tokens", "recipe: [1]", "'recipe:' must be a set of 'name: value' lines"),
        ("equal: tokens", "recipe: {mix: 3}", "'mix' must be a set of 'name: value' lines"),
        ("equal: tokens", "defaults: foo", "'defaults:' must be a set of 'name: value' lines"),
        ("  high: {}", "  high: {mix: 5}", "arm 'high': 'mix' must be a set"),
        ("  high: {}", "  high: {data: rehearsed}", "arm 'high': 'data' must be a set"),
        ("  high: {}", "  high: {mix: {parts: [1], replay: 1}}", "'mix.parts' must be a set"),
        ("  high: {}", "  ? [a]\n  : {}", "a name must be a text"),
        ("equal: tokens", "equal: exposures\nlaw: true", "a law needs runs of known size"),
        ("  high: {}", "  high: {stages: [sft]}\nlaw: true", "the arm 'high' has none"),
    ],
)
def test_a_faulty_file_names_the_place(tmp_path, old, new, says):
    assert old in FILE
    (tmp_path / "e.yaml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(InputError) as e:
        read_experiment(tmp_path / "e.yaml")
    assert says in str(e.value)


def test_a_wrong_setting_names_the_arm_before_any_data_are_read(tmp_path):
    (tmp_path / "e.yaml").write_text(FILE.replace("high: {}", "high: {pretrain: {learning_rat: 1}}"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(demo=8, mix=dict(tokens=1000))))
    with pytest.raises(InputError, match="arm 'high'.*did you mean 'learning_rate'"):
        experiments.ablation(tmp_path / "e.yaml", tmp_path / "r.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


THEN = """
equal: tokens
arms:
  documents: {stages: [pretrain]}
  then instructions: {stages: [pretrain, sft]}
  instructions: {stages: [sft]}
  untrained: {stages: [prepare]}
claims:
  - {text: a, metric: domain_prob, arm: then instructions, base: documents}
control: {text: b, metric: domain_bpb, arm: documents, base: untrained, direction: less}
"""


def test_arms_share_pretraining_and_may_fine_tune(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "e.yaml").write_text(THEN)
    recipe = small(tiny_folder) | dict(mix=dict(tokens=600), evaluate=dict(questions=8, probe_tokens=100))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = []
    real = experiments.run_stage

    def counted(cfg, out, name, stage, model):
        new, metrics = real(cfg, out, name, stage, model)
        done.append(name) if new else None
        return new, metrics

    monkeypatch.setattr(experiments, "run_stage", counted)
    result = experiments.ablation(tmp_path / "e.yaml", tmp_path / "r.yaml", seeds=1, output=tmp_path / "out")
    assert sorted(done) == ["corpus", "pretrain", "sft", "sft"]
    assert result["runs"]["untrained"]["0"] == result["before"]
    seen = [m["0"]["domain_bpb"]["values"] for m in result["runs"].values()]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert "sft" in result["arms"]["then instructions"] and result["claims"][-1]["control"]
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_an_arm_without_instructions_is_left_out(tmp_path):
    (tmp_path / "e.yaml").write_text(THEN)
    (tmp_path / "docs").mkdir()
    cfg = check_recipe(dict(data=dict(documents=str(tmp_path / "docs")), mix=dict(tokens=100)))
    arms, without = arms_of(tmp_path / "e.yaml", cfg, [])
    assert list(arms) == ["documents", "untrained"] and "no instructions" in without["instructions"]


def test_the_plan_trains_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("a plan trains nothing"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(small(tiny_folder)))
    said = experiments.planned_ablation("mix", tmp_path / "r.yaml", seeds=2, output=tmp_path / "out")
    assert "5 arms x 2 seeds = 10 runs, about 15,000 training tokens" in said
    assert all(c["text"] in said for c in read_experiment("mix")["claims"])
    assert "no recorded run of this model" in said and "either way" in said and "points can move" in said


def test_plan_figures():
    before = dict(domain_mcq=dict(values=[0, 1, 0, 0], groups=list("abcd")), general_bpb=dict(values=[2.0, 1.0]))
    assert ceiling(before, "domain_mcq") == 0.75 and ceiling(before, "general_bpb") is None
    claim = dict(text="t", metric="domain_mcq", arm="a", base="b")
    assert "the first seed will tell" in claim_lines(claim, before, 3, [])[1]
    mix = dict(tokens=None, epochs=2, parts=dict(domain=1, general=3))
    cfg = dict(model="m", mix=mix, select=dict(tokens=None))
    arm = dict(recipe=cfg, stages=["pretrain"])
    assert run_tokens(arm, [dict(text="x" * 400)]) == 2 * 100 * 4
    what = dict(name="n", about="a", equal="tokens", claims=[claim])
    said = plan_text(what, dict(a=arm), dict(b="no reason"), before, 1, dict(documents=[], instructions=[]), [])
    assert "not tested: there is no arm 'b'" in said and "no arm 'b': no reason" in said


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
    assert again.stdout.count(" of 10: ") == 1 and "1:5, seed 1" in again.stdout and not list(out.rglob("*.part"))
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
        written = tmp_path / "out" / "rehearsal" / "rows.jsonl"
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
    assert [group_count(metrics, name) for name in ("one", "same", "two", "texts", "absent")] == [1, 1, 2, 2, 0]


def test_help_names_every_experiment():
    said = command("ablate", "--help").stdout
    for name, about in abouts().items():
        assert name in said and about in said
        assert read_experiment(name)["about"] == about
    assert set(abouts()) == set(shipped()) == {*TABLE, "mip", "start", "vocab"} and len(UNITS) == 7


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
    arms, without = arms_of("select", cfg, docs)
    assert (
        list(arms)[:3] == ["standard", "web", "by random"]
        and list(without) == ["book", "news", "near in meaning"]
        and "0 tokens" in without["book"]
    )
    assert {a["recipe"]["select"]["tokens"] for a in arms.values()} == {
        80
    }  # a quarter of 1,280 bytes at four bytes a token
    assert arms["by dsir"]["recipe"]["select"]["by"] == "dsir" and arms["web"]["recipe"]["select"]["kinds"] == ["web"]


def test_one_kind_has_no_target_for_dsir():
    cfg = check_recipe(dict(demo=8, mix=dict(tokens=1000)))
    arms, without = arms_of("select", cfg, [dict(text="x" * 640, kind="book")] * 3)
    assert list(arms) == ["book", "by random", "by prior", "by density", "by both", "by quality", "by diverse"]
    assert (
        list(without) == ["standard", "web", "news", "by dsir", "near in meaning"] and "one kind" in without["by dsir"]
    )


def test_a_kind_with_less_text_than_the_budget_gives_no_arm():
    cfg = check_recipe(dict(demo=8, mix=dict(tokens=1000), select=dict(tokens=100)))
    docs = [dict(text="x" * n, kind=k) for n, k in ((1000, "standard"), (396, "news"))]
    arms, without = arms_of("select", cfg, docs)
    assert "standard" in arms and without["news"] == "about 99 tokens of this kind, where 100 are selected"
    assert experiments.told(dict(experiment="select", before={}, runs={}, claims=[], without=without)).count(
        "no arm"
    ) == len(without)


def test_equal_domain_tokens_take_no_total(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(demo=8, mix=dict(tokens=30_000, epochs=2))))
    cfg = read_recipe(tmp_path / "r.yaml")
    assert base_recipe(read_experiment("mix-domain"), cfg)["mix"]["tokens"] is None
    assert base_recipe(read_experiment("mix"), cfg)["mix"]["tokens"] == 30_000


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

    def name(g, t):
        return f"{g:.2f} {t}"

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
    "General loss 1 + 0.02 (t / 1000)^0.5 / (g + 0.1) at 30,000 tokens: within 15% from g = 0.63."

    def law(share, t):  # the domain's loss falls with its share
        domain = 0.5 + 0.1 / (share + 0.2) + 0.2 * (1000 / t) ** 0.5
        return domain, 1 + 0.02 * (t / 1000) ** 0.5 / (share + 0.1)

    result = planned((0, 0.25, 0.5, 0.75, 0.9), (3000, 6000, 9000), law)
    found, _ = experiments.advise(result, 0.15)
    want = 0.02 * 30**0.5 / 0.15 - 0.1
    assert found["feasible"] and abs((1 - found["share"]) - want) < 0.03


def test_killed_at_random_moments_an_experiment_ends_the_same(tiny_folder, tmp_path, runs):
    "Runs that were finished are kept, the one that was cut resumes, and nothing else is left in the folder."
    (tmp_path / "e.yaml").write_text(THEN)
    recipe = small(tiny_folder) | dict(mix=dict(tokens=600), evaluate=dict(questions=8, probe_tokens=100))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    out, log, rng, killed = tmp_path / "out", tmp_path / "out.log", random.Random(0), 0

    def run(seconds=None):
        return runs.run(tmp_path / "r.yaml", out, seconds, tmp_path / "e.yaml")

    def left():
        "The files of the experiment, and its figures."
        files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        result = json.loads((out / "result.json").read_text())
        return files, {name: result[name] for name in ("arms", "before", "runs", "claims", "without")}

    began = time.monotonic()
    assert run() == "exit 0", log.read_text()[-2000:]
    longest, whole = time.monotonic() - began, left()
    out.rename(tmp_path / "whole")  # the same folder again: rows name the files that they come from
    for _ in range(3):
        killed += run(rng.uniform(0.1, longest / 2)) == "signal 9"
    assert run() == "exit 0", log.read_text()[-2000:]
    assert killed >= 1 and left() == whole
    first = json.loads((out / "result.json").read_text())["provenance"]
    assert run() == "exit 0" and left() == whole
    assert json.loads((out / "result.json").read_text())["provenance"] == first


LAB = """
model: small-world
lab: {entities: 8, renderings: 4}
mix: {parts: {domain: 1}, max_epochs: 100}
pretrain: {learning_rate: 2e-3, tokens_per_step: 256, length: 256}
sft: {learning_rate: 1e-3, tokens_per_step: 256, length: 256, epochs: 2}
evaluate: {probe_tokens: 500}
"""


def test_a_small_world_is_drawn_by_the_seed_and_its_exam_too(tmp_path, monkeypatch):
    "What is trained on, and what is asked, are the rows of `demo.lab` for the run's own seed, in every arm."
    trained, asked = [], []
    train, chat = training.train, measuring.chat
    monkeypatch.setattr(training, "train", lambda m, rows, *a, **k: trained.append(rows) or train(m, rows, *a, **k))
    monkeypatch.setattr(measuring, "chat", lambda m, t, said, **k: asked.append(said) or chat(m, t, said, **k))
    (tmp_path / "r.yaml").write_text(LAB)
    result = experiments.ablation("mip", tmp_path / "r.yaml", seeds=2, output=tmp_path / "out")
    assert asked[0] == asked[1] != asked[4]  # the model before training and the first seed's arms; the second seed's
    tok = small_tokenizer()
    for seed, at in ((0, 0), (1, 3)):  # mixed, documents (which two arms share), questions afterwards
        world = lab_rows(seed, 8, 4)
        assert asked[at + 1] == asked[at + 2] == asked[at + 3] == [q["question"] for q in world["open_questions"]]
        texts = {row["text"] for row in world["documents"]}
        for rows in trained[at : at + 2]:
            read = {tok.decode(r["input_ids"], skip_special_tokens=True) for r in rows if r["source"] == "domain"}
            assert len(read & texts) >= len(texts) - 1  # the last row of a pass is cut
        said = {tok.decode(row["input_ids"]) for row in trained[at + 2]}
        assert all(any(q["messages"][0]["content"] in text for text in said) for q in world["instructions"])
    assert len(trained) == 6
    assert result["lab"] == dict(entities=8, renderings=4, wordings=3, one_wording=False, lang="en")


def test_a_small_world_has_figures_for_each_part_of_its_exam(tmp_path):
    (tmp_path / "r.yaml").write_text(LAB)
    experiment = """
about: telling in one wording
arms: {many: {}, one: {lab: {one_wording: true}}}
claims: [{text: many wordings teach more, metric: domain_exact/held-out, arm: many, base: one}]
equal: exposures
"""
    (tmp_path / "e.yaml").write_text(experiment)
    result = experiments.ablation(tmp_path / "e.yaml", tmp_path / "r.yaml", seeds=2, output=tmp_path / "out")
    for run in (*result["runs"]["many"].values(), *result["runs"]["one"].values()):
        parts = [run[f"domain_exact/{part}"] for part in ("taught", "held-out")]
        assert [len(part["values"]) for part in parts] == [4 * 4 * 3, 4 * 4 * 3]
        assert len({*parts[0]["groups"], *parts[1]["groups"]}) == 8
        assert sorted(sum((part["values"] for part in parts), [])) == sorted(run["domain_exact"]["values"])
    (claim,) = result["claims"]
    assert claim["metric"] == "domain_exact/held-out" and "domain_exact/held-out" in experiments.told(result)
    assert (tmp_path / "out" / "effects.png").stat().st_size > 5000


def test_open_answers_are_right_or_wrong(monkeypatch):
    rows = [
        dict(question="a?", reference="It is 5 bar.", group="A", part="taught"),
        dict(question="b?", reference="It is 7 bar.", group="B", part="held-out"),
    ]
    monkeypatch.setattr(measuring, "chat", lambda *a, **k: ["It is 5 bar.", "It is 5 bar."])
    found = measuring.values(measuring.figures(None, None, {}, {}, dict(domain=rows)))
    assert {name: m["values"] for name, m in found.items()} == {
        "domain_exact": [1, 0],
        "domain_exact/taught": [1],
        "domain_exact/held-out": [0],
    }
    assert found["domain_exact/held-out"]["groups"] == ["B"]


def test_small_worlds_serve_experiments_and_not_runs(tmp_path):
    (tmp_path / "r.yaml").write_text(LAB)
    p = command("run", tmp_path / "r.yaml")
    assert p.returncode == 2 and "domain-llm ablate mip" in p.stderr and "Traceback" not in p.stderr
    (tmp_path / "e.yaml").write_text("arms: {a: {}, b: {lab: {entities: 20}}}")
    with pytest.raises(InputError, match="arm 'b' changes lab.entities, which is the same for all arms"):
        read_experiment(tmp_path / "e.yaml")
    (tmp_path / "e.yaml").write_text("arms: {a: {}, b: {}}\ndefault_recipe: [x]")
    with pytest.raises(InputError, match="default_recipe"):
        read_experiment(tmp_path / "e.yaml")


def test_an_arm_that_changes_a_small_world_needs_one(tmp_path, tiny_folder):
    (tmp_path / "e.yaml").write_text("arms: {many: {}, one: {lab: {one_wording: true}}}")
    cfg = check_recipe(small(tiny_folder))
    arms, without = arms_of(tmp_path / "e.yaml", cfg, [])
    assert list(arms) == ["many"] and "the recipe has none" in without["one"]


@pytest.mark.parametrize("name", SMALL_WORLDS)
def test_instructions_in_pretraining_ask_as_much_as_those_afterwards(name):
    "In the small world the two arms of `mip` see as many tokens, of conversations and in all, within a few per cent."
    tok = small_tokenizer(SMALL_WORLDS[name])
    cfg = read_recipe(name)
    assert cfg["lab"]["lang"] == SMALL_WORLDS[name] and cfg["model"] == name == cfg["name"]
    world = lab_rows(0, **cfg["lab"])
    documents = sum(len(tok(row["text"]).input_ids) + 1 for row in world["documents"])
    rows, _ = encode_all(world["instructions"], tok, cfg["sft"]["length"], "instructions")
    conversations = sum(len(row["input_ids"]) for row in rows)
    assert cfg["sft"]["epochs"] * conversations == pytest.approx(documents / 2, rel=0.05)
