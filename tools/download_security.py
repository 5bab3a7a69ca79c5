"""Download the public documents of nbs/67_real_documents.ipynb into a folder.

    python tools/download_security.py data
    python tools/record_security.py data      # then the run on them

The archives of three repositories are read from GitHub (some 100 MB in all), and 8 MB are written:

    data/security/standard   OWASP Application Security Verification Standard 5.0, Markdown and PDF (CC BY-SA 4.0)
    data/security/book       OWASP Web Security Testing Guide, 161 Markdown files (CC BY-SA 4.0)
    data/security/web        OWASP Cheat Sheet Series, 120 Markdown files (CC BY-SA 4.0)
    data/general             WikiText-2 test (CC BY-SA 3.0), a little C4 (ODC-BY) and Wikipedia (CC BY-SA)

The three guides come from the commits of the recorded run; the files in general/ are compared with their SHA-256.
What is there already is kept and not read again, so a download that was stopped resumes with the missing part.
Remove a folder or file to download it again. Nothing is half written.
"""

import argparse
import hashlib
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath

from domain_llm.core import InputError, atomic_dir, atomic_file

# folder: repository, commit, its folder of Markdown files, number of files taken, further files with their new names
GUIDES = {
    "standard": (
        "OWASP/ASVS",
        "fe04986146b0db0a54d3eb2b9c755c78874ce910",
        "5.0/en",
        27,
        {"5.0/OWASP_Application_Security_Verification_Standard_5.0.0_en.pdf": "ASVS_5.0.0_en.pdf"},
    ),
    "book": ("OWASP/wstg", "2fab1ade827ee2336f14b7c695014191b7e2f3e1", "document", 161, {}),
    "web": ("OWASP/CheatSheetSeries", "6b8819da79e0537d072e04296ffa3adfc94ba881", "cheatsheets", 120, {}),
}
LEFT_OUT = {"0x94-Appendix-E_Contributors.md"}  # names of people
GENERAL = {
    "wikitext2_test.txt": (
        "pytorch/examples/main/word_language_model/data/wikitext-2/test.txt",
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
    "c4_demo.jsonl": (
        "hiyouga/LLaMA-Factory/main/data/c4_demo.jsonl",
        "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
    ),
    "wiki_demo.txt": (
        "hiyouga/LLaMA-Factory/main/data/wiki_demo.txt",
        "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
    ),
}
ARCHIVES = "https://codeload.github.com"
FILES = "https://raw.githubusercontent.com"


def fetch(url, to):
    "Write what stands at `url` into the open file `to`. Raises InputError when it cannot be read."
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            shutil.copyfileobj(answer, to)
    except OSError as e:
        why = getattr(e, "reason", None) or e
        raise InputError(f"{url} could not be read ({why}). Check the network or the proxy, and repeat.") from e


def wanted(path, folder, more):
    "The file name for a path in a repository, folders joined by _, or None for a file that is not taken."
    if path in more:
        return more[path]
    inside = PurePosixPath(path)
    if inside.suffix != ".md" or not inside.is_relative_to(folder) or inside.name in LEFT_OUT:
        return None
    return "_".join(inside.relative_to(folder).parts)


def unpack(archive, folder, more, to):
    "Copy the wanted files of a .tar.gz archive into the folder `to`; gives their number."
    names = set()
    for member in archive:
        path = member.name.partition("/")[2]  # the first part is the repository and commit
        name = wanted(path, folder, more) if member.isfile() else None
        if name:
            (to / name).write_bytes(archive.extractfile(member).read())
            names.add(name)
    return len(names)


def download_guide(name, to, archives=ARCHIVES):
    "Fill the folder `to` with one guide, whole or not at all."
    repository, commit, folder, count, more = GUIDES[name]
    url = f"{archives}/{repository}/tar.gz/{commit}"
    with tempfile.TemporaryFile() as packed, atomic_dir(to) as made:
        fetch(url, packed)
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed, mode="r:gz") as archive:
                found = unpack(archive, folder, more, made)
        except (tarfile.TarError, EOFError, OSError) as e:
            raise InputError(f"{url} is no whole archive ({e}). Repeat, or look at what the address gives.") from e
        if found != count:
            raise InputError(f"{url} holds {found} files in {folder}, not {count}. Is the address a full mirror?")


def download_general(name, to, files=FILES):
    "Write one general text to the path `to`, after its checksum was compared."
    path, expected = GENERAL[name]
    url = f"{files}/{path}"
    with tempfile.TemporaryFile() as read:
        fetch(url, read)
        read.seek(0)
        content = read.read()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        said = f"{url} has the SHA-256 {found[:12]}..., the file of the recorded run {expected[:12]}..."
        raise InputError(f"{said} The source has changed: any other general text in {to} serves as well.")
    with atomic_file(to, "wb") as f:
        f.write(content)


def download(data, archives=ARCHIVES, files=FILES):
    "Bring what is missing below the folder `data`, and say what was done."
    jobs = [(Path(data) / "security" / name, download_guide, name, archives) for name in GUIDES]
    jobs += [(Path(data) / "general" / name, download_general, name, files) for name in GENERAL]
    for to, job, name, base in jobs:
        there = any(to.iterdir()) if to.is_dir() else to.exists()
        if not there:
            job(name, to, base)
        print(f"{to}: {'kept' if there else 'downloaded'}", flush=True)


def main(given=None):
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("data", help="folder for the documents; made if it does not exist")
    a.add_argument("--archives", default=ARCHIVES, metavar="URL", help=f"mirror of {ARCHIVES}")
    a.add_argument("--files", default=FILES, metavar="URL", help=f"mirror of {FILES}")
    a = a.parse_args(given)
    try:
        download(a.data, a.archives, a.files)
    except InputError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
