"""Runs recipes in forked children, so that a run that is started and killed a hundred times loads its libraries once.

Reads lines 'RECIPE<tab>FOLDER' or 'RECIPE<tab>FOLDER<tab>EXPERIMENT' from standard input; for each it forks a child in
a session of its own, prints the child's process id, runs the recipe (or the experiment on it) there, and prints how it
ended: 'exit CODE' or 'signal NUMBER'.
"""

import os
import sys

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401

from domain_llm.core import InputError
from domain_llm.run.experiments import ablation
from domain_llm.run.pipeline import run_recipe


def child(path, out, experiment=None):
    "The run itself; what it prints goes to FOLDER.log."
    os.setsid()
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if experiment:
            ablation(experiment, path, output=out)
        else:
            run_recipe(path, out)
    except InputError as e:
        print(e, flush=True)
        os._exit(2)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


for line in sys.stdin:
    given = line.rstrip("\n").split("\t")
    pid = os.fork()
    if pid == 0:
        child(*given)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    print(how, flush=True)
