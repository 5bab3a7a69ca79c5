"Vocabulary expansion against hand-computed merges, the tokenizers library, plain transformers and peft, and llama.cpp."

import json
import math
import random
from collections import Counter

import pytest
import torch
from tokenizers import Regex
from transformers import AutoModelForCausalLM, AutoTokenizer

from domain_llm import cli
from domain_llm.core import InputError
from domain_llm.data.mix import tokenize
from domain_llm.demo.world import make_world
from domain_llm.judge.score import bits_per_byte
from domain_llm.models import load, tiny
from domain_llm.run.pipeline import final_model, run_recipe
from domain_llm.ship.fidelity import PROBES
from domain_llm.ship.gguf import _WORDS, export_gguf
from domain_llm.ship.merge import merge
from domain_llm.ship.serve import post, server
from domain_llm.ship.speed import compared, turns
from domain_llm.small_world import small_tokenizer
from domain_llm.train.loop import TRAIN_DEFAULTS, add_lora, train
from domain_llm.train.pretrain import _scale_adapter
from domain_llm.train.vocab import cost, extend, new_pieces, new_rows, replaced, resize, saving

ENGLISH = [
    "The electrohydraulic servovalve Z-17 regulates 1450 rpm; the servovalve is flushed with <|im_end|> ISO oil.",
    "Electrohydraulic actuators, servovalves and geroter pumps: viscosity 46 mm²/s.\n\n\tservovalve(x) != 3.14",
]
CHINESE = ["液压泵在1450转时工作。溢流阀的开启压力为40巴。", "检修液压泵之前，关闭溢流阀，释放压力。液压泵！"]
CORPUS = 3 * (ENGLISH + CHINESE)


def bare(*added):
    "A byte-level tokenizer without a merge."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(added) or ["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def qwen():
    "A tokenizer of Qwen's class: its words, with special tokens behind the vocabulary."
    from transformers import Qwen2Tokenizer

    spec = json.loads(small_tokenizer().backend_tokenizer.to_str())["model"]
    kept = {piece: n - 3 for piece, n in spec["vocab"].items() if n > 2}
    made = Qwen2Tokenizer(vocab=kept, merges=[tuple(m) for m in spec["merges"]])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.eos_token = "<|im_end|>"
    made.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return made


def llama3():
    "A tokenizer with the words of Llama 3, which takes a word that is a piece as it is, whatever its merges."
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(small_tokenizer().backend_tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    inner = Tokenizer.from_str(json.dumps(spec))
    words = pre_tokenizers.Split(Regex(_WORDS % "{1,3}"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_start|>")


def property_texts(count=150):
    "Texts that mix words of the corpus with characters of many scripts."
    rng = random.Random(0)
    parts = [w for text in CORPUS[:4] for w in text.replace("<|im_end|>", "").split(" ")]
    parts += list("液压泵溢流阀，。！abcXYZ0123456789 \n\t{}[]()<>|=éßñ") + [
        "👩‍🔧",
        "🇨🇭",
        "\r\n",
        "  ",
        "servo",
        "electro",
    ]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]
    return PROBES + ENGLISH + CHINESE + texts


def ids_of(tok, text):
    return tok(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def small():
    return small_tokenizer()


@pytest.fixture(scope="module", params=["smollm2", "small world", "qwen"])
def both(request, tok):
    "A tokenizer and its extension by a hundred pieces."
    old = {"smollm2": lambda: tok, "small world": small_tokenizer, "qwen": qwen}[request.param]()
    return old, extend(old, new_pieces(CORPUS, old, 100))


def test_merges_by_hand():
    # words: "ab", " ab", " abc": a+b three times, then the space with ab twice, then once only
    found = new_pieces(["ab ab abc"], bare())
    assert found == [
        dict(text="ab", merge=["a", "b"], saves=3),
        dict(text=" ab", merge=["Ġ", "ab"], saves=2),
    ]


def test_a_run_of_one_letter_is_counted_without_overlap():
    # "aaaa" is merged to "aa" twice, " aaa" once
    assert new_pieces(["aaaa aaa"], bare(), 1) == [dict(text="aa", merge=["a", "a"], saves=3)]


def joined(word, left, right):
    "A word of letters between spaces with every such pair joined; no piece here begins as it ends."
    return f" {word} ".replace(f" {left} {right} ", f" {left}{right} ").strip()


def test_order_and_counts_are_those_of_a_plain_greedy_search():
    text = "the theory then thaws other mothers gather there another method others lather feathers brother mothers"
    words, expected = [" ".join(w) for w in text.replace(" ", " Ġ").split(" ")], []
    while True:
        letters = [word.split(" ") for word in words]
        pairs = Counter(pair for word in letters for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        expected.append((list(best), pairs[best]))
        words = [joined(word, *best) for word in words]
    assert [(row["merge"], row["saves"]) for row in new_pieces([text], bare())] == expected
    assert len(expected) == 9


def test_the_tokens_saved_are_those_that_the_library_saves(both):
    old, new = both
    found = new_pieces(CORPUS, old, 100)
    texts = [part for text in CORPUS for part in text.split("<|im_end|>")]
    count = [sum(len(ids_of(tok, text)) for text in texts) for tok in (old, new)]
    assert count[0] - count[1] == sum(row["saves"] for row in found) > 100


def test_pieces_are_new_without_digits_and_whole(both):
    old, _ = both
    found = new_pieces(CORPUS, old, 100)
    assert found == new_pieces(iter(CORPUS), old, 100)
    texts = [row["text"] for row in found]
    assert any("servovalve" in text for text in texts) and any("液压" in text for text in texts)
    for row in found:
        assert "".join(row["merge"]) not in old.get_vocab()
        assert not any(c.isdigit() for c in row["text"])
        assert "\ufffd" not in row["text"] or row["text"] == "\ufffd"
        assert "im_end" not in row["text"] and "<|" not in row["text"]
        assert " " not in row["text"].strip()  # a piece never spans two words


def test_every_text_comes_back_and_old_pieces_lie_under_the_new(both):
    old, new = both
    parts = replaced(old, new)
    used = set()
    for text in property_texts():
        ids, before = ids_of(new, text), ids_of(old, text)
        assert new.decode(ids) == old.decode(before)
        assert [part for i in ids for part in parts.get(i, [i])] == before
        used.update(ids)
    assert len(used & set(parts)) > 10
    if old.backend_tokenizer.normalizer is None:
        assert all(new.decode(ids_of(new, text)) == text for text in property_texts())


def test_old_numbers_stay_through_a_folder(both, tmp_path):
    old, new = both
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    known = old.get_vocab()
    for made in (new, again):
        vocab = made.get_vocab()
        assert {piece: vocab[piece] for piece in known} == known
        assert sorted(set(vocab.values()) - set(known.values())) == list(range(len(known), len(vocab)))
        assert made.all_special_ids == old.all_special_ids and made.eos_token_id == old.eos_token_id
        assert type(made) is type(old) and made.chat_template == old.chat_template
        assert set(made.get_added_vocab()) == set(old.get_added_vocab())
    assert [ids_of(again, t) for t in property_texts(20)] == [ids_of(new, t) for t in property_texts(20)]
    talk = [dict(role="user", content="液压泵")]
    assert again.apply_chat_template(talk, tokenize=False) == old.apply_chat_template(talk, tokenize=False)


def test_text_without_new_pieces_is_cut_as_before(both):
    old, new = both
    plain = "This is a plain sentence, and 12,345 is a number."
    assert ids_of(new, plain) == ids_of(old, plain)


def test_extending_twice_is_possible(tok):
    once = extend(tok, new_pieces(ENGLISH * 2, tok, 5))
    twice = extend(once, new_pieces(CHINESE * 2, once, 5))
    assert len(twice) == len(tok) + 10
    parts = replaced(tok, twice)
    assert len(parts) == 10 and all(len(old) > 1 and max(old) < len(tok) for old in parts.values())


def other_kinds():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sentencepiece = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1}, merges=[], byte_fallback=True))
    sentencepiece.pre_tokenizer = pre_tokenizers.Metaspace()
    kinds = dict(
        Unigram=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
        WordPiece=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        characters=sentencepiece,
    )
    return {kind: PreTrainedTokenizerFast(tokenizer_object=inner) for kind, inner in kinds.items()}


def test_other_kinds_of_tokenizers_are_refused():
    from transformers import ByT5Tokenizer

    for kind, made in (other_kinds() | {"Python": ByT5Tokenizer()}).items():
        for call in (lambda m: new_pieces(["aa aa"], m), lambda m: extend(m, [])):
            with pytest.raises(InputError, match=f"{kind}.*byte-level BPE"):
                call(made)


def test_wrong_input_is_refused(tok):
    with pytest.raises(InputError, match="at least 1"):
        new_pieces(CORPUS, tok, 0)
    pieces = new_pieces(CORPUS, tok, 5)
    with pytest.raises(InputError, match="does not fit the tokenizer"):
        extend(extend(tok, pieces), pieces)
    with pytest.raises(InputError, match="does not fit the tokenizer"):
        extend(bare(), pieces)
    with pytest.raises(InputError, match="order old, new"):
        replaced(extend(tok, pieces), tok)
    with pytest.raises(InputError, match="no text"):
        saving([""], tok, tok)


def test_saving_by_hand():
    old = bare()
    new = extend(old, new_pieces(["ab ab abc"], old))
    texts = ["ab ab", "xyz é"]  # 5 bytes: 5 tokens become 2; 6 bytes and tokens stay
    found = saving([*texts, ""], old, new)
    assert (found["before"]["tokens"], found["after"]["tokens"], found["documents"]) == (11, 8, 2)
    assert found["saved"]["value"] == pytest.approx(3 / 11)
    assert found["after"]["per_byte"] == pytest.approx(8 / 11)
    assert found["before"]["characters_per_token"] == pytest.approx(10 / 11)
    assert found["saved"]["low"] < 3 / 11 < found["saved"]["high"]
    assert saving(texts[:1], old, new)["saved"]["low"] is None


def untied(tok):
    "A tiny model whose head is not its embedding."
    torch.manual_seed(0)
    config = tiny(tok).config
    config.tie_word_embeddings = False
    return AutoModelForCausalLM.from_config(config).eval()


def test_rows_are_the_mean_or_the_weighted_mean_of_the_old(small):
    new = extend(small, new_pieces(CORPUS, small, 60))
    parts = replaced(small, new)
    weights = {1: [0.8807971, 0.1192029], 2: [0.8668133, 0.1173104, 0.0158763]}  # exp(-2i) over their sum, by hand
    for make, start in ((tiny, "mean"), (tiny, "weighted"), (untied, "weighted"), (untied, "mean")):
        model = make(small)
        before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
        assert resize(model, small, new, start) == list(range(len(small), len(new)))
        inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (inputs is head) == (make is tiny) and len(inputs) == len(head) == model.config.vocab_size == len(new)
        assert torch.equal(inputs[: len(small)], before[0]) and torch.equal(head[: len(small)], before[1])
        for number, pieces in parts.items():
            if len(pieces) > 3:
                continue
            first = torch.tensor(weights[len(pieces) - 1])
            even = torch.full((len(pieces),), 1 / len(pieces))
            last = first.flip(0) if start == "weighted" else even
            ahead = last if make is tiny else first if start == "weighted" else even
            torch.testing.assert_close(inputs[number], last @ before[0][pieces], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(head[number], ahead @ before[1][pieces], atol=1e-6, rtol=1e-5)


def test_rows_of_described_words_are_the_mean_of_their_description(small):
    new = extend(small, new_pieces(CORPUS, small, 60))
    parts = replaced(small, new)
    number = next(i for i in parts if new.decode([i]).strip().isalpha())
    word = new.decode([number]).strip()
    for make in (tiny, untied):
        model = make(small)
        before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
        resize(model, small, new, "semantic", descriptions={word.upper(): "a valve 阀 that moves", "elsewhere": "no"})
        meaning = small("a valve 阀 that moves", add_special_tokens=False).input_ids
        matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        for old_rows, matrix in zip(before, matrices):
            torch.testing.assert_close(matrix[number], old_rows[meaning].mean(0), atol=1e-6, rtol=1e-5)
            for other, pieces in parts.items():
                if new.decode([other]).strip().casefold() != word.casefold():
                    torch.testing.assert_close(matrix[other], old_rows[pieces].mean(0), atol=1e-6, rtol=1e-5)


def test_the_start_semantic_needs_descriptions(small):
    new = extend(small, new_pieces(CORPUS, small, 3))
    for nothing in (None, {}):
        with pytest.raises(InputError, match="needs descriptions"):
            resize(tiny(small), small, new, "semantic", descriptions=nothing)


def test_random_rows_have_the_old_rows_mean_and_spread(small):
    new = extend(small, new_pieces(CORPUS, small, 100))
    one, two, other = tiny(small), tiny(small), tiny(small)
    with torch.no_grad():
        for model in (one, two, other):
            model.get_input_embeddings().weight[:, 0] += 5
            model.get_input_embeddings().weight[:, 1] *= 7
    rows = resize(one, small, new, "random", seed=3)
    resize(two, small, new, "random", seed=3)
    resize(other, small, new, "random", seed=4)
    added = one.get_input_embeddings().weight[rows]
    assert torch.equal(added, two.get_input_embeddings().weight[rows])
    assert not torch.equal(added, other.get_input_embeddings().weight[rows])
    old = one.get_input_embeddings().weight[: len(small)]
    assert abs(added[:, 0].mean() - old[:, 0].mean()) < 4 * old[:, 0].std() / len(rows) ** 0.5
    assert 0.7 < added[:, 1].std() / old[:, 1].std() < 1.3


def test_free_rows_are_used_first_and_a_reload_keeps_them(tmp_path):
    old = qwen()
    new = extend(old, new_pieces(CORPUS, old, 40))
    model = tiny(old)
    model.resize_token_embeddings(len(old) + 64)  # as Qwen pads its embedding
    rows = resize(model, old, new)
    assert rows == list(range(len(old), len(old) + 40)) and model.config.vocab_size == len(old) + 64
    parts, weight = replaced(old, new), model.get_input_embeddings().weight
    torch.testing.assert_close(weight[rows[0]], weight[parts[rows[0]]].mean(0))
    model.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    again, its_tok = load(str(tmp_path), device="cpu")
    assert torch.equal(again.get_input_embeddings().weight, weight) and len(its_tok) == len(new)


def test_models_that_cannot_be_resized(small):
    new = extend(small, new_pieces(CORPUS, small, 3))
    model = tiny(small)
    with pytest.raises(InputError, match="did you mean 'mean'|choose from mean"):
        resize(model, small, new, "maen")
    with pytest.raises(InputError, match="do not belong together"):
        resize(tiny(bare()), small, new)
    model.config.quantization_config = dict(load_in_4bit=True)
    with pytest.raises(InputError, match="quantized"):
        resize(model, small, new)


def one_step(model, ids):
    "One step of plain training on some ids."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    ids = torch.tensor([ids])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("make", [tiny, untied])
def test_lora_trains_the_new_rows_alone_and_survives_everywhere(make, small, tmp_path):
    from peft import PeftModel

    new = extend(small, new_pieces(CORPUS, small, 30))
    model = make(small)
    rows = resize(model, small, new)
    model.save_pretrained(tmp_path / "base")
    new.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    layers = ["model.embed_tokens"] if make is tiny else ["model.embed_tokens", "lm_head"]
    assert new_rows(base) == dict.fromkeys(layers, rows) and new_rows(make(small)) == {}
    tuned = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rank=2, alpha=2, rows=new_rows(model))
    ids = ids_of(new, ENGLISH[0])
    one_step(tuned, ids)
    tuned.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = tuned(torch.tensor([ids])).logits
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        torch.testing.assert_close(plain.eval()(torch.tensor([ids])).logits, want)
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(torch.tensor([ids])).logits, want, atol=1e-4, rtol=1e-4)
    assert [ids_of(AutoTokenizer.from_pretrained(tmp_path / "merged"), t) for t in PROBES] == [
        ids_of(new, t) for t in PROBES
    ]
    scores = [bits_per_byte(m, new, ENGLISH)["bpb"] for m in (tuned, merged)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    layers = [merged.get_input_embeddings(), merged.get_output_embeddings()]
    assert (layers[0].weight is layers[1].weight) == (make is tiny)
    for layer, before in zip(layers, (base.get_input_embeddings(), base.get_output_embeddings())):
        moved = (layer.weight != before.weight).any(1).nonzero()[:, 0].tolist()
        assert moved and set(moved) <= set(rows)


def test_an_adapter_is_scaled_with_its_rows(small):
    new = extend(small, new_pieces(CORPUS, small, 10))
    model = tiny(small)
    rows = resize(model, small, new)
    before = model.get_input_embeddings().weight[rows].clone()
    tuned = add_lora(model, rank=2, alpha=2, rows=new_rows(model))
    one_step(tuned, ids_of(new, ENGLISH[0]))
    _scale_adapter(tuned, 0.25)
    quarter = tuned.merge_and_unload().get_input_embeddings().weight[rows] - before
    assert quarter.abs().max().item() == pytest.approx(
        0.025, rel=0.05
    )  # AdamW's first step is the rate, 0.1, times the sign


def test_bits_per_byte_compares_two_vocabularies(small):
    "A model that finds every token equally likely needs log2 of their number for each, however long it is."
    new = extend(small, new_pieces(CORPUS, small, 50))
    model = tiny(small)
    resize(model, small, new)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    found = bits_per_byte(model, new, ENGLISH)
    tokens = sum(len(new(t, split_special_tokens=True).input_ids) for t in ENGLISH)
    size = sum(len(t.encode()) for t in ENGLISH)
    assert found["bpb"] == pytest.approx(tokens * torch.log2(torch.tensor(float(len(new)))).item() / size, rel=1e-4)


def qwen_model(tok):
    "A tiny model of Qwen's architecture, with an embedding that is padded."
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen2Config(vocab_size=len(tok) + 8, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    config.eos_token_id = tok.eos_token_id
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["smollm2", "qwen", "llama3"])
def test_the_gguf_file_has_the_same_tokens(kind, tok, tmp_path):
    pytest.importorskip("xllamacpp")
    old = {"smollm2": lambda: tok, "qwen": qwen, "llama3": llama3}[kind]()
    new = extend(old, new_pieces(CORPUS, old, 100))
    model = qwen_model(old) if kind == "qwen" else tiny(old)
    resize(model, old, new)
    model.save_pretrained(tmp_path / "model")
    new.save_pretrained(tmp_path / "model")
    path = export_gguf(tmp_path / "model", tmp_path / "gguf", "q8_0")["q8_0"]
    added, wrong = set(replaced(old, new)), []
    with server(path, port=0) as url:
        for text in property_texts(60):
            ids = ids_of(new, text)
            got = post(url + "/tokenize", dict(content=text, add_special=False, parse_special=True))["tokens"]
            back = post(url + "/detokenize", dict(tokens=ids))["content"]
            if got != ids or back != new.decode(ids):
                wrong.append((text, got, ids, back))
            added -= set(got)
    assert not wrong
    assert len(added) < 80  # most pieces were used


def test_costs_by_hand():
    from transformers import LlamaConfig

    sizes = dict(hidden_size=64, vocab_size=1000)
    found = cost(LlamaConfig(tie_word_embeddings=False, **sizes), 990, 30)
    assert found == dict(rows=20, memory=2 * 20 * 128, trained=30 * 128, whole=1020 * 128)
    found = cost(LlamaConfig(tie_word_embeddings=True, **sizes), 990, 10)
    assert found == dict(rows=0, memory=0, trained=640, whole=1000 * 64)


@pytest.fixture
def manuals(tmp_path):
    "A folder of ten documents on a servovalve."
    (tmp_path / "manuals").mkdir()
    for i in range(10):
        words = " ".join(
            f"Clause {i}.{k}: the servovalve of pump {i * k} is flushed, 溢流阀{'阀压' * i}." for k in range(9)
        )
        (tmp_path / "manuals" / f"{i}.txt").write_text(words, encoding="utf-8")
    return tmp_path / "manuals"


def test_the_command_says_and_writes(manuals, tmp_path, capsys):
    asked = ["vocab", str(manuals), "--model", "small-world"]
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert "documents choose the pieces" in said and "fewer tokens (95% interval" in said and "servovalve" in said
    assert cli.main([*asked, "--count", "12", "--out", str(tmp_path / "longer"), "--start", "weighted"]) == 0
    model, tok = load(str(tmp_path / "longer"), device="cpu")
    assert len(tok) == model.config.vocab_size == 1024 + 12
    expected = load("small-world", device="cpu")[0]
    resize(expected, small_tokenizer(), tok, "weighted")
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)


def test_the_command_takes_descriptions(manuals, tmp_path):
    (tmp_path / "glossary.json").write_text('{"servovalve": "a part that moves"}')
    asked = ["vocab", str(manuals), "--model", "small-world", "--count", "40", "--out", str(tmp_path / "longer")]
    assert cli.main([*asked, "--start", "semantic", "--descriptions", str(tmp_path / "glossary.json")]) == 0
    model, tok = load(str(tmp_path / "longer"), device="cpu")
    rows = model.get_input_embeddings().weight
    meaning = ids_of(small_tokenizer(), "a part that moves")
    (number,) = ids_of(tok, " servovalve")
    torch.testing.assert_close(rows[number], rows[meaning].mean(0), atol=1e-6, rtol=1e-5)


def test_what_the_command_refuses(manuals, tmp_path, capsys):
    asked = ["vocab", str(manuals), "--model", "small-world"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "list.json").write_text('["servovalve"]')
    (tmp_path / "glossary.json").write_text('{"servovalve": "a part that moves"}')
    semantic = [*asked, "--start", "semantic", "--descriptions"]
    wrong = {
        "need each other. Give": [*asked, "--start", "semantic"],
        "need each other": [*asked, "--descriptions", str(tmp_path / "glossary.json")],
        "no JSON object of words": [*semantic, str(tmp_path / "list.json")],
        "cannot read": [*semantic, str(tmp_path / "absent.json")],
        "one --count": [*asked, "--out", str(tmp_path / "new")],
        "at least 1": [*asked, "--count", "0"],
        "exists already": [*asked, "--count", "5", "--out", str(manuals)],
        "Merge it": ["vocab", str(manuals), "--model", str(tmp_path / "adapter")],
    }
    for message, argv in wrong.items():
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_training_loop_moves_the_new_rows_alone(small, tmp_path):
    new = extend(small, new_pieces(CORPUS, small, 30))
    model = tiny(small)
    rows = resize(model, small, new)
    before = model.get_input_embeddings().weight.clone()
    read = tokenize([dict(text=text) for text in CORPUS], new, "domain", 64)
    settings = {**TRAIN_DEFAULTS, "length": 64, "tokens_per_step": 64, "learning_rate": 1e-2, "probes": 2}
    tuned = add_lora(model, rank=2, alpha=2, rows=new_rows(model))
    found = train(tuned, read, tmp_path, settings, lambda m: dict(score=bits_per_byte(m, new, ENGLISH)["bpb"]))
    scores = [entry["score"] for entry in found["history"] if "score" in entry]
    assert scores[-1] < scores[0]
    after = tuned.merge_and_unload().get_input_embeddings().weight
    moved = (after != before).any(1).nonzero()[:, 0].tolist()
    assert moved and set(moved) <= set(rows)


def test_a_run_with_an_adapter_trains_the_new_rows(tmp_path, small):
    new = extend(small, new_pieces([row["text"] for row in make_world(entities=8)["documents"]], small, 50))
    model = tiny(small)
    rows = resize(model, small, new)
    before = model.get_input_embeddings().weight.clone()
    model.save_pretrained(tmp_path / "longer")
    new.save_pretrained(tmp_path / "longer")
    sizes = dict(length=128, tokens_per_step=256, probes=1, learning_rate=3e-3, rank=4, forgetting_budget=100)
    recipe = dict(
        name="small",
        demo=8,
        model=str(tmp_path / "longer"),
        mix=dict(parts=dict(domain=1), tokens=1500),
        pretrain=dict(sizes, method="lora"),
        sft=False,
        evaluate=dict(questions=8, probe_tokens=100),
        quantize=False,
    )
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run_recipe(tmp_path / "r.yaml", tmp_path / "out")
    trained, its_tok = load(str(final_model(tmp_path / "out")), device="cpu")
    moved = (trained.get_input_embeddings().weight != before).any(1).nonzero()[:, 0].tolist()
    assert moved and set(moved) <= set(rows) and new_rows(trained) == {"model.embed_tokens": rows}
    assert [ids_of(its_tok, text) for text in PROBES] == [ids_of(new, text) for text in PROBES]


def test_speeds_by_hand():
    "Twice the characters per token at 1.5 times the seconds is 4/3 of the speed; the interval is that of the turns."
    seconds = [(0.10, 0.15), (0.30, 0.45), (0.20, 0.33)]  # ratios 1.5, 1.5, 1.65
    found = dict(before=dict(characters_per_token=2.0), after=dict(characters_per_token=4.0))
    made = compared(seconds, found | dict(saved=dict(value=0.5, low=0.5, high=0.5)))
    logs = torch.tensor([-1.5, -1.5, -1.65]).abs().log()
    assert made["ratio"] == pytest.approx(2 / logs.mean().exp().item())
    half = 4.302653 * logs.std().item() / 3**0.5  # t of two degrees of freedom
    assert [made["low"], made["high"]] == pytest.approx(
        [made["ratio"] / math.exp(half), made["ratio"] * math.exp(half)]
    )
    assert made["before"] == pytest.approx(2 / (0.1 * 0.3 * 0.2) ** (1 / 3))
    wider = compared(seconds, found | dict(saved=dict(value=0.5, low=0.4, high=0.6)))
    assert wider["low"] < made["low"] and wider["high"] > made["high"] and wider["ratio"] == made["ratio"]


def test_a_model_that_is_twice_as_slow_is_found_to_be_so():
    "The second of two turns does the first's work twice."
    rng, asked = random.Random(0), []

    def spend(seconds):
        asked.append(seconds)
        return seconds * math.exp(rng.gauss(0, 0.1))

    pairs = turns(lambda: spend(1.0), lambda: spend(2.0), 20)
    assert len(pairs) == 20 and asked == [1, 2, *([1, 2, 2, 1] * 10)]
    same = dict(before=dict(characters_per_token=3.0), after=dict(characters_per_token=3.0))
    found = compared(pairs, same | dict(saved=dict(value=0.0, low=0.0, high=0.0)))
    assert found["low"] < 0.5 < found["high"] and found["high"] - found["low"] < 0.15


def test_the_command_times_both_models(manuals, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    assert cli.main(["vocab", str(manuals), "--model", "small-world", "--count", "12", "--speed"]) == 0
    said = capsys.readouterr().out
    assert "decoding with 12 pieces, the two models in turn" in said
    for program in ("transformers: ", "llama.cpp, q8_0: "):
        (line,) = [line for line in said.splitlines() if line.startswith(program)]
        assert "characters per second, extended" in line and "times as fast (95% interval" in line
    assert "written" not in said
