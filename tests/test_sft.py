import copy

import pytest

from domain_llm import sft
from domain_llm.core import InputError

TALK = [dict(role="system", content="Be brief."), dict(role="user", content="潮汐 2+2?"), dict(role="assistant", content="4, 当然。"),
        dict(role="user", content="and 3+3?"), dict(role="assistant", content="6")]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA2 = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% else %}<<SYS>>{{ m['content'] }}<</SYS>>{% endif %}{% endfor %}"
# Like models that drop the thoughts of earlier turns: an earlier answer is rendered differently from the last one.
REWRITES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}(short){% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_template(tok, template):
    other = copy.deepcopy(tok)
    other.chat_template = template
    return other


def labelled(row, tok): return tok.decode([l for l in row["labels"] if l != -100])


@pytest.mark.parametrize("template, want", [(CHATML, "4, 当然。<|im_end|>6<|im_end|>"), (LLAMA2, " 4, 当然。 <|im_end|> 6 <|im_end|>")])
def test_mask_covers_the_answers_and_nothing_else(tok, template, want):
    t = with_template(tok, template)
    row, = sft.encode(TALK, t)
    assert t.decode(row["input_ids"]) == t.apply_chat_template(TALK, tokenize=False)
    assert labelled(row, t) == want
    assert all(l in (-100, i) for i, l in zip(row["input_ids"], row["labels"]))


def test_own_system_prompt_is_kept_byte_for_byte(tok):
    row, = sft.encode(TALK[1:], tok)
    assert tok.decode(row["input_ids"]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_template_that_rewrites_turns_gives_a_row_per_answer(tok):
    t = with_template(tok, REWRITES)
    rows = sft.encode(TALK, t)
    assert [labelled(r, t) for r in rows] == ["4, 当然。<|im_end|>", "6<|im_end|>"]


def test_mask_agrees_with_transformers_on_a_template_with_generation_marks(tok):
    "transformers' own assistant mask, from a template that marks the answer, must label the same tokens."
    marked = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    enc = with_template(tok, marked).apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    row, = sft.encode(TALK, with_template(tok, CHATML))
    assert row["input_ids"] == list(enc["input_ids"])
    assert [int(l != -100) for l in row["labels"]] == list(enc["assistant_masks"])


def test_long_conversations_are_left_out_whole(tok):
    rows = [dict(messages=[dict(role="user", content="x"), dict(role="assistant", content="word " * n)]) for n in (5, 500)]
    kept, left = sft.encode_all(rows, tok, length=128)
    assert len(kept) == 1 and left == 1
    with pytest.raises(InputError, match="no conversation fits"): sft.encode_all(rows, tok, length=8)


@pytest.mark.parametrize("line, says", [
    ('{"messages": []}', "list of turns"), ('{"messages": [{"role": "bot", "content": "x"}]}', "role"), ('{"messages": [{"role": "user", "content": 3}]}', "content"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no answer"), ('{"prompt": "x"}', "neither"), ("", "no conversations")])
def test_bad_rows(tmp_path, line, says):
    f = tmp_path / "a.jsonl"; f.write_text(line + "\n")
    with pytest.raises(InputError, match=says): sft.read_conversations(f)


def test_alpaca_json(tmp_path):
    f = tmp_path / "a.json"; f.write_text('[{"instruction": "Add.", "input": "1 1", "output": "2"}]')
    assert sft.read_conversations(f)[0]["messages"] == [dict(role="user", content="Add.\n\n1 1"), dict(role="assistant", content="2")]
