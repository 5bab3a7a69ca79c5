"Token rows on disk are the rows in memory."

import pyarrow as pa
import pytest

from domain_llm.core import InputError, iter_jsonl, read_jsonl, write_jsonl
from domain_llm.data.mix import mixture, token_rows, tokenize
from domain_llm.data.rows import chosen, gathered, lengths
from domain_llm.models import tiny
from domain_llm.train.batches import labelled, pack
from domain_llm.train.loop import TRAIN_DEFAULTS, train
from domain_llm.train.sft import encode_all

DOCS = [dict(text=f"The valve {i} opens at {i} bar. 阀门在{i}巴时打开。 " * (1 + i % 7)) for i in range(90)]
TALKS = [
    dict(messages=[dict(role="user", content=f"Bar {i}?"), dict(role="assistant", content=f"{i} bar. " * (i % 5 + 1))])
    for i in range(20)
]


def both(tok, folder):
    "The same mixture of documents and conversations, in memory and on disk."
    given = dict(domain=tokenize(DOCS, tok, "domain", 64), talk=encode_all(TALKS, tok, 48, "talk")[0])
    stored = dict(
        domain=gathered(token_rows(iter(DOCS), tok, "domain", 64), folder / "domain.arrow"),
        talk=encode_all(iter(TALKS), tok, 48, "talk", folder / "talk.arrow")[0],
    )
    size = dict(parts=dict(domain=2, talk=1), seed=3, epochs=1.5, max_epochs=50)
    return mixture(given, **size), mixture(stored, path=folder / "mixture.arrow", **size)


def test_a_mixture_on_disk_is_the_mixture_in_memory(tok, tmp_path):
    (rows, plan), (stored, planned) = both(tok, tmp_path)
    assert isinstance(rows, list) and not isinstance(stored, list)
    assert list(stored) == rows and planned == plan
    assert lengths(stored) == [len(row["input_ids"]) for row in rows]


def test_a_token_takes_eight_bytes_of_disk_and_no_copy_in_memory(tok, tmp_path):
    path, before = tmp_path / "rows.arrow", pa.total_allocated_bytes()
    stored = gathered((row for _ in range(40) for row in tokenize(DOCS, tok, "domain", 64)), path)
    tokens = sum(lengths(stored))
    assert tokens > 100_000 and 8 * tokens < path.stat().st_size < 9.5 * tokens
    assert pa.total_allocated_bytes() - before < 0.1 * path.stat().st_size


def test_conversations_too_long_are_counted_alike(tok, tmp_path):
    kept, left_out = encode_all(TALKS, tok, 44)
    stored, left = encode_all(iter(TALKS), tok, 44, path=tmp_path / "talks.arrow")
    assert list(stored) == kept and left == left_out > 0
    with pytest.raises(InputError, match="no conversation fits into 3 tokens"):
        encode_all(TALKS, tok, 3, path=tmp_path / "more.arrow")


def test_packed_rows_on_disk_are_those_in_memory(tok, tmp_path):
    (rows, _), (stored, _) = both(tok, tmp_path)
    packed, names = pack(rows, 100)
    on_disk, same = pack(stored, 100, path=tmp_path / "packed.arrow")
    assert list(on_disk) == list(packed) and same == names == ["domain", "talk"]
    assert labelled(on_disk) == labelled(packed)


def test_training_on_rows_on_disk_is_the_same(tok, tmp_path):
    found = []
    for n, (rows, _) in enumerate(both(tok, tmp_path)):
        model = tiny(tok, seed=1)
        done = train(model, chosen(rows, list(range(30))), tmp_path / str(n), TRAIN_DEFAULTS)
        assert not (tmp_path / str(n) / "rows.arrow").exists()
        found.append([[entry["loss"] for entry in done["history"] if "loss" in entry], done["tokens"]])
    assert found[0] == found[1] and len(found[0][0]) > 2


def test_a_cut_leaves_no_file_and_a_whole_one_is_not_written_again(tok, tmp_path):
    def cut():
        yield from tokenize(DOCS[:5], tok, "domain")
        raise KeyboardInterrupt

    path = tmp_path / "rows" / "domain.arrow"
    with pytest.raises(KeyboardInterrupt):
        gathered(cut(), path)
    assert not any(path.parent.iterdir())
    whole = list(gathered(token_rows(DOCS, tok, "domain"), path))
    assert list(gathered(cut(), path)) == whole == tokenize(DOCS, tok, "domain")


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [dict(n=n) for n in range(3)])
    assert list(iter_jsonl(path)) == read_jsonl(path) == [dict(n=0), dict(n=1), dict(n=2)]
    with path.open("a") as f:
        f.write("\n[1]\n")
    lines = iter_jsonl(path)
    assert [next(lines)["n"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="line 5 is a list"):
        next(lines)


def test_a_file_of_rows_of_somebody_else_is_left_alone(tok, tmp_path):
    (tmp_path / "rows.arrow").write_text("mine")
    with pytest.raises(InputError, match="rows.arrow that this training has not made"):
        train(tiny(tok), tokenize(DOCS, tok, "domain", 64), tmp_path, TRAIN_DEFAULTS)
    assert (tmp_path / "rows.arrow").read_text() == "mine"
