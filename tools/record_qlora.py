"""Record QLoRA on the demo model from documents to an accepted file, killed on the way, in nbs/results/qlora.json.

    python tools/record_qlora.py [--folder FOLDER]

nbs/recipes/qlora.yaml runs twice by the command line: once left alone, once killed in either training after its first
checkpoint and called again. The adapters of both are compared. Then the run's questions are put to the adapter beside
weights of 4 bits, as it was trained, to the model that it is merged into, and to the GGUF file; and `domain-llm
quantize` says which format is accepted by questions on common knowledge, of which the demo has more independent ones.
What the folder holds already is not done again.
"""

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path

from safetensors.torch import load_file

from domain_llm.core import cache_dir, read_json, read_jsonl, write_json, write_jsonl
from domain_llm.demo.general import common_questions
from domain_llm.judge.answers import value_in_answer
from domain_llm.models import base_of, greedy, load
from domain_llm.results import save_result
from domain_llm.run.pipeline import final_model
from domain_llm.ship.serve import complete
from domain_llm.train.qlora import load_for
from domain_llm.train.sft import render

RECIPE = Path(__file__).resolve().parent.parent / "nbs" / "recipes" / "qlora.yaml"
STAGES = ("pretrain", "sft")
FORMATS = "q8_0,q5_0,q4_0"
ASKED = 96  # questions for which answers are compared
LONGEST = 48  # tokens of an answer


def started(out):
    "The run's process, which writes beside its folder what it says."
    log = open(out.with_suffix(".log"), "a")
    command = ["domain-llm", "run", str(RECIPE), "--output", str(out)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stop(running):
    "Kill a run that has not ended, and what it started."
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def steps_done(out, stage):
    "The steps of the checkpoints that are whole."
    found = (out / stage / "checkpoints").glob("checkpoint-*/seal.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in found)


def killed(out, stage):
    "Call the run, kill it once a checkpoint after the start is whole, and give that checkpoint's step."
    running = started(out)
    try:
        while not any(steps_done(out, stage)):
            if running.poll() is not None:
                raise SystemExit(f"the run ended before a checkpoint of {stage}: see {out.with_suffix('.log')}")
            time.sleep(0.1)
    finally:
        stop(running)
    return steps_done(out, stage)[-1]


def cut_twice(out):
    "Kill a run in either training, once, and let it end; gives the steps at which it was killed."
    noted = out.with_suffix(".json")
    at = read_json(noted) if noted.exists() else {}
    for stage in STAGES:
        if stage not in at:
            at[stage] = killed(out, stage)
            write_json(noted, at)
    finished(out)
    return at


def finished(out):
    "Call the run and wait for its end."
    running = started(out)
    try:
        failed = running.wait()
    finally:
        stop(running)
    if failed:
        raise SystemExit(f"the run failed: see {out.with_suffix('.log')}")


def difference(one, other, stage):
    "The largest difference between two runs' adapters of a stage."
    mine, theirs = (load_file(out / stage / "model" / "adapter_model.safetensors") for out in (one, other))
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine.keys() | theirs.keys())


def as_trained(adapter):
    "The adapter beside weights of 4 bits."
    from peft import PeftModel

    model, tok = load_for("qlora", base_of(adapter))
    return PeftModel.from_pretrained(model, adapter).eval(), tok


def answers(out, questions):
    "The answers of the adapter, of the merged model and of the file, by name."
    turns = [[dict(role="user", content=row["question"])] for row in questions]
    adapter, said = final_model(out), {}
    for name, (model, tok) in (("adapter", as_trained(adapter)), ("merged", load(str(adapter)))):
        prompts = [render(turn, tok, "a question", ask=True) for turn in turns]
        said[name], _ = greedy(model, tok, prompts, LONGEST, batch_size=32)
    (file,) = (out / "quantize").rglob("*q8_0.gguf")
    said["q8_0"] = complete(file, turns, max_tokens=LONGEST)
    return said


def compared(said, questions):
    "For each model the share of right answers, and of answers that are those of the merged model."
    values = [row["choices"][row["answer"]] for row in questions]
    found = {}
    for name, texts in said.items():
        same = sum(a.strip() == b.strip() for a, b in zip(texts, said["merged"]))
        right = value_in_answer(texts, values)["values"]
        found[name] = dict(right=sum(right) / len(right), as_merged=same / len(texts))
    return found


def gate(out):
    "What `domain-llm quantize` found, and its exit status."
    exam = out.with_name("questions.jsonl")
    write_jsonl(exam, ({**row, "group": str(n)} for n, row in enumerate(common_questions())))
    done = subprocess.run(["domain-llm", "quantize", str(out), "--formats", FORMATS, "--questions", str(exam)])
    result = read_json(out / "formats" / "result.json")
    return dict(exit_status=done.returncode, verdict=result["verdict"])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=cache_dir() / "qlora", help="of both runs (default: in the cache)")
    folder, start = p.parse_args().folder, time.time()
    folder.mkdir(parents=True, exist_ok=True)
    whole, cut = folder / "whole", folder / "cut"
    finished(whole)
    at = cut_twice(cut)
    questions = read_jsonl(cut / "inputs" / "questions" / "rows.jsonl")[:ASKED]
    result = dict(
        killed_at=at,
        steps={stage: read_json(cut / stage / "trained.json")["steps"] for stage in STAGES},
        difference={stage: difference(whole, cut, stage) for stage in STAGES},
        metrics=read_json(cut / "metrics.json"),
        questions=len(questions),
        answers=compared(answers(cut, questions), questions),
        gate=gate(cut),
    )
    print(save_result("qlora", result, start))


if __name__ == "__main__":
    main()
