import copy

import pytest
from fixtures.families import characters, family

from domain_llm.core import InputError
from domain_llm.demo.world import make_world
from domain_llm.train.sft import encode, encode_all, read_conversations, render_faults

TALK = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="潮汐 2+2?"),
    dict(role="assistant", content="4, 当然。"),
    dict(role="user", content="and 3+3?"),
    dict(role="assistant", content="6"),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% "
    "endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] "
    "}} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% else "
    "%}<<SYS>>{{ m['content'] }}<</SYS>>{% endif %}{% endfor %}"
)
# Like models that drop the thoughts of earlier turns: an earlier answer is rendered differently from the last one.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
    "not loop.last %}(short){% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tok, template):
    other = copy.deepcopy(tok)
    other.chat_template = template
    return other


def labelled(row, tok):
    return tok.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize(
    "template, want", [(CHATML, "4, 当然。<|im_end|>6<|im_end|>"), (LLAMA2, " 4, 当然。 <|im_end|> 6 <|im_end|>")]
)
def test_mask_covers_the_answers_and_nothing_else(tok, template, want):
    t = with_template(tok, template)
    (row,) = encode(TALK, t)
    assert t.decode(row["input_ids"]) == t.apply_chat_template(TALK, tokenize=False)
    assert labelled(row, t) == want
    assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"]))


def test_own_system_prompt_is_kept_byte_for_byte(tok):
    (row,) = encode(TALK[1:], tok)
    assert tok.decode(row["input_ids"]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_template_that_rewrites_turns_gives_a_row_per_answer(tok):
    t = with_template(tok, REWRITES)
    rows = encode(TALK, t)
    assert [labelled(r, t) for r in rows] == ["4, 当然。<|im_end|>", "6<|im_end|>"]


def test_mask_agrees_with_transformers_on_a_template_with_generation_marks(tok):
    "transformers' own assistant mask, from a template that marks the answer, must label the same tokens."
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' "
        "%}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] "
        "}}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt "
        "%}<|im_start|>assistant\n{% endif %}"
    )
    enc = with_template(tok, marked).apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    (row,) = encode(TALK, with_template(tok, CHATML))
    assert row["input_ids"] == list(enc["input_ids"])
    assert [int(label != -100) for label in row["labels"]] == list(enc["assistant_masks"])


def test_long_conversations_are_left_out_whole(tok):
    rows = [
        dict(messages=[dict(role="user", content="x"), dict(role="assistant", content="word " * n)]) for n in (5, 500)
    ]
    kept, left = encode_all(rows, tok, length=128)
    assert len(kept) == 1 and left == 1
    with pytest.raises(InputError, match="no conversation fits"):
        encode_all(rows, tok, length=8)


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"messages": []}', "list of turns"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no answer"),
        ('{"prompt": "x"}', "neither"),
        ("", "no conversations"),
    ],
)
def test_bad_rows(tmp_path, line, says):
    f = tmp_path / "a.jsonl"
    f.write_text(line + "\n")
    with pytest.raises(InputError, match=says):
        read_conversations(f)


def test_alpaca_json(tmp_path):
    f = tmp_path / "a.json"
    f.write_text('[{"instruction": "Add.", "input": "1 1", "output": "2"}]')
    assert read_conversations(f)[0]["messages"] == [
        dict(role="user", content="Add.\n\n1 1"),
        dict(role="assistant", content="2"),
    ]


def test_rows_of_a_file_say_where_they_stand(tmp_path):
    f = tmp_path / "a.json"
    f.write_text('[{"instruction": "Add.", "output": "2"}, {"instruction": "Add.", "output": "3"}]')
    assert [r["where"] for r in read_conversations(f)] == [f"{f}, row 1", f"{f}, row 2"]


SYSTEM, ASK = (
    dict(role="system", content="Be brief."),
    [
        dict(role="user", content="2+2?"),
        dict(role="assistant", content="4"),
        dict(role="user", content="3+3?"),
        dict(role="assistant", content="6"),
    ],
)
# The whole row, written by hand; [[ and ]] enclose the labelled tokens.
# Baichuan 2 labels the token after an answer with </s>, as its authors' own fine-tuning does.
CONVERSATIONS = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[4<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "3+3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[6<|eot_id|>]]",
        "4<|eot_id|>6<|eot_id|>",
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n[[6<|im_end|>]]\n",
        "4<|im_end|>6<|im_end|>",
    ),
    "glm4": (
        "[gMASK]<sop><|user|>\n2+2?<|assistant|>[[\n4<|user|>]]\n3+3?<|assistant|>[[\n6<|user|>]]",
        "\n4<|user|>\n6<|user|>",
    ),
    "baichuan2": ("<reserved_106>2+2?<reserved_107>[[4<reserved_106>]]3+3?<reserved_107>[[6</s>]]", "4</s>6</s>"),
    "mistral": ("<s>[INST] 2+2? [/INST][[4</s>]][INST] 3+3? [/INST][[6</s>]]", "4</s>6</s>"),
    "gemma": (
        "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n[[4<end_of_turn>]]\n"
        "<start_of_turn>user\n3+3?<end_of_turn>\n<start_of_turn>model\n[[6<end_of_turn>]]\n",
        "4<end_of_turn>6<end_of_turn>",
    ),
}


def shown(row, tok):
    "A row as text with [[ and ]] around its labelled tokens."
    out, runs = "", [[None, []]]
    for i, label in zip(row["input_ids"], row["labels"]):
        if (label != -100) != runs[-1][0]:
            runs.append([label != -100, []])
        runs[-1][1].append(i)
    for on, ids in runs[1:]:
        out += f"[[{tok.decode(ids)}]]" if on else tok.decode(ids)
    return out


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_mask_and_end_of_turn_of_each_family(name):
    tok = family(name)
    (row,) = encode(ASK, tok)
    whole, learnt = CONVERSATIONS[name]
    assert shown(row, tok) == whole and labelled(row, tok) == learnt
    ended = tok.apply_chat_template(ASK, tokenize=False)
    assert (
        row["input_ids"][: len(tok(ended, add_special_tokens=False).input_ids)]
        == tok(ended, add_special_tokens=False).input_ids
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_begins_with_one_beginning_of_text_token(name):
    tok = family(name)
    (row,) = encode(ASK, tok)
    assert tok.bos_token_id is None or row["input_ids"].count(tok.bos_token_id) == (
        name in ("llama3", "mistral", "gemma")
    )


@pytest.mark.parametrize("name", [*CONVERSATIONS, "smollm2"])
def test_control_tokens_in_a_turn_stay_text(tok, name):
    tok = tok if name == "smollm2" else family(name)
    controls = {i: t.content for i, t in tok.added_tokens_decoder.items() if t.special}
    written = "What do " + " and ".join(controls.values()) + " mean?"
    (plain,) = encode([dict(role="user", content="What do they mean?"), dict(role="assistant", content="4")], tok)
    (asked,) = encode([dict(role="user", content=written), dict(role="assistant", content="4")], tok)
    (answered,) = encode(
        [dict(role="user", content="What do they mean?"), dict(role="assistant", content=written)], tok
    )

    def count(row):
        return {i: row["input_ids"].count(i) for i in controls}

    assert count(asked) == count(plain) == count(answered)
    assert tok.decode(asked["input_ids"]) == tok.decode(plain["input_ids"]).replace("What do they mean?", written)
    assert labelled(asked, tok) == labelled(plain, tok) and labelled(answered, tok) == labelled(plain, tok).replace(
        "4", written
    )


def test_ordinary_rows_are_tokenized_as_before(tok):
    "The ids are those of the tokenizer over the rendered text, for rows of the demo and of TALK."
    rows = [r["messages"] for r in make_world(seed=0, entities=8)["instructions"]] + [TALK]
    for messages in rows:
        text = tok.apply_chat_template(messages, tokenize=False)
        (row,) = encode(messages, tok)
        assert row["input_ids"] == tok(text, add_special_tokens=False).input_ids


def test_a_refused_conversation_names_its_row():
    rows = [dict(messages=ASK, where="a.jsonl, row 1"), dict(messages=[SYSTEM] + ASK, where="a.jsonl, row 2")]
    with pytest.raises(InputError, match=r"a\.jsonl, row 2.*system, user.*System role not supported"):
        encode_all(rows, family("gemma"))
    with pytest.raises(InputError, match="conversation 2.*alternate"):
        encode_all([dict(messages=ASK), dict(messages=[ASK[0]] + ASK)], family("gemma"))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_opened_by_the_assistant_is_refused(name):
    with pytest.raises(InputError, match="row 7.*opened by the assistant"):
        encode_all([dict(messages=ASK[1:], where="row 7")], family(name))


def test_faults_of_all_rows_are_listed():
    rows = [dict(messages=ASK), dict(messages=[SYSTEM] + ASK), dict(messages=ASK[1:]), dict(messages=ASK[:2] + ASK[1:])]
    faults = dict(render_faults(rows, family("gemma")))
    assert set(faults) == {1, 2, 3}
    assert (
        "System role not supported" in faults[1] and "opened by the assistant" in faults[2] and "alternate" in faults[3]
    )


def test_contents_that_the_template_drops_are_a_fault(tok):
    silent = with_template(
        tok, CHATML.replace("{{ m['content'] }}", "{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}")
    )
    assert [
        (n, "leaves out the system's turn 'Be brief.'" in why)
        for n, why in render_faults([dict(messages=ASK), dict(messages=[SYSTEM] + ASK)], silent)
    ] == [(1, True)]


def test_thoughts_that_the_template_drops_are_no_fault(tok):
    thinker = with_template(
        tok, CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1].strip() }}")
    )
    talk = [ASK[0], dict(role="assistant", content="<think>\nTwo and two.\n</think>\n\n4")]
    assert render_faults([dict(messages=talk)], thinker) == []


def test_a_tokenizer_without_offsets_gives_the_same_mask():
    slow = characters(CONVERSATIONS["mistral"][0], family("mistral").chat_template)
    assert not slow.is_fast
    (row,) = encode(ASK, slow)

    def text(ids):
        return "".join(slow.convert_ids_to_tokens(ids))

    assert text(row["input_ids"]) == CONVERSATIONS["mistral"][0].replace("[[", "").replace("]]", "")
    assert text([label for label in row["labels"] if label != -100]) == CONVERSATIONS["mistral"][1]
    (asked,) = encode([dict(role="user", content="</s><s> 3?"), ASK[1]], slow)
    assert text(asked["input_ids"]) == "<s>[INST] </s><s> 3? [/INST]4</s>" and [
        asked["input_ids"].count(i) for i in (slow.bos_token_id, slow.eos_token_id)
    ] == [1, 1]


@pytest.mark.parametrize("answer", [">", "|>", "end|>", "s>", "</s>", "<|im_end|>"])
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "llama3", "mistral", "gemma"])
def test_an_answer_that_looks_like_the_end_mark_gets_no_second_one(tok, name, answer):
    tok = tok if name == "smollm2" else family(name)
    talk = [ASK[0], dict(role="assistant", content=answer)]
    (row,) = encode(talk, tok)
    assert tok.decode(row["input_ids"]) == tok.apply_chat_template(talk, tokenize=False)
