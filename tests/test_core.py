import os
import signal
import subprocess
import sys
import time

import pytest

from domain_llm import core, devices
from domain_llm.devices import peak_memory_gb, reset_peak_memory, share_cores
from domain_llm.results import load_result, save_result


def test_a_folder_of_the_users_is_not_filled(tmp_path):
    for made in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        core.claim_folder(made, "formats")
        (made / "result.json").write_text("1")
        core.claim_folder(made, "formats")
        with pytest.raises(core.InputError, match="holds something else"):
            core.claim_folder(made, "review")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("mine")
    for taken in (mine, mine / "report.html"):
        with pytest.raises(core.InputError, match="holds something else.*Choose another folder with --out"):
            core.claim_folder(taken, "review")
    assert [p.name for p in mine.iterdir()] == ["report.html"] and (mine / "report.html").read_text() == "mine"


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    core.write_json(target, {"n": 1})
    code = (
        "from domain_llm import core; import time\n"
        f"with core.atomic_file({str(target)!r}) as f:\n"
        "  f.write('half'); f.flush(); print('go', flush=True); time.sleep(60)"
    )
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert core.read_json(target) == {"n": 1}


def test_atomic_dir_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    with core.atomic_dir(out) as d:
        (d / "old").write_text("1")
    with core.atomic_dir(out) as d:
        (d / "new").write_text("2")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fingerprint_follows_contents_not_times(tmp_path):
    (tmp_path / "d").mkdir()
    f = tmp_path / "d" / "x.txt"
    f.write_text("a")
    first = core.fingerprint(tmp_path / "d")
    os.utime(f, (1, 1))
    assert core.fingerprint(tmp_path / "d") == first
    f.write_text("b")
    assert core.fingerprint(tmp_path / "d") != first


def test_jsonl_errors_name_the_line(tmp_path):
    f = tmp_path / "x.jsonl"
    f.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(core.InputError, match="line 3"):
        core.read_jsonl(f)


def test_results_carry_provenance(tmp_path):
    save_result("r", {"x": 1}, started=time.time() - 5, folder=tmp_path)
    made = load_result("r", tmp_path)["provenance"]
    assert made["seconds"] == 5 and made["machine"]["versions"]["torch"] and made["machine"]["cores"] >= 1


def test_peak_memory_sees_an_allocation():
    reset_peak_memory()
    before = peak_memory_gb()
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_gb() - before > 0.2


@pytest.mark.parametrize(
    "obj",
    [
        [],
        {},
        {"a": [1, 2.5, None, True, "x"]},
        {"a": [[1, 2], [3]], "b": ["]", "[", "{\n}", "a, b"]},
        [{"a": []}, "\n[1,\n2]"],
    ],
)
def test_json_says_the_same_with_short_lists_on_a_line(obj, tmp_path):
    core.write_json(tmp_path / "x.json", obj)
    assert core.read_json(tmp_path / "x.json") == obj


def test_plain_lists_take_one_line(tmp_path):
    core.write_json(tmp_path / "x.json", {"values": list(range(1000)), "n": 1})
    assert len((tmp_path / "x.json").read_text().splitlines()) == 4


@pytest.mark.parametrize("others, given, want", [("3/99", None, "1000"), ("1/99", None, None), ("3/99", "77", "77")])
def test_threads_sleep_early_only_where_others_are_running(others, given, want, monkeypatch):
    "/proc/loadavg counts the running threads, this one included; a value of the user's stays."
    monkeypatch.setattr(devices, "file_lines", lambda path: [f"0.5 0.5 0.5 {others} 4711"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == want
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(devices, "file_lines", lambda path: [])  # a system that does not say
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_fingerprint_sees_what_links_lead_to_and_ends_in_loops(tmp_path):
    docs, elsewhere = tmp_path / "docs", tmp_path / "elsewhere"
    for folder in (docs, elsewhere):
        folder.mkdir()
    (docs / "a.md").write_text("a")
    (elsewhere / "b.md").write_text("b")
    os.symlink(elsewhere, docs / "linked")
    os.symlink(docs, docs / "loop")
    first = core.fingerprint(docs)
    (docs / ".hidden").write_text("not looked at")
    assert core.fingerprint(docs) == first
    (elsewhere / "b.md").write_text("c")
    assert core.fingerprint(docs) != first
