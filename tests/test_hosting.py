"""Modelfiles and commands: the template that Ollama gets writes what the tokenizer's own does."""

import json
import re

import jinja2
import pytest

from domain_llm.core import InputError
from domain_llm.models import DEMO_MODEL, resolve
from domain_llm.ship.hosting import modelfile, pieces, serve_commands, write_hosting
from domain_llm.small_world import small_tokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TURNS = [
    [dict(role="user", content='What "is"\n a pump?')],
    [dict(role="system", content="你是助手。"), dict(role="user", content="泵？")],
    [dict(role=role, content=f"{role} {{{{ x }}}}") for role in ("user", "assistant", "user", "assistant", "user")],
]


def in_go(text, turns):
    "What Ollama writes by a Modelfile's template, its Go carried over to Jinja word by word."
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.M | re.S)[1]
    words = {
        '$last := ""': "{% set ns = namespace(last='') %}",
        "range .Messages": "{% for m in messages %}",
        ".Content": "{{ m.content }}",
        "$last = .Role": "{% set ns.last = m.role %}",
        "else": "{% else %}",
    }
    out, open_blocks = "", []
    for literal, word in re.findall(r"(.*?)\{\{ (.*?) \}\}", template, re.S):
        assert literal == "", "text outside of quotes"
        if word.startswith('"'):
            out += "{{ " + json.dumps(json.loads(word)) + " }}"
        elif word == "end":
            out += {"if": "{% endif %}", "range": "{% endfor %}"}[open_blocks.pop()]
        elif found := re.fullmatch(r'(else )?if eq (\S+) ("\w*")', word):
            name = {"$last": "ns.last", ".Role": "m.role"}[found[2]]
            out += "{% " + ("elif" if found[1] else "if") + f" {name} == {found[3]} %}}"
            open_blocks += [] if found[1] else ["if"]
        else:
            out += words[word]
            open_blocks += ["range"] if word.startswith("range") else []
    assert template.endswith("}}") and not open_blocks
    return jinja2.Environment(keep_trailing_newline=True).from_string(out).render(messages=turns)


def other(tok, template):
    "A copy of a tokenizer with another template."
    tok = type(tok)(tokenizer_object=tok.backend_tokenizer, eos_token=tok.eos_token, pad_token=tok.pad_token)
    tok.chat_template = template
    return tok


@pytest.mark.parametrize("which", ["demo", "small", "llama"])
@pytest.mark.parametrize("turns", TURNS)
def test_the_modelfile_writes_the_same_tokens(which, turns, tok):
    mine = {
        "demo": tok,
        "small": small_tokenizer(),
        "llama": other(small_tokenizer(), LLAMA.replace("{{ bos_token }}", "")),
    }[which]
    text = modelfile("x.gguf", resolve(DEMO_MODEL), mine)
    want = mine.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    got = in_go(text, turns)
    assert got == want
    assert mine(got, add_special_tokens=False).input_ids == mine(want, add_special_tokens=False).input_ids


def test_a_modelfile_states_everything(tok):
    text = modelfile("pumps-q8_0.gguf", resolve(DEMO_MODEL), tok, 2048)
    assert text.startswith("FROM ./pumps-q8_0.gguf\n")
    assert 'TEMPLATE """' in text and "PARAMETER num_ctx 2048" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    with pytest.raises(InputError, match="context"):
        modelfile("x.gguf", resolve(DEMO_MODEL), tok, 0)


@pytest.mark.parametrize(
    "template, said",
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "drops"),
        (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
            "{% if loop.index > 4 %}late{% endif %}{% endfor %}",
            "does more",
        ),
    ],
)
def test_a_template_that_cannot_be_translated_is_said(template, said):
    with pytest.raises(InputError, match=said):
        pieces(other(small_tokenizer(), template))


def test_files_and_commands(tiny_folder, tok, tmp_path):
    (tmp_path / "m-q8_0.gguf").write_bytes(b"GGUF")
    assert write_hosting(str(tiny_folder), tmp_path, 1024) is None
    assert "num_ctx 1024" in (tmp_path / "m-q8_0.Modelfile").read_text()
    said = (tmp_path / "SERVE.md").read_text()
    for command in (
        "vllm serve",
        "transformers serve",
        "llama-server -m m-q8_0.gguf -c 1024",
        "ollama create m-q8_0 -f",
    ):
        assert command in said
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = dict(base_model_name_or_path=str(tiny_folder), r=16)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    said = serve_commands(adapter, [])
    assert f"vllm serve {tiny_folder}" in said and "--max-lora-rank 16" in said and f"adapter={adapter}" in said
