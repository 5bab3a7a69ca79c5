"""Shared fixtures: no network, the demo model's tokenizer, a tiny random chat model in a folder."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def tok():
    from domain_llm.models import load_tokenizer
    return load_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tok, tmp_path_factory):
    "A folder with a random two-layer chat model over the demo model's vocabulary."
    from domain_llm.models import tiny
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny(tok).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder):
    from domain_llm.models import load
    return load(str(tiny_folder))
