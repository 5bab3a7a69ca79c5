import json, subprocess, sys
from pathlib import Path

import pytest, yaml

from domain_llm import experiments


def small(folder): return dict(name="x", model=str(folder), demo=8, pretrain=dict(length=64, tokens_per_step=256), mix=dict(tokens=1500), evaluate=dict(questions=40, probe_tokens=200))


def command(*words): return subprocess.run([str(Path(sys.executable).parent / "domain-llm"), *map(str, words)], capture_output=True, text=True, timeout=600)


def test_an_experiment_on_a_recipe_from_the_command_line(tiny_folder, tmp_path):
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(small(tiny_folder)))
    first = command("ablate", "mix", "--recipe", path, "--seeds", 2, "--output", out)
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads((out / "result.json").read_text())
    assert list(result["runs"]) == ["1:0", "1:1", "1:2", "1:5", "1:10"] and (out / "trade.png").stat().st_size > 5000
    for arm in result["runs"].values():
        assert set(arm) == {"0", "1"}
        for m in arm.values(): assert len(m["domain_mcq"]["values"]) == 40 == len(m["domain_mcq"]["groups"]) and set(m["domain_mcq"]["values"]) <= {0, 1}
    assert {c["verdict"] for c in result["claims"]} <= {"supported", "refuted", "not resolved at this size"}
    assert result["runs"]["1:0"]["0"] != result["runs"]["1:5"]["0"] and "against 1:0" in first.stdout
    (out / "runs" / "1-5-1.json").unlink()
    again = command("ablate", "mix", "--recipe", path, "--seeds", 2, "--output", out)
    assert again.stdout.count("run ") == 1 and "1:5, seed 1" in again.stdout
    assert json.loads((out / "result.json").read_text())["runs"] == result["runs"]  # the same settings and seed, the same figures


def test_help_names_every_experiment():
    said = command("ablate", "--help").stdout
    for name in experiments.EXPERIMENTS: assert name in said


@pytest.mark.parametrize("words, says", [(("ablate", "mux"), "did you mean 'mix'"), (("ablate", "mix", "--seeds", 0), "at least 1 seed"),
                                         (("ablate", "mix-domain", "--tokens", 100), "mix.epochs")])
def test_bad_input_is_one_line(words, says, tmp_path):
    p = command(*words, "--output", tmp_path / "o")
    assert p.returncode == 2 and says in p.stderr and "Traceback" not in p.stderr
