"""Two and three CPU processes train what one does: the same losses and weights, one set of files, killed and resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from domain_llm.core import read_json

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


def test_three_processes_that_cannot_share_a_step_evenly(ranks, alone):
    same_training(alone, trained(ranks, 3, "three"))


@pytest.mark.parametrize("divide", [False, True], ids=["ddp", "fsdp2"])
def test_an_adapter(ranks, divide):
    one = ranks.folder / "lora"
    if not one.exists():
        trained(ranks, 1, "lora", LORA)
    same_training(one, trained(ranks, 2, f"lora-{divide}", LORA, divide=divide))


@pytest.mark.parametrize("divide", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 2)])
def test_killed_and_resumed_with_another_number(ranks, alone, before, after, divide):
    name = f"killed-{before}-{after}-{divide}"
    at = 17 if before == 1 else 9  # a pass of the fifth step, after the checkpoint of the fourth
    out, ends = ranks("train", before, name, settings=FULL, divide=divide and before == 2, die=(before - 1, at))
    assert ends == [-9] * before and not (out / "result.json").exists() and max(checkpoints(out)) == 4
    again = trained(ranks, after, name, divide=divide and after == 2)
    same_training(alone, again)
    assert "incomplete" not in Path(f"{out}.log").read_text()
