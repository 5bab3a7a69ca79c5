"""A chat model is trained in the format in which it will be asked.

Truths: transformers' prompts and assistant masks, TRL's templates with generation marks, published templates and stop
tokens, and templates, tokenizers and rows that are broken on purpose."""

import copy
import hashlib
import inspect
import re
from itertools import product

import pytest
from fixtures.families import FAMILIES, STOPS, carried_by_trl, characters, family

from domain_llm.models import tiny
from domain_llm.ship.fidelity import compare_with_original
from domain_llm.ship.gguf import export_gguf
from domain_llm.train.format import (
    answer_faults,
    begin_findings,
    format_findings,
    stop_tokens,
    system_findings,
    system_prompt,
    trained_answers,
)
from domain_llm.train.sft import encode, rows_or_fault


def turns(*pairs):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [dict(role=roles[role], content=content) for role, content in pairs]


SYSTEM = {"en": ("s", "Answer in one word."), "zh": ("s", "请用一个词回答。")}
TALKS = {
    "en": [("u", "At what pressure does the valve open?"), ("a", "40 bar."), ("u", "And then?"), ("a", "Log it.")],
    "zh": [("u", "安全阀在多少巴打开？"), ("a", "四十巴。"), ("u", "然后呢？"), ("a", "每200小时加油，并记录。")],
}
NAMES = [*FAMILIES, "smollm2"]
NO_SYSTEM = {"mistral": "Conversation roles must alternate", "gemma": "System role not supported"}
DEFAULTS = {
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}
TALK = turns(*TALKS["en"])
BEGINS = {"glm4": ["a text begins with the tokens"]}  # with [gMASK] alone in llama.cpp; conversations do not


@pytest.fixture
def named(tok):
    "The tokenizer of a family by its name."
    return lambda name: copy.deepcopy(tok if name == "smollm2" else family(name))


def stops_of(name, tok):
    return tok.convert_tokens_to_ids(STOPS[name])


def levels(found):
    return [(f["level"], f["said"]) for f in found if f["level"] != "note"]


def said(found, level):
    return [f["said"] for f in found if f["level"] == level]


def with_template(tok, template):
    other = copy.deepcopy(tok)
    other.chat_template = template
    return other


# Published templates


def test_the_fixtures_are_the_templates_that_trl_carries():
    for name, file in {"llama3": "llama3", "qwen2.5": "qwen2_5", "gemma": "gemma"}.items():
        assert family(name).chat_template == carried_by_trl(file)


def test_mistrals_is_the_one_that_llama_cpp_python_carries():
    "By its SHA-256 in version 0.3.36, since the package is not installed: it would have to be compiled."
    carried = "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7"
    assert hashlib.sha256(family("mistral").chat_template.encode()).hexdigest() == carried


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language, system, several", product(("en", "zh"), (False, True), (False, True)))
def test_a_published_format_is_kept(named, name, language, system, several):
    "The prompts are those of transformers, rendered and tokenized in one call; then no finding speaks against it."
    tok = named(name)
    messages = turns(*[SYSTEM[language]] * system, *TALKS[language][: 4 if several else 2])
    rows = [dict(messages=messages, where="a.jsonl, row 1")]
    found = format_findings(rows, tok, stops_of(name, tok))
    if system and name in NO_SYSTEM:
        (error,) = said(found, "error")
        assert error.startswith("a.jsonl, row 1: ") and NO_SYSTEM[name] in error
        return
    coded = encode(messages, tok)
    answers = trained_answers(messages, coded, tok)
    assert [a["turn"] for a in answers] == [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for a in answers:
        before = messages[: a["turn"]]
        prompt = tok.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert a["row"]["input_ids"][: a["start"]] == prompt and a["start"] == len(prompt)
        text = tok.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        assert tok.decode(a["row"]["input_ids"][: a["start"]]) == text
    assert levels(found) == []
    assert any(f"{len(answers)} answer" in note and "Generation stops there." in note for note in said(found, "note"))


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_sends_the_model_the_tokens_of_training(named, name, tmp_path):
    "Its own reading of a published template, in either language, with and without a system message, in several turns."
    tok = named(name)
    model = tiny(tok)
    for part in (model, tok):
        part.save_pretrained(tmp_path / "model")
    talks = []
    for language, system, length in product(("en", "zh"), (False, name not in NO_SYSTEM), (1, 3)):
        talks.append(turns(*[SYSTEM[language]] * system, *TALKS[language][:length]))
    file = export_gguf(tmp_path / "model", tmp_path / "gguf", "f32")["f32"]
    found = compare_with_original(file, model, tok, talks, max_tokens=1)
    assert [problem[:29] for problem in found["problems"]] == BEGINS.get(name, [])


MARKED = {  # the published template with transformers' marks of what the assistant writes, by hand
    "mistral": (
        "{{ message['content'] + eos_token}}",
        "{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}",
    ),
    "glm4": (
        "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}",
        "{% if item['role'] == 'assistant' %}<|assistant|>{% generation %}{{ '\n' }}{{ item['content'] }}"
        "{% endgeneration %}"
        "{% else %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endif %}",
    ),
    "baichuan2": (
        "{{- '<reserved_107>' + message['content'] -}}",
        "{{- '<reserved_107>' -}}{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}",
    ),
    "smollm2": (
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}",
    ),
}
OF_TRL = {"llama3": "llama3", "qwen2.5": "qwen2_5", "gemma": "gemma", "qwen3": "qwen3"}


def marked_template(name, tok):
    if name in OF_TRL:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tok)
    plain, marked = MARKED[name]
    assert tok.chat_template.count(plain) == 1
    return tok.chat_template.replace(plain, marked)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", TALKS)
def test_the_labels_are_the_assistant_tokens_of_transformers(named, name, language):
    "But for line ends: TRL counts Qwen's before the answer and Gemma's after the mark, which no model generates."
    tok = named(name)
    messages = turns(*TALKS[language][: 2 if name == "qwen3" else 4])  # TRL changes how Qwen3 writes earlier answers
    (row,) = encode(messages, tok)
    masked = tok.apply_chat_template(
        messages, chat_template=marked_template(name, tok), return_dict=True, return_assistant_tokens_mask=True
    )
    ids, ends = masked["input_ids"], stops_of(name, tok)
    assert row["input_ids"][: len(ids)] == ids
    words = [at for at, i in enumerate(ids) if i not in ends and not tok.decode([i]).isspace()]
    assert [at for at in words if row["labels"][at] == ids[at]] == [at for at in words if masked["assistant_masks"][at]]
    trained = [label for label in row["labels"] if label in ends]
    assert len(trained) == len(messages) // 2


@pytest.mark.parametrize("name", OF_TRL)
def test_trl_too_finds_that_the_end_is_trained(named, name):
    from trl.chat_template_utils import is_chat_template_stop_token_trained

    tok = named(name)
    assert is_chat_template_stop_token_trained(tok, marked_template(name, tok))


# (a) Training and use


def test_what_a_template_writes_only_when_asked_is_an_error():
    "DeepSeek-R1's published template opens a thought in the prompt and takes it out of the answers."
    tok = with_template(family("llama3"), carried_by_trl("deepseek_r1_distill"))
    (error,) = said(format_findings([dict(messages=TALK)], tok), "error")
    assert r"asks for an answer with '<think>\n' at the end" in error


def loose(answer):
    return [dict(messages=turns(("u", "Where is the valve?"), ("a", answer)), where="b.jsonl, row 7")]


def test_an_answer_that_melts_into_the_prompt_is_named(tok):
    "One of two is a warning, all of them an error, since then the format itself is wrong."
    bad, good = loose("\n\nAt the pump."), [dict(messages=TALK)]
    (warning,) = said(format_findings(bad + good, tok), "warning")
    assert warning.startswith("b.jsonl, row 7: ") and r"'\n\n'" in warning and "Remove the white space" in warning
    assert said(format_findings(bad, tok), "error") and not said(format_findings(bad, tok), "warning")
    assert not any("byte for byte" in note for note in said(format_findings(bad + good, tok), "note"))


def test_a_bracket_that_the_tokenizer_joins_is_found():
    "Mistral's prompt ends with a bracket of plain text; a vocabulary with a piece for two brackets joins them."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("[INST] x [/INST](a)</s>") - {" "})
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "Ġ", *letters, "]("])}
    inner = Tokenizer(models.BPE(vocab, [("]", "(")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tok.chat_template = family("mistral").chat_template
    (error,) = said(format_findings([dict(messages=turns(("u", "x"), ("a", "(a)")))], tok), "error")
    assert "as ']('" in error and "Begin the answer with a word." in error
    assert levels(format_findings([dict(messages=turns(("u", "x"), ("a", "a")))], tok)) == []


def test_text_of_a_special_token_is_pointed_out_and_read_as_transformers_reads_it_on_request(tok):
    messages = turns(("u", "What does <|im_end|> mean?"), ("a", "An end."))
    (warning,) = said(format_findings([dict(messages=messages)], tok), "warning")
    assert "special token <|im_end|>" in warning
    if "sanitize_control_tokens" not in inspect.signature(tok.apply_chat_template).parameters:
        pytest.skip("this transformers has no sanitize_control_tokens")
    asked = dict(add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True)
    prompt = tok.apply_chat_template(messages[:1], **asked)
    assert encode(messages, tok)[0]["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("cut", ["system prompt", "white space at the end of prompts"])
def test_rows_of_another_rendering_are_an_error(tok, cut):
    "Rows made without the model's own system prompt, or from stripped prompts, are not what a server sends."
    if cut == "system prompt":
        other = with_template(tok, re.sub(r"{% if loop.first.*?{% endif %}", "", tok.chat_template, flags=re.S))
        coded = encode(TALK[:2], other)
        assert "SmolLM" not in tok.decode(coded[0]["input_ids"])
    else:
        text = tok.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True).rstrip()
        before, after = (tok(part).input_ids for part in (text, "40 bar.<|im_end|>"))
        coded = [dict(input_ids=before + after, labels=[-100] * len(before) + after)]
    found = format_findings([dict(messages=TALK[:2])], tok, tried=[(coded, None)])
    (error,) = said(found, "error")
    assert "where a server reads" in error and "Use the same template" in error


# (b) The system prompt


@pytest.mark.parametrize("name", NAMES)
def test_a_default_system_prompt_is_found(named, name):
    assert system_prompt(named(name)) == DEFAULTS.get(name, "")


def test_a_default_system_prompt_is_found_in_llama_2s_form():
    template = (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
        "{% set s = 'You are careful.' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if m.role == 'user' %}[INST] {% if loop.first %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content }} "
        "[/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    assert system_prompt(with_template(family("mistral"), template)) == "You are careful."


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_kept_replaced_emptied_and_mixed(named, name):
    tok, default = named(name), DEFAULTS[name]
    kept, own, empty, same = (
        [dict(messages=turns(*first, *TALKS["zh"]))]
        for first in ([], [("s", "请简短。")], [("s", "")], [("s", default)])
    )
    for rows, words in {
        "kept": (kept + same, "stands in all conversations (2)"),
        "own": (own * 3, "'请简短。'"),
        "empty": (empty, "an empty system prompt"),
        "two": (own + empty + own, "2 system prompts, most often the system prompt '请简短。'"),
    }.values():
        (found,) = system_findings(rows, tok)
        assert found["level"] == "note" and repr(default) in found["said"] and words in found["said"]
    (mixed,) = system_findings(kept + own + same + kept, tok)
    assert mixed["level"] == "warning" and mixed["said"].startswith("1 of 4 conversations replace")


def test_without_a_default_a_mixture_is_a_note():
    rows = [dict(messages=TALK), dict(messages=turns(("s", "Be brief."), *TALKS["en"]))]
    (mixed,) = system_findings(rows, family("llama3"))
    assert mixed["level"] == "note" and "1 of 2 conversations have the system prompt 'Be brief.'" in mixed["said"]
    (none,) = system_findings(rows[:1], family("llama3"))
    assert none["level"] == "note" and "neither the template nor the conversations" in none["said"]


# (c) One beginning


def begun(tok):
    return begin_findings(encode(TALK, tok)[0]["input_ids"], tok)


@pytest.mark.parametrize("name", NAMES)
def test_published_templates_begin_once_and_the_tokenizers_addition_is_noted(named, name):
    tok = named(name)
    found = begun(tok)
    doubles = tok(tok.apply_chat_template(TALK, tokenize=False)).input_ids != encode(TALK, tok)[0]["input_ids"]
    adds = tok("x").input_ids != tok("x", add_special_tokens=False).input_ids
    assert [f["level"] for f in found] == ["note"] * adds and adds == (name in ("llama3", "glm4", "mistral", "gemma"))
    assert not adds or (doubles and "add_special_tokens=False" in found[0]["said"])


@pytest.mark.parametrize("name, twice", [("llama3", "<|begin_of_text|>" * 2), ("glm4", "[gMASK]<sop>" * 2)])
def test_a_tokenizer_that_always_adds_a_beginning_is_an_error(name, twice):
    tok = copy.deepcopy(family(name))

    class Always(type(tok)):
        def __call__(self, text, **kw):
            return super().__call__(text, **{**kw, "add_special_tokens": True})

    tok.__class__ = Always
    (error,) = [f for f in begun(tok) if f["level"] == "error"]
    assert twice in error["said"]


def test_a_template_that_writes_its_beginning_twice_is_an_error():
    tok = with_template(family("gemma"), "{{ bos_token }}" + family("gemma").chat_template)
    assert "<bos><bos>" in said(format_findings([dict(messages=TALK)], tok), "error")[0]


def test_a_beginning_that_only_the_tokenizer_writes_is_a_warning():
    tok = with_template(family("llama3"), family("llama3").chat_template.replace("bos_token + content", "content"))
    (warning,) = begun(tok)
    assert warning["level"] == "warning" and "<|begin_of_text|> before plain text" in warning["said"]


def test_a_template_that_writes_the_date_is_noted():
    tok = with_template(family("llama3"), carried_by_trl("llama3_2"))
    assert any("today's date" in note for note in said(format_findings([dict(messages=TALK)], tok), "note"))
    assert not any("date" in f["said"] for f in format_findings([dict(messages=TALK)], family("llama3")))


# (d) The end


@pytest.mark.parametrize("name", NAMES)
def test_a_mark_at_which_generation_does_not_stop_is_a_warning(named, name):
    tok = named(name)
    mark = tok.decode([label for label in encode(TALK, tok)[-1]["labels"] if label != -100][-1])
    others = [i for i in stops_of(name, tok) if tok.decode([i]) != mark]
    (warning,) = said(format_findings([dict(messages=TALK)], tok, others), "warning")
    assert warning.startswith(f"2 answers end in {mark}, but generation stops at ") and "eos_token_id" in warning
    assert others or "no token" in warning


def test_a_turn_that_ends_with_plain_text_is_an_error(tok):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n###\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (error,) = said(format_findings([dict(messages=TALK)], with_template(tok, template)), "error")
    assert "'###', no mark that ends a turn" in error


def test_an_end_mark_that_the_tokenizer_does_not_know_is_an_error():
    "Gemma's template over Llama's tokenizer: <end_of_turn> is then eleven letters."
    tok = with_template(family("llama3"), family("gemma").chat_template)
    assert any(
        "no mark that ends a turn" in error for error in said(format_findings([dict(messages=TALK)], tok), "error")
    )


def test_stop_tokens_come_from_the_files_of_a_model(tok, tmp_path):
    from transformers import AutoConfig

    model = tiny(tok)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert stop_tokens(tmp_path / "m", config) == [2, 0]
    (tmp_path / "m" / "generation_config.json").unlink()
    assert stop_tokens(tmp_path / "m", config) == [tok.eos_token_id]
    config.eos_token_id = None
    assert stop_tokens(tmp_path / "m", config) == []


# (e) The labels


def test_a_template_that_ignores_the_request_for_an_answer_is_an_error(tok):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (error,) = said(format_findings([dict(messages=TALK)], with_template(tok, template)), "error")
    assert "'<|im_start|>assistant' before an answer, but not when it asks" in error
    plain = template.replace("<|im_start|>{{ m.role }}", "### {{ m.role }}:")
    assert "'### assistant:'" in said(format_findings([dict(messages=TALK)], with_template(tok, plain)), "error")[0]


def broken_labels(row, tok):
    "The row of TALK with labels that are wrong in one way each, and what the finding has to say."
    ids, labels = row["input_ids"], row["labels"]
    first = next(at for at, label in enumerate(labels) if label != -100)
    end = labels.index(tok.eos_token_id)
    last = len(labels) - 1 - labels[::-1].index(tok.eos_token_id)
    yield "everything", ids, "labels stand outside"
    yield "a question", ids[: first - 4] + labels[first - 4 :], "labels stand outside"
    yield "no first token", [*labels[:first], -100, *labels[first + 1 :]], "no label stands where an answer begins"
    yield "no mark", [*labels[:end], -100, *labels[end + 1 :]], "no mark that ends a turn"
    yield "beyond the mark", [*labels[:end], *ids[end : end + 8], *labels[end + 8 :]], "which is not the answer"
    yield "half an answer", [*labels[: first + 1], *[-100] * (end - first), *labels[end + 1 :]], "no mark that ends"
    yield "last answer not", [*labels[: end + 1], *[-100] * (len(ids) - end - 1)], "no label stands where"
    yield "last mark not", [*labels[:last], -100, *labels[last + 1 :]], "no mark that ends a turn"


def test_labels_that_cover_more_or_less_than_the_answers_are_an_error(tok):
    (row,) = encode(TALK, tok)
    assert answer_faults(trained_answers(TALK, [row], tok), TALK, tok, [tok.eos_token_id]) == []
    seen = 0
    for name, labels, words in broken_labels(row, tok):
        broken = dict(row, labels=labels)
        assert len(labels) == len(row["labels"]), name
        faults = answer_faults(trained_answers(TALK, [broken], tok), TALK, tok, [tok.eos_token_id])
        assert any(level == "error" and words in why for level, why in faults), (name, faults)
        seen += 1
    assert seen == 8


def test_the_empty_thought_of_qwen3_is_noted_and_a_thought_of_the_answer_is_not(named):
    tok = named("qwen3")
    notes = said(format_findings([dict(messages=TALK)], tok), "note")
    assert any(r"'<think>\n\n</think>' before an answer" in note for note in notes)
    assert any("a row of its own in 1 conversation" in note for note in notes)
    own = turns(("u", "2+2?"), ("a", "<think>\nTwo and two.\n</think>\n\n4"))
    assert not any("<think>" in f["said"] for f in format_findings([dict(messages=own)], tok))


@pytest.mark.parametrize(
    "file, marks", [("phi3", ["<|end|>"]), ("cohere2", ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"])]
)
def test_two_marks_at_the_end_of_an_answer_are_no_fault(file, marks):
    "Phi-3's published template ends a text with <|endoftext|> after the mark; Command A's closes answer and turn."
    from tokenizers import AddedToken

    tok = with_template(family("qwen2.5"), carried_by_trl(file))
    tok.add_special_tokens({"eos_token": "<|endoftext|>"})
    tok.add_tokens([AddedToken(name, special=True) for name in marks])
    for stops in (None, tok.convert_tokens_to_ids(["<|endoftext|>", marks[-1]])):
        assert levels(format_findings([dict(messages=TALK)], tok, stops)) == []


def test_a_tokenizer_without_places_is_checked_too():
    slow = characters("".join(m["content"] for m in TALK) + "[INST] [/INST]", family("mistral").chat_template)
    assert not slow.is_fast
    found = format_findings([dict(messages=TALK)], slow, [slow.eos_token_id])
    assert levels(found) == [] and any("2 answers in 1 conversation" in note for note in said(found, "note"))


# All of them


def test_faults_are_grouped_and_the_sound_rows_still_checked():
    rows = [dict(messages=turns(SYSTEM["en"], *TALKS["en"]))] * 7 + [dict(messages=TALK)]
    found = format_findings(rows, family("gemma"), stops_of("gemma", family("gemma")))
    (error,) = said(found, "error")
    assert error.startswith("row 1; row 2; row 3; row 4; row 5 and 2 more: ")
    assert any("neither the template" in note for note in said(found, "note"))


def test_findings_have_the_form_of_a_run(tok):
    from domain_llm.run.findings import findings_text

    text = findings_text(format_findings([dict(messages=TALK)], tok, [tok.eos_token_id]), 100)
    assert text.startswith("note     format: 2 answers in 1 conversation: before each")
    assert rows_or_fault(TALK, tok)[1] is None
