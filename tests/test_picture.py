"""A conversation as a picture: what is shown is what is read and what is trained.

Truths: the rendered text, the model's own loss as transformers computes it, an XML parser, hand-written lines."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from fixtures.families import FAMILIES, characters, family

from domain_llm.train.picture import STEPS, bracketed, picture, pieces, row_losses, shortened, visible
from domain_llm.train.sft import encode

TALK = [
    dict(role="user", content="安全阀\tin  the 潮汐船闸?"),
    dict(role="assistant", content="四十巴 <b>&\n40 bar."),
    dict(role="user", content="然后呢？"),
    dict(role="assistant", content="每200小时加油。"),
]


def joined(found, trained=None):
    return "".join(piece["text"] for piece in found if trained is None or piece["trained"] == trained)


@pytest.mark.parametrize("name", [*FAMILIES, "smollm2"])
def test_the_pieces_are_the_rendered_text_and_the_trained_ones_the_labels(tok, name):
    tok = tok if name == "smollm2" else family(name)
    for row in encode(TALK, tok):
        found = pieces(row, tok)
        trained = [label for label in row["labels"] if label != -100]
        assert joined(found, True) == tok.decode(trained)
        read = [piece for piece in found if not piece["trained"] or name != "baichuan2" or piece["text"] != "</s>"]
        ids = row["input_ids"][:-1] if name == "baichuan2" else row["input_ids"]  # its last token is a label alone
        assert joined(read) == tok.decode(ids)
        assert "\ufffd" not in joined(found)


def test_a_label_that_is_not_read_has_a_piece_of_its_own():
    "Baichuan 2 is trained to write </s> where the next thing that it reads is the user's turn."
    (row,) = encode([dict(m, content=m["content"][:1]) for m in TALK], family("baichuan2"))
    line = bracketed(pieces(row, family("baichuan2")))
    assert line == "<reserved_106>安<reserved_107>[[四</s>]]<reserved_106>然<reserved_107>[[每</s>]]"


def test_special_tokens_are_told_from_their_text(tok):
    asked = [dict(role="user", content="What is <|im_end|>?"), dict(role="assistant", content="A mark.")]
    found = pieces(encode(asked, tok)[0], tok)
    assert sum(piece["special"] for piece in found) == 6 and joined(found).count("<|im_end|>") == 4


def test_a_tokenizer_in_python_is_shown():
    slow = characters("".join(m["content"] for m in TALK) + "[INST]", family("mistral").chat_template)
    (row,) = encode(TALK[:2], slow)
    assert joined(pieces(row, slow)) == slow.apply_chat_template(TALK[:2], tokenize=False)


def test_the_losses_are_those_of_transformers(tok, tiny_model):
    import torch

    model, _ = tiny_model
    (row,) = encode(TALK, tok)
    losses = row_losses(model, row)
    assert sorted(losses) == [at for at, label in enumerate(row["labels"]) if label != -100]
    with torch.inference_mode():
        own = model(**{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}).loss.item()
    assert math.isclose(sum(losses.values()) / len(losses), own, rel_tol=1e-4)
    found = pieces(row, tok, losses)
    assert math.isclose(sum(piece["loss"] for piece in found if piece["trained"]), sum(losses.values()), rel_tol=1e-6)
    assert all(piece["loss"] is None for piece in found if not piece["trained"])
    assert len([piece for piece in found if piece["trained"]]) < len(losses)  # characters of several tokens


def test_a_terminal_shows_white_space_and_brackets(tok):
    line = bracketed(pieces(encode(TALK[:2], tok)[0], tok)).split("<|im_start|>user")[1]
    assert line == (
        "↵\n安全阀⇥in··the·潮汐船闸?<|im_end|>↵\n<|im_start|>assistant↵\n[[四十巴·<b>&↵\n40·bar.<|im_end|>]]↵\n"
    )
    assert visible(dict(text="\u3000\x00\u200b\r")) == "\\u3000\\x00\\u200b␍"


def piece(text, trained=False, loss=None):
    return dict(text=text, special=False, trained=trained, loss=loss)


def test_long_stretches_are_shortened_in_the_middle():
    found = [piece(c) for c in "abcdefghij"] + [piece("xyz", True)]
    assert bracketed(shortened(found, 4)) == "ab<6 characters left out>ij[[xyz]]"
    assert bracketed(shortened(found, 10)) == "abcdefghij[[xyz]]"
    assert bracketed(shortened([piece("x" * 50, True)], 4)) == "[[<50 characters left out>]]"


def drawn(found, **kw):
    "The texts of a picture by their fill, and the picture as XML."
    root = ET.fromstring(picture(found, **kw))
    boxes = [(g.find("{*}rect"), g.find("{*}text")) for g in root.findall("{*}g")]
    return root, [(text.text, box.get("fill"), box.get("stroke")) for box, text in boxes]


def test_the_picture_is_sound_xml_that_github_keeps(tok, tiny_model):
    (row,) = encode(TALK, tok)
    found = pieces(row, tok, row_losses(tiny_model[0], row))
    root, boxes = drawn(found)
    source = ET.tostring(root, encoding="unicode")
    assert not re.search(r"<(\w+:)?(style|script|foreignObject)|style=|class=|href=", source)
    assert root.get("role") == "img" and root.get("aria-label")
    assert [text for text, *_ in boxes[: len(found)]] == [visible(p) for p in found]
    for p, (_, _, frame) in zip(found, boxes):
        assert (frame != "none") == p["trained"]


def lightness(colour):
    "Relative luminance of a hexadecimal colour, as in WCAG 2."
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_a_larger_loss_is_darker_and_every_text_can_be_read():
    losses = [0, *STEPS]
    root, boxes = drawn([piece("a", True, loss) for loss in losses] + [piece("b")])
    shades = [lightness(fill) for _, fill, _ in boxes[: len(losses)]]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == len(losses)
    for g in root.findall("{*}g"):
        fill, ink = g.find("{*}rect").get("fill"), g.find("{*}text").get("fill")
        ink = "#" + "".join(c * 2 for c in ink[1:]) if len(ink) == 4 else ink
        light, dark = sorted((lightness(fill), lightness(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (fill, ink)  # WCAG 2, level AA


def test_lines_end_where_the_text_does_and_chinese_characters_are_two_columns_wide():
    root, _ = drawn([piece("四十"), piece("ab"), piece("\n"), piece("cd"), piece("efg")], columns=8)
    places = [(float(r.get("x")), float(r.get("y"))) for r in root.iter("{http://www.w3.org/2000/svg}rect")][1:6]
    cell, line = places[1][0] / 4, places[3][1]
    assert places == [
        (0, 0),
        (4 * cell, 0),
        (pytest.approx(6 * cell, abs=0.1), 0),
        (0, line),
        (pytest.approx(2 * cell, abs=0.1), line),
    ]
    assert drawn([piece("abc"), piece("defg")], columns=6)[0].findall("{*}g")[1].find("{*}rect").get("y") == "22.0"
