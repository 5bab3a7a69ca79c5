"""The measured peak of a training: a known amount is seen, older peaks and other things are not counted."""

import time

import pytest
import torch

from domain_llm.run import peak
from domain_llm.run.peak import memory_figures, peak_findings, watched, watched_training

MB = 1_000_000
CPU = torch.device("cpu")


def held_for_a_moment(megabytes):
    "Memory of so many MB, written to, held for as long as several looks take, and freed."
    block = torch.ones(megabytes * MB // 4)
    time.sleep(5 * peak.EVERY)
    del block


@pytest.mark.parametrize("older, now", [(200, 80), (0, 80), (80, 200)])
def test_a_known_amount_is_seen_under_an_older_peak_and_above_it(older, now):
    held_for_a_moment(older)
    with watched(CPU) as held:
        held_for_a_moment(now)
    assert held["most"] - held["before"] == pytest.approx(now * MB, abs=8 * MB)


def test_memory_that_was_freed_before_is_not_taken_for_the_trainings():
    "Small blocks stay with the C library when they are freed; a training that gets them again needs them all the same."
    blocks = [bytearray(50_000) for _ in range(1600)]  # 80 MB
    for block in blocks:
        block[::4096] = b"x" * len(block[::4096])
    del blocks, block
    with watched(CPU) as held:
        blocks = [b"x" * 50_000 for _ in range(1000)]  # 50 MB
        time.sleep(5 * peak.EVERY)
    assert held["most"] - held["before"] == pytest.approx(50 * MB, abs=10 * MB)
    assert len(blocks) == 1000


def test_a_look_costs_less_than_a_hundredth_of_the_time():
    began, looks = time.thread_time(), 300
    for _ in range(looks):
        peak._held()
    assert (time.thread_time() - began) / looks < 0.01 * peak.EVERY


def test_an_error_inside_ends_the_watching():
    with pytest.raises(KeyError):
        with watched(CPU) as held:
            raise KeyError
    assert held["most"] >= held["before"]


def test_on_a_gpu_pytorch_counts(monkeypatch):
    said = dict(memory_allocated=3e9, max_memory_allocated=8e9, reset_peak_memory_stats=None)
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with watched(torch.device("cuda")) as held:
        pass
    assert held == dict(before=3e9, most=8e9)


@pytest.mark.parametrize(
    "kind, before, most, peak_gb",
    [
        ("cpu", 3.0, 6.0, 4.55),  # 1 of weights, 0.55 of program, so 1.45 of others
        ("cpu", 1.2, 6.0, 6.0),  # less than weights and program: nothing of others
        ("cuda", 3.0, 6.0, 4.5),  # 2 of others, and the program comes on top
        ("cuda", 1.0, 6.0, 6.5),
    ],
)
def test_what_others_held_is_taken_off(kind, before, most, peak_gb):
    held = dict(before=before * 1e9, most=most * 1e9)
    found = memory_figures(held, 1e9, {"weights": 1e9, "activations": 3e9}, kind)
    assert found == dict(estimate_gb=4.0, peak_gb=peak_gb)


@pytest.fixture
def estimated(monkeypatch):
    "An estimate of 250 MB for any model, and a program that holds nothing."
    monkeypatch.setattr(peak, "PROGRAM", dict(cpu=0))
    monkeypatch.setattr(peak, "loaded_sizes", lambda model: {})
    monkeypatch.setattr(peak, "memory_parts", lambda *given: {"weights": 100 * MB, "activations": 150 * MB})


def trained(folder, megabytes=200):
    "A training of a model of 100 MB that holds so much more, watched."

    def train(model, rows, out, set_, probe, seed):
        assert (rows, out, set_, probe, seed) == ([1], folder, {}, None, 7)
        held_for_a_moment(megabytes)
        return dict(steps=4)

    model = torch.nn.ParameterList([torch.ones(25 * MB)])
    model.device = CPU
    return watched_training(train, model, [1], folder, {}, None, seed=7)


def test_a_training_gets_its_estimate_and_its_peak(estimated, tmp_path):
    held_for_a_moment(400)
    found = trained(tmp_path)
    assert found["steps"] == 4 and found["memory"]["estimate_gb"] == 0.25
    assert found["memory"]["peak_gb"] == pytest.approx(0.3, abs=0.02)
    (warned,) = peak_findings("sft", found)
    assert (
        warned["level"] == "warning" and "sft held 0.3" in warned["said"] and "estimate was 0.25 GB" in warned["said"]
    )


def test_a_training_that_ended_before_and_one_of_several_processes_have_no_figures(estimated, tmp_path, monkeypatch):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "seal.json").write_text("{}")
    assert trained(tmp_path, 1) == dict(steps=4)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-3")
    assert "memory" in trained(tmp_path, 1)
    monkeypatch.setattr(peak, "world", lambda: 2)
    assert trained(tmp_path, 1) == dict(steps=4)


@pytest.mark.parametrize("peak_gb, share", [(4.39, None), (4.45, "+11%"), (3.61, None), (3.5, "-12%")])
def test_a_tenth_is_the_limit_in_both_directions(peak_gb, share):
    found = peak_findings("pretrain", dict(memory=dict(estimate_gb=4.0, peak_gb=peak_gb)))
    assert len(found) == (share is not None)
    for one in found:
        assert f"held {peak_gb:.2f} GB" in one["said"] and "4.00 GB" in one["said"] and share in one["said"]
        assert f"{peak_gb / 0.9:.2f} GB free" in one["said"]
    assert peak_findings("pretrain", {}) == []
