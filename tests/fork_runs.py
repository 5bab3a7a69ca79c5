"""Runs recipes, experiments and notebooks in forked children, so that the libraries are loaded once for all of them.

Reads lines of tab-separated fields from standard input: 'run RECIPE FOLDER', 'experiment RECIPE FOLDER EXPERIMENT' or
'notebook PATH FOLDER'. For each it forks a child in a session of its own, prints the child's process id, does there
what the line says, with what it prints in FOLDER.log, and prints how it ended: 'exit CODE' or 'signal NUMBER'.
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401
from nbdev.config import get_config
from nbdev.test import test_nb

from domain_llm.core import InputError
from domain_llm.run.experiments import ablation
from domain_llm.run.pipeline import run_recipe


def notebook(path, folder):
    "Execute the cells that nbdev's settings do not leave out; temporary files go into the folder."
    Path(folder).mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    config = get_config()
    passed, _ = test_nb(Path(path), config.tst_flags.split(), basepath=config.config_path)
    return 0 if passed else 1


def done(what, path, out, *more):
    "The exit status of what a line asks for."
    try:
        if what == "notebook":
            return notebook(path, out)
        if what == "experiment":
            ablation(*more, path, output=out)
        else:
            run_recipe(path, out)
        return 0
    except InputError as e:
        print(e)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1


def child(what, path, out, *more):
    "The process that does what a line asks for."
    os.setsid()
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = done(what, path, out, *more)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    given = line.rstrip("\n").split("\t")
    pid = os.fork()
    if pid == 0:
        child(*given)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    print(how, flush=True)
