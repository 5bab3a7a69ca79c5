"""Two and three CPU processes train what one does: the same losses and weights, killed and resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from domain_llm.core import InputError, read_json
from domain_llm.run.families import family_size, known_model
from domain_llm.run.plan import GB, GPU
from domain_llm.run.planner import launch_file
from domain_llm.run.proposal import proposal
from domain_llm.train import shares

HERE = Path(__file__).parent
FULL = dict(method="full")
LORA = dict(method="lora", rank=4, alpha=8)


class Ranks:
    "Jobs in several processes, as tests/rank_runs.py does them."

    def __init__(self, folder):
        server = [sys.executable, str(HERE / "rank_runs.py")]
        self.process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
        self.folder = folder

    def __call__(self, job, processes, name, **given):
        "Do a job; gives its folder and how each process ended."
        out = self.folder / name
        ask = dict(job=job, processes=processes, given=dict(out=str(out), **given))
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        return out, json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.process.stdin.close()
    made.process.wait(60)


def trained(ranks, processes, name, settings=FULL, **given):
    "The folder of a tiny training in which all processes end well."
    out, ends = ranks("train", processes, name, settings=settings, **given)
    assert ends == [0] * processes, Path(f"{out}.log").read_text()[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(ranks):
    "One process, full tuning."
    return trained(ranks, 1, "alone")


def losses(out):
    "Step, loss, loss per source and score of each entry of a training's history."
    found = []
    for entry in read_json(out / "result.json")["history"]:
        wanted = {k: v for k, v in entry.items() if k == "step" or k == "score" or k.startswith("loss")}
        found.append(wanted)
    return found


def same_training(one, other, tolerance=1e-4):
    "The same losses at the same steps, the same counts, and the same weights."
    a, b = losses(one), losses(other)
    assert len(a) == len(b) > 8
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and x == pytest.approx(y, abs=tolerance)
    for name in ("best_step", "steps", "tokens", "without_labels"):
        assert read_json(one / "result.json")[name] == read_json(other / "result.json")[name]
    before, after = (torch.load(out / "weights.pt") for out in (one, other))
    assert before.keys() == after.keys()
    for name, weights in before.items():
        assert torch.allclose(weights, after[name], atol=tolerance), name


def checkpoints(out):
    "The sealed checkpoints of a training, by their steps."
    return sorted(int(p.parent.name.split("-")[1]) for p in (out / "checkpoints").glob("checkpoint-*/seal.json"))


def test_the_losses_are_sums_over_sources(alone):
    "What one process says is the truth for the rest, so it is checked by hand: of 39 documents all tokens count."
    from fixtures.shared import rows

    found = read_json(alone / "result.json")
    assert found["tokens"] == sum(len(row["input_ids"]) for row in rows())
    assert {"loss", "loss_domain", "loss_general"} <= found["history"][1].keys()


@pytest.mark.parametrize("divide", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(ranks, alone, divide):
    out = trained(ranks, 2, f"two-{divide}", divide=divide, keep=True)
    same_training(alone, out)
    assert checkpoints(out) == checkpoints(alone)
    assert {p.name for p in (out / "kept").iterdir()} == {"step-2", "step-3", "step-4", "step-6"}
    said = Path(f"{out}.log").read_text()
    assert ("0.5 of the weights" in said) == divide, said


def test_an_adapter_in_three_processes_that_cannot_share_a_step_evenly(ranks):
    one = trained(ranks, 1, "lora", LORA)
    same_training(one, trained(ranks, 3, "lora-three", LORA, divide=True))


def test_qlora_in_two_processes_trains_what_one_does(ranks, tiny_folder):
    given = dict(settings=dict(LORA, method="qlora"), folder=str(tiny_folder))
    same_training(trained(ranks, 1, "qlora", **given), trained(ranks, 2, "qlora-two", **given))


def broken(ends):
    "Whether the last process was killed and no other ended well: it is killed, or says that its neighbour is gone."
    return ends[-1] == -9 and set(ends) <= {-9, 1}


@pytest.fixture(scope="module")
def killed(ranks):
    "Trainings of which the last process has killed itself in the fifth step, by number of processes and division."
    found = {}
    for processes, divide, at in ((1, False, 17), (2, False, 9), (2, True, 9)):
        name = f"killed-{processes}-{divide}"
        out, ends = ranks("train", processes, name, settings=FULL, divide=divide, die=(processes - 1, at))
        assert broken(ends) and not (out / "result.json").exists() and max(checkpoints(out)) == 4
        found[processes, divide] = out
    return found


@pytest.mark.parametrize("divide", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_killed_and_resumed_with_another_number(ranks, alone, killed, before, after, divide):
    name = f"resumed-{before}-{after}-{divide}"
    shutil.copytree(killed[before, divide and before == 2], ranks.folder / name)
    out = trained(ranks, after, name, divide=divide and after == 2, die=(after - 1, 9 if after == 1 else 5))
    same_training(alone, out)
    assert "incomplete" not in Path(f"{out}.log").read_text()


@pytest.fixture(scope="module")
def recipe(ranks):
    "A recipe with one training of a tiny model."
    from domain_llm.models import tiny
    from domain_llm.small_world import small_tokenizer

    tok, folder = small_tokenizer(), ranks.folder / "model"
    tiny(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    set_ = dict(method="full", length=64, tokens_per_step=1024, probes=2)
    made = dict(name="small", model=str(folder), demo=8, pretrain=set_, sft=False, quantize=False)
    made |= dict(mix=dict(parts=dict(domain=1, general=0.5), epochs=1), evaluate=dict(questions=8, probe_tokens=200))
    made |= dict(select=dict(kinds=["standard", "book", "web"]))
    path = ranks.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def stage(out, name):
    return read_json(out / name / "manifest.json")["metrics"]


@pytest.fixture(scope="module")
def run_alone(ranks, recipe):
    "The recipe run by one process."
    out, ends = ranks("run", 1, "run-one", recipe=str(recipe))
    assert ends == [0], Path(f"{out}.log").read_text()[-3000:]
    return out


def assert_same_run(one, two):
    "The run of two processes counted, learnt and reported what that of one did."
    assert Path(f"{two}.log").read_text().count("Write metrics.json") == 1
    a, b = (stage(out, "pretrain") for out in (one, two))
    assert a["tokens_per_source"] == b["tokens_per_source"] and a["steps"] == b["steps"]
    assert sum(a["tokens_per_source"].values()) == a["tokens"] == b["tokens"]
    before, after = (read_json(out / "pretrain" / "history.json") for out in (one, two))
    for x, y in zip(before, after, strict=True):
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), abs=1e-3)
        assert x.get("loss_general", 0) == pytest.approx(y.get("loss_general", 0), abs=1e-3)
    assert len(list(two.glob("report.html"))) == 1
    assert stage(one, "evaluate") == pytest.approx(stage(two, "evaluate"), abs=1e-3)


def test_a_run_of_two_processes_is_killed_and_ends_as_one_does(ranks, recipe, run_alone):
    two, ends = ranks("run", 2, "run-two", recipe=str(recipe), die=(1, 80))
    assert broken(ends) and list((two / "pretrain" / "checkpoints").glob("checkpoint-*/seal.json"))
    two, ends = ranks("run", 2, "run-two", recipe=str(recipe))
    said = Path(f"{two}.log").read_text()
    assert ends == [0, 0], said[-3000:]
    assert said.count("corpus: unchanged") + said.count("skipped") >= 2
    assert_same_run(run_alone, two)


def test_a_run_with_divided_weights_ends_as_one_process_does(ranks, recipe, run_alone):
    "FSDP2: each of two processes holds half of the weights, and a whole run counts and reports as that of one."
    two, ends = ranks("run", 2, "run-divided", recipe=str(recipe), divide=True)
    said = Path(f"{two}.log").read_text()
    assert ends == [0, 0], said[-3000:]
    assert said.count("0.5 of the weights") >= 2
    assert_same_run(run_alone, two)


def test_an_error_in_the_input_is_said_once(ranks, recipe):
    wrong = ranks.folder / "wrong.yaml"
    wrong.write_text(recipe.read_text().replace("length: 64", "length: 64\n  batch: 3"))
    out, ends = ranks("run", 2, "wrong", recipe=str(wrong))
    assert ends == [2, 0]
    assert Path(f"{out}.log").read_text().count("input: ") == 1


def test_what_cannot_be_divided_is_refused(ranks):
    out, ends = ranks("train", 2, "adamw8bit", settings=dict(optimizer="adamw8bit"), divide=True)
    # both say so, and the one that is slower may be killed before it does
    assert 2 in ends and "optimizer: adamw8bit does not go with divided weights" in Path(f"{out}.log").read_text()


# The files, and the plan that names them


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_accelerate_reads_the_files(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(launch_file(name)))  # which raises for keys that it does not know
    assert found.distributed_type.value == kind and found.num_machines == 1


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_launcher_sets_what_the_training_reads(name, monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = ["--config_file", str(launch_file(name)), "--no_python", "domain-llm", "run"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(asked))
    for key, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shares.sharded() == (name == "fsdp2")


@pytest.mark.parametrize(
    "env, said",
    [(dict(ACCELERATE_USE_DEEPSPEED="true"), "fsdp2.yaml"), (dict(ACCELERATE_USE_FSDP="true"), "fsdp_version: 2")],
)
def test_other_launchers_are_refused(env, said, monkeypatch):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for key, value in {**env, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=said):
        shares.sharded()


@pytest.mark.parametrize(
    "rows, batch, processes, expected",
    [(8, 2, 1, (2, 4)), (8, 2, 2, (2, 2)), (8, 8, 2, (4, 1)), (1, 1, 2, (1, 1)), (9, 1, 2, (1, 5)), (6, 2, 4, (2, 1))],
)
def test_passes_by_hand(rows, batch, processes, expected):
    found = shares.passes(rows, batch, processes)
    assert (found["batch"], found["passes"]) == expected
    assert found["batch"] * found["passes"] * processes >= rows


def test_the_plan_chooses_and_names_the_file():
    "7.6 billion parameters take 16 bytes each in full tuning, 122 GB: no card of 80 GB alone, 30.5 GB on each of four."
    size = family_size(known_model("Qwen/Qwen2.5-7B"))

    def planned(number, gb, **more):
        asked = dict(model="Qwen/Qwen2.5-7B", cards=dict(number=number, gb=gb), **more)
        return proposal(asked, size, {**GPU, "free": gb * GB})

    full = planned(4, 80, samples=200_000)
    assert (full["choice"]["method"], full["choice"]["launch"]) == ("full", "fsdp2")
    parts = full["choice"]["parts"]
    kept = sum(parts[name] for name in ("weights", "gradients", "masters and moments"))
    assert kept == pytest.approx(16 * size["parameters"] / 4, rel=0.01)
    assert any("fsdp2.yaml --num_processes 4" in one["said"] for one in full["lines"])
    lora = planned(2, 24, samples=2_000)["choice"]
    assert (lora["method"], lora["launch"]) == ("lora", "ddp")
    assert lora["tokens_per_step"] % (2 * lora["length"] * lora["batch"]) == 0
    assert planned(1, 24, samples=2_000)["choice"]["launch"] is None
    qlora = planned(8, 12, samples=2_000, fixed=dict(method="qlora"))["choice"]
    assert qlora["launch"] == "ddp"
    one, two = (planned(n, 24, samples=1000, rate=100.0, watts=500.0)["time"] for n in (1, 2))
    assert two["seconds"] == one["seconds"] / 2 and two["kwh"] == pytest.approx(one["kwh"])


def test_processes_wait_for_days(monkeypatch):
    "PyTorch's own patience is 10 minutes on GPUs and 30 elsewhere; cleaning a corpus takes longer."
    import torch.distributed as dist

    from domain_llm import ranks as processes

    met = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: met.update(given, backend=backend))
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.join()
    assert met["timeout"].days > 30 and "gloo" in met["backend"]
