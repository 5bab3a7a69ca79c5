"""Shared fixtures: no network, the demo model's tokenizer, a tiny random chat model in a folder."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and what they start share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Libraries read the environment as they load: PyTorch here, the hub's at the first use.
from fixtures.pairs import make_pair  # noqa: E402

from domain_llm.models import load, load_tokenizer, tiny  # noqa: E402

HOUR = 3600  # seconds


@pytest.fixture(scope="session")
def tok():
    return load_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tok, tmp_path_factory):
    "A folder with a random two-layer chat model over the demo model's vocabulary."
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture
def in_32_bits(monkeypatch):
    "Training computes in 32 bits, on a processor with bfloat16 too: for results that are compared to the last digits."
    monkeypatch.setattr("domain_llm.devices._cpu_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def pair(tok, tmp_path_factory):
    "A small base model, without a chat template, and its chat model, as folders."
    return make_pair(tok, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def tiny_model(tiny_folder):
    return load(str(tiny_folder))


class Runs:
    "Runs in forked children of one process that has loaded the libraries."

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "MPLBACKEND": "agg"},
        )

    def _ended(self, seconds, *given):
        "How a child ended that does what is given and gets SIGKILL after some time."
        self.process.stdin.write("\t".join(map(str, given)) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        killing = threading.Timer(seconds, killed, [pid])
        killing.start()
        ended = self.process.stdout.readline().strip()
        killing.cancel()
        return ended

    def run(self, path, out, seconds=HOUR, experiment=None):
        "How a run (or an experiment) ended."
        if experiment:
            return self._ended(seconds, "experiment", path, out, experiment)
        return self._ended(seconds, "run", path, out)

    def notebook(self, path, folder, seconds):
        "How a notebook ended."
        return self._ended(seconds, "notebook", path, folder)


def killed(pid):
    "Kill a child and what it started, if it still runs."
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def runs():
    made = Runs()
    yield made
    made.process.stdin.close()
    made.process.wait(60)
