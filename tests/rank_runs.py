"""Runs jobs in several forked processes that find each other as those of a launcher do, loading the libraries once.

Reads lines of JSON from standard input, `{"job": NAME, "processes": N, "given": {...}}`; for each it forks N children,
waits until all have ended, as torchrun does kills the rest when one has failed, and prints how each ended. What they
print goes to FOLDER.log, FOLDER being the `out` that they are given. `die` in `given` is (process, pass): that process
kills itself before that pass of its training.
"""

import json
import os
import signal
import socket
import sys
import traceback

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor  # noqa: F401
from fixtures.shared import JOBS
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: F401
from trl import pack_dataset  # noqa: F401

from domain_llm import devices
from domain_llm.core import InputError


def free_port():
    "A port of this machine that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def dies(at):
    "Let this process kill itself before a pass of its training."
    train, made = Trainer.training_step, []

    def training_step(*args, **kw):
        made.append(1)
        if len(made) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(*args, **kw)

    Trainer.training_step = training_step


def child(rank, processes, port, job, given):
    "One process; what it prints goes to FOLDER.log."
    if processes > 1:
        places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(given["out"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    who, at = given.pop("die", (None, None))
    if who == rank:
        dies(at)
    try:
        JOBS[job](**given)
    except InputError as e:
        print(f"input: {e}", flush=True)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def ended(status):
    "How a process ended, as Python says it: its exit status, or the number of the signal with a minus."
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run(job, processes, given):
    "The ends of all processes of a job, in their order."
    port, pids = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            child(rank, processes, port, job, given)
        pids.append(pid)
    ends, left = {}, set(pids)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        ends[pid] = ended(status)
        if ends[pid] != 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return [ends[pid] for pid in pids]


torch.set_num_threads(1)
devices._cpu_bfloat16 = lambda: False  # losses are compared to the last digits
for line in sys.stdin:
    print(json.dumps(run(**json.loads(line))), flush=True)
