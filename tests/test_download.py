"""The download of the real documents, from a folder that stands for GitHub: there is no network in a test."""

import hashlib
import io
import tarfile
from pathlib import Path

import download_security as ds
import pytest
import yaml

from domain_llm.core import InputError

ROOT = Path(__file__).resolve().parent.parent
SHARED = next((p / "shared/data" for p in ROOT.parents if (p / "shared/data").is_dir()), Path("/nowhere"))
GUIDES = {
    "standard": ("OWASP/ASVS", "c0", "5.0/en", 2, {"5.0/long name.pdf": "short.pdf"}),
    "book": ("OWASP/wstg", "c0", "document", 2, {}),
    "web": ("OWASP/CheatSheetSeries", "c0", "cheatsheets", 1, {}),
}
FILES = {
    "ASVS": ["5.0/en/0x01.md", "5.0/en/0x94-Appendix-E_Contributors.md", "5.0/long name.pdf", "4.0/en/old.md"],
    "wstg": ["document/README.md", "document/1/README.md", "document/1/a.png", "document2/x.md"],
    "CheatSheetSeries": ["cheatsheets/SQL.md", "cheatsheets_draft/SQL.md", "README.md"],
}


def pack(path, top, names):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))


@pytest.fixture
def github(tmp_path, monkeypatch):
    "A folder with archives and files in GitHub's layout; gives the arguments that make the tool read it."
    source = tmp_path / "github"
    for repository, names in FILES.items():
        pack(source / "OWASP" / repository / "tar.gz" / "c0", f"{repository}-c0", names)
    (source / "raw").write_bytes(b"Some text.\r\n")
    expected = hashlib.sha256(b"Some text.\r\n").hexdigest()
    monkeypatch.setattr(ds, "GUIDES", GUIDES)
    monkeypatch.setattr(ds, "GENERAL", {name: ("raw", expected) for name in ds.GENERAL})
    return dict(archives=source.as_uri(), files=source.as_uri())


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_everything_lies_where_the_recipe_looks(github, tmp_path):
    data = tmp_path / "data"
    ds.download(data, **github)
    recipe = yaml.safe_load((ROOT / "nbs/recipes/security.yaml").read_text())["data"]
    for name in recipe["documents"] + recipe["general"] + recipe["general_probe"]:
        assert (data / name).exists(), name
    assert tree(data / "security") == [
        "book",
        "book/1_README.md",
        "book/README.md",
        "standard",
        "standard/0x01.md",
        "standard/short.pdf",
        "web",
        "web/SQL.md",
    ]
    assert (data / "security/book/1_README.md").read_text() == "document/1/README.md"
    assert (data / "general/c4_demo.jsonl").read_bytes() == b"Some text.\r\n"


def test_what_is_there_is_kept_and_a_stopped_download_resumes(github, tmp_path, capsys):
    data = tmp_path / "data"
    mine = data / "security/web/mine.md"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    ds.download(data, **github)
    assert tree(mine.parent) == ["mine.md"]
    capsys.readouterr()
    ds.download(data, archives="file:///nowhere", files="file:///nowhere")
    assert capsys.readouterr().out.count(": kept") == 6


@pytest.mark.parametrize("address", ["file:///nowhere", "http://127.0.0.1:9"])
def test_without_a_network_nothing_is_written(address, tmp_path, capsys):
    data = tmp_path / "data"
    with pytest.raises(SystemExit) as stopped:
        ds.main([str(data), "--archives", address, "--files", address])
    assert str(stopped.value).startswith(f"{address}/OWASP/ASVS/") and "Check the network" in str(stopped.value)
    assert not [p for p in data.rglob("*") if p.is_file()] and not (data / "security/standard").exists()


def test_cut_archive_and_missing_files_leave_nothing(github, tmp_path):
    archive = tmp_path / "github/OWASP/wstg/tar.gz/c0"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(InputError, match="no whole archive"):
        ds.download(tmp_path / "data", **github)
    assert tree(tmp_path / "data/security") == ["standard", "standard/0x01.md", "standard/short.pdf"]
    archive.unlink()
    archive.parent.rmdir()
    pack(archive, "wstg-c0", ["document/README.md"])
    with pytest.raises(InputError, match="holds 1 files in document, not 2"):
        ds.download(tmp_path / "data", **github)
    assert "book" not in tree(tmp_path / "data/security")


def test_changed_general_text_is_refused(github, tmp_path):
    (tmp_path / "github/raw").write_bytes(b"Another text.")
    with pytest.raises(InputError, match="The source has changed"):
        ds.download(tmp_path / "data", **github)
    assert not list((tmp_path / "data").glob("general/*"))


def test_help_names_sources_and_licences(capsys):
    with pytest.raises(SystemExit):
        ds.main(["--help"])
    said = capsys.readouterr().out
    for word in ("CC BY-SA 4.0", "ODC-BY", "record_security.py", "resumes"):
        assert word in said


@pytest.mark.skipif(not (SHARED / "security").is_dir(), reason="needs shared/data")
def test_counts_and_checksums_are_those_of_the_recorded_files():
    for name, guide in ds.GUIDES.items():
        assert len(list((SHARED / "security" / name).iterdir())) == guide[3]
    for name, (_, expected) in ds.GENERAL.items():
        assert hashlib.sha256((SHARED / "general" / name).read_bytes()).hexdigest() == expected
