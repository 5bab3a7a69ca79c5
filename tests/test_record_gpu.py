"""The records of a GPU: every step is written as it ends, a failure is a result, a second call goes on."""

import sys

import pytest
import record_gpu

from domain_llm.core import read_json, write_json


def command(text):
    return [sys.executable, "-c", text]


def test_a_failure_is_recorded_and_tried_again_and_what_is_done_stays(tmp_path):
    made, log = tmp_path / "made.json", tmp_path / "log"
    write = f"open({str(made)!r}, 'w').write('[1, 2]')"
    wanted = dict(
        file=(command(f"{write}; raise SystemExit(1)"), made),  # as `domain-llm quantize` where no format is accepted
        words=(command("print('format: fine')"), None),
        broken=(command(f"open({str(log)!r}, 'a').write('x'); raise MemoryError('of 24 GB')"), tmp_path / "none.json"),
        refused=(command(f"{write}; raise SystemExit(2)"), made),
        killed=(command("import os; os.kill(os.getpid(), 9)"), None),
    )
    found = record_gpu.record(wanted, tmp_path)
    assert found["file"]["result"] == [1, 2] and found["words"]["result"] == "format: fine\n"
    assert "MemoryError: of 24 GB" in found["broken"]["failed"] and found["broken"]["status"] == 1
    assert found["refused"]["status"] == 2 and found["killed"]["status"] == -9
    assert all(read_json(tmp_path / f"{name}.step.json") == found[name] for name in wanted)
    write_json(tmp_path / "file.step.json", dict(result="kept", seconds=1))
    again = record_gpu.record(wanted, tmp_path)
    assert again["file"]["result"] == "kept" and log.read_text() == "xx"


def test_the_steps_cover_the_course_and_leave_the_method_to_the_model(tmp_path):
    record_gpu.write_recipe("Qwen/Qwen2.5-7B-Instruct", record_gpu.FULL, tmp_path)
    wanted = record_gpu.steps("Qwen/Qwen2.5-7B-Instruct", record_gpu.FULL, tmp_path)
    memory = [f"memory-{method}-{n}" for method in ("lora", "qlora") for n in (256, 1024, 2048, 4096)]
    assert list(wanted) == ["plan", "check", *memory, "mix", "mip", "quantize"]
    from domain_llm.run.recipe import read_recipe

    cfg = read_recipe(tmp_path / "recipe.yaml")
    assert cfg["model"] == "Qwen/Qwen2.5-7B-Instruct" and cfg["method_open"] == ["pretrain", "sft"]


def test_the_whole_way_on_a_small_model_leaves_one_file(tmp_path, monkeypatch):
    "A short training is done; the long commands stand still."
    steps = record_gpu.steps

    def short(model, size, folder):
        found = steps(model, size, folder)
        return {name: step if name == "memory-lora-64" else (command(""), None) for name, step in found.items()}

    monkeypatch.setattr(record_gpu, "steps", short)
    record_gpu.main(["--dry", "--out", str(tmp_path / "gpu.json")])
    found = read_json(tmp_path / "gpu.json")
    assert found["dry"] and found["provenance"]["machine"]["cores"] and "commit" in found["provenance"]
    assert not [name for name, step in found["steps"].items() if "failed" in step]
    made = found["steps"]["memory-lora-64"]["result"]
    assert made["settings"]["method"] == "lora" and made["tokens_per_second"] > 0
    assert made["peak_gb"] > 0.4
    assert made["estimate_gb"] == pytest.approx(made["peak_gb"], rel=0.15)
