"""Copies of a database with other contents, on which queries that mean different things give different rows."""

import sqlite3

import pytest

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables, make_composed
from domain_llm.demo.world import make_world
from domain_llm.judge.answers import execution_accuracy
from domain_llm.judge.queries import perturbed, read_only

ODD = """
CREATE TABLE "the site" ([a "name"] TEXT UNIQUE, region TEXT, PRIMARY KEY ([a "name"], region)) WITHOUT ROWID;
CREATE TABLE pumps (
    pump_id INTEGER PRIMARY KEY, installed INTEGER CHECK (installed < replaced), replaced INTEGER,
    age INTEGER AS (replaced - installed), site TEXT, region TEXT, other_id INTEGER REFERENCES pumps,
    FOREIGN KEY (SITE, region) REFERENCES "the site");
CREATE VIEW old AS SELECT * FROM pumps WHERE installed < 1990;
CREATE VIRTUAL TABLE notes USING fts5(note);
CREATE TABLE empty (a, b);
CREATE TABLE pairs (a, b, UNIQUE (a, b));
CREATE TABLE labels (label TEXT, number INTEGER UNIQUE);
CREATE TRIGGER kept BEFORE DELETE ON pumps BEGIN SELECT raise(ABORT, 'pumps are kept'); END;
INSERT INTO "the site" VALUES ('Kelby', 'north'), ('Oakford', 'south'), ('Größe', 'west');
INSERT INTO pumps VALUES (1, 1980, 1990, 'Kelby', 'north', 2), (2, 1995, 2000, 'Oakford', 'south', NULL),
    (3, 2001, 2020, NULL, NULL, 1), (4, NULL, 2021, 'Größe', 'west', 3);
INSERT INTO pairs VALUES (1, 'x'), (1, 'y'), (2, 'x'), (NULL, NULL);
INSERT INTO labels VALUES ('Swan', 7), ('Heron', 8), ('Wren', 9);
INSERT INTO notes VALUES ('a word');
"""


@pytest.fixture
def odd():
    con = sqlite3.connect(":memory:")
    con.executescript(ODD)
    return con


def column(con, table, name):
    return [value for (value,) in con.execute(f"SELECT {name} FROM {table}")]


def test_columns_have_their_own_values_and_references_their_rows(odd):
    before = "\n".join(odd.iterdump())
    changed = set()
    for seed in range(8):
        copy = perturbed(odd, seed=seed)
        assert copy.execute("PRAGMA foreign_key_check").fetchall() == []
        assert column(copy, "pumps", "pump_id") == [1, 2, 3, 4]
        for name in ("installed", "replaced", "site", "other_id"):
            ours, theirs = column(copy, "pumps", name), column(odd, "pumps", name)
            assert set(ours) <= set(theirs)
            changed |= {name} if ours != theirs else set()
        sites = set(copy.execute("SELECT site, region FROM pumps"))
        assert sites <= {("Kelby", "north"), ("Oakford", "south"), ("Größe", "west"), (None, None)}
        assert (
            copy.execute("SELECT age FROM pumps").fetchall()
            == copy.execute("SELECT replaced - installed FROM pumps").fetchall()
        )
        assert len(column(copy, "old", "pump_id")) == column(copy, "pumps", "installed").count(1980) and column(
            copy, "notes", "note"
        ) == ["a word"]
        assert column(copy, "empty", "a") == [] and len(column(copy, "pairs", "a")) == 4
        labels = column(copy, "labels", "label")
        assert sorted(labels) == ["Heron", "Swan", "Wren"] and sorted(column(copy, "labels", "number")) == [7, 8, 9]
        changed |= {"label"} if labels != column(odd, "labels", "label") else set()
    assert changed == {"label", "installed", "replaced", "site", "other_id"}
    assert "\n".join(odd.iterdump()) == before


def test_a_seed_gives_one_copy(odd):
    dumps = ["\n".join(perturbed(odd, ["SELECT 1990"], seed).iterdump()) for seed in (0, 0, 1)]
    assert dumps[0] == dumps[1] != dumps[2]


def test_constants_of_the_queries_come_into_columns_that_they_fit():
    con = sqlite3.connect(":memory:")
    names = ("id", "year", "price", "day", "name", "far", "apart")
    con.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, year, price, day, name, far, apart UNIQUE)")
    rows = [(2 * i, 1900 + 2 * i, 0.5 + i, f"2020-01-{i + 10}", f"n{i}", 10**6 + i, 2 * i) for i in range(20)]
    con.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    con.commit()
    asked = ["SELECT * FROM t WHERE year < 1919 AND price > 3.25 AND day > '2020-01-20' AND name <> '7' AND far > 25"]
    copies = [perturbed(con, asked, seed) for seed in range(3)]
    new = {
        name: {v for copy in copies for v in column(copy, "t", name)} - set(column(con, "t", name)) for name in names
    }
    new.pop("day")  # this day stood there once
    assert new == dict(id=set(), year={1919}, price={3.25}, name=set(), far=set(), apart=set())
    assert any(column(copy, "t", "day").count("2020-01-20") > 1 for copy in copies)


@pytest.mark.parametrize("writer", ["itself", "another"])
def test_changes_that_are_not_committed_are_named(tmp_path, writer):
    path = tmp_path / "a.sqlite"
    con = sqlite3.connect(path, timeout=0.1)
    con.execute("CREATE TABLE t (a)")
    other = con if writer == "itself" else sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match="not committed"):
        perturbed(con)
    other.commit()
    assert column(perturbed(con), "t", "a") == []


def test_text_that_is_no_unicode_is_copied():
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE t AS SELECT CAST(x'ff41' AS TEXT) AS a, x'00ff' AS b")
    assert perturbed(con).execute("SELECT * FROM t").fetchall() == [("\ufffdA", b"\0\xff")]


REFERRED = {
    "a unique pair": (
        "CREATE TABLE p (id INTEGER PRIMARY KEY, a, b, UNIQUE (a, b)); CREATE TABLE c (id INTEGER PRIMARY KEY, "
        "p REFERENCES p)",
        [(i, i % 10, f"x{i // 10}") for i in range(30)],
        [(i, i % 30) for i in range(40)],
        "c.p = p.id",
    ),
    "a unique pair that is referred to": (
        "CREATE TABLE p (id INTEGER PRIMARY KEY, a, b, UNIQUE (a, b)); CREATE TABLE c (id INTEGER PRIMARY KEY, a, b, "
        "FOREIGN KEY (a, b) REFERENCES p (a, b))",
        [(i, i % 4, i // 4) for i in range(12)],
        [(i, i % 4, i % 12 // 4) for i in range(40)],
        "(c.a, c.b) = (p.a, p.b)",
    ),
    "a column that is no key": (
        "CREATE TABLE p (CODE INT, town); CREATE TABLE c (id INTEGER PRIMARY KEY, code REFERENCES P (code))",
        [(i + 5, f"town {i}") for i in range(12)],
        [(i, i % 12 + 5) for i in range(40)],
        "c.code = p.code",
    ),
    "an expression that is unique": (
        "CREATE TABLE p (id INTEGER PRIMARY KEY, email); CREATE UNIQUE INDEX u ON p (lower(email)); "
        "CREATE TABLE c (id INTEGER PRIMARY KEY, p REFERENCES p)",
        [(i, f"M{i}" if i % 3 else None) for i in range(12)],
        [(i, i % 12) for i in range(40)],
        "c.p = p.id",
    ),
    "a part that is unique": (
        "CREATE TABLE p (id INTEGER PRIMARY KEY, kind, no); CREATE UNIQUE INDEX u ON p (no) WHERE kind = 'a'; "
        "CREATE TABLE c (id INTEGER PRIMARY KEY, p REFERENCES p)",
        [(i, "ab"[i % 2], i // 2) for i in range(12)],
        [(i, i % 12) for i in range(40)],
        "c.p = p.id",
    ),
    "two keys with a column in common": (
        "CREATE TABLE p (tenant, id, town, PRIMARY KEY (tenant, id)); CREATE TABLE q (tenant, id, PRIMARY KEY (tenant, "
        "id)); INSERT INTO q SELECT value / 4, value % 4 FROM json_each('[0,1,2,3,4,5,6,7,8,9,10,11]'); CREATE TABLE c "
        "(n INTEGER PRIMARY KEY, tenant, p, q, FOREIGN KEY (tenant, p) REFERENCES p, FOREIGN KEY (tenant, q) "
        "REFERENCES q)",
        [(i // 4, i % 4, f"town {i}") for i in range(12)],
        [(i, i % 3, i % 4, (i + 1) % 4) for i in range(40)],
        "(c.tenant, c.p) = (p.tenant, p.id)",
    ),
    "keys that nobody declared": (
        "CREATE TABLE p (id integer, town); CREATE TABLE c (name, p)",
        [(i, f"town {i}") for i in range(10)],
        [(f"pump {i}", i % 10) for i in range(40)],
        "c.p = p.id",
    ),
    "a generated column that refers": (
        "CREATE TABLE p (id INTEGER PRIMARY KEY, town); CREATE TABLE c (a INT, b INT AS (a + 0) STORED REFERENCES p)",
        [(i, f"town {i}") for i in range(10)],
        [(i % 10,) for i in range(40)],
        "c.b = p.id",
    ),
}


@pytest.mark.parametrize("kind", REFERRED)
def test_what_refers_to_a_row_still_does(kind):
    made, parents, children, joined = REFERRED[kind]
    con = sqlite3.connect(":memory:")
    con.executescript(made)
    for table, rows in (("p", parents), ("c", children)):
        names = ", ".join(name for (name,) in con.execute("SELECT name FROM pragma_table_info(?)", [table]))
        con.executemany(f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(rows[0]))})", rows)
    con.commit()
    changed = 0
    for seed in range(4):
        copy = perturbed(con, ["SELECT 3"], seed)
        assert copy.execute(f"SELECT COUNT(*) FROM c JOIN p ON {joined}").fetchone() == (40,)
        assert len(copy.execute("SELECT * FROM p").fetchall()) == len(parents)
        changed += copy.execute("SELECT * FROM c").fetchall() != con.execute("SELECT * FROM c").fetchall()
    assert changed


FEW = "CREATE TABLE t (m, n, d); INSERT INTO t SELECT value, {}, '2020-01-' || (10 + value) || ' 10:00:00' FROM {}"
BOUNDS = [  # an answer that lets in the bound of the reference, which no row has
    ("-31 + 2 * value", "n <= -10", "n < -10"),
    ("(-31 + 2 * value) / 2.0 ", "n <= -.75", "n < -.75"),
    ("1234567890123456700 + 2 * value", "n <= 1234567890123456721", "n < 1234567890123456721"),
    ("value", "d <= '2020-01-19 12:00:00'", "d < '2020-01-19 12:00:00'"),
]


@pytest.mark.parametrize("values, answer, reference", BOUNDS)
def test_a_bound_that_is_let_in_is_found_out(values, answer, reference):
    con = sqlite3.connect(":memory:")
    numbers = ", ".join(map(str, range(30)))
    con.executescript(FEW.format(values, f"json_each('[{numbers}]')"))
    queries = [f"SELECT m FROM t WHERE {condition}" for condition in (answer, reference)]
    assert execution_accuracy(queries[:1], queries[1:], con)["values"] == [1]
    assert execution_accuracy(queries[:1], queries[1:], con, copies=5)["values"] == [0]


def test_what_cannot_be_copied_is_named(tmp_path):
    con = sqlite3.connect(":memory:")
    con.executescript(
        "CREATE TABLE t (v, k); CREATE INDEX i ON t (json_extract(v, '$.a')) WHERE k = 'j'; "
        """INSERT INTO t VALUES ('{"a": 1}', 'j'), ('none', 'n'), ('no', 'n'), ('nothing', 'n')"""
    )
    with pytest.raises(InputError, match="cannot be copied with other contents: malformed JSON"):
        for seed in range(20):
            perturbed(con, seed=seed)
    (tmp_path / "a.sqlite").write_text("no database " * 100)
    with pytest.raises(InputError, match="not a database"):
        execution_accuracy(["SELECT 1"], ["SELECT 1"], tmp_path / "a.sqlite", copies=1)


def test_a_reference_that_fails_on_a_copy_says_nothing_of_the_answer():
    con = sqlite3.connect(":memory:")
    con.executescript("""CREATE TABLE t (v, k); INSERT INTO t VALUES ('{"a": 1}', 'j'), ('none', 'n'), ('no', 'n')""")
    reference = "SELECT json_extract(v, '$.a') FROM t WHERE k = 'j'"
    assert execution_accuracy([reference, "SELECT 2"], [reference] * 2, con, copies=9)["values"] == [1, 0]


BY_ACCIDENT = [
    ("SELECT COUNT(*) FROM pumps WHERE installed < 1990", "SELECT COUNT(*) FROM pumps WHERE site = 'Kelby'"),
    ("SELECT replaced FROM pumps WHERE installed <= 1994", "SELECT replaced FROM pumps WHERE installed < 1994"),
    ("SELECT replaced FROM pumps WHERE installed = 1980", "SELECT replaced FROM pumps WHERE other_id = 2"),
    ("SELECT 1990", "SELECT replaced FROM pumps WHERE site = 'Kelby'"),
]


@pytest.mark.parametrize("answer, reference", BY_ACCIDENT)
def test_what_agrees_by_accident_is_wrong_on_copies(odd, answer, reference):
    assert execution_accuracy([answer], [reference], odd)["values"] == [1]
    r = execution_accuracy([answer], [reference], odd, copies=10)
    assert r["values"] == [0] and r["errors"] == [None], answer
    assert execution_accuracy([reference], [[answer, reference]], odd, copies=10)["values"] == [1]


def test_an_answer_has_to_agree_with_one_reference_everywhere(odd):
    counts = ["SELECT COUNT(*) FROM pumps WHERE installed < 1990", "SELECT COUNT(*) FROM pumps WHERE installed > 1999"]
    either = "SELECT 1"
    assert execution_accuracy([either], [counts], odd)["values"] == [1]
    assert execution_accuracy([counts[1]], [counts], odd, copies=3)["values"] == [1]


def test_an_error_on_a_copy_is_said(odd):
    dated = "SELECT json_extract('[1, 2', '$') FROM pumps WHERE installed = 1980 AND replaced = 2000"
    empty = "SELECT 1 FROM pumps WHERE installed = 1980 AND replaced = 2000"
    assert execution_accuracy([dated], [empty], odd)["errors"] == [None]
    r = execution_accuracy([dated], [empty], odd, copies=20)
    assert r["values"] == [0] and "JSON" in r["errors"][0]


@pytest.mark.parametrize("kind", ["connection", "file"])
def test_the_database_stays_as_it_is(odd, tmp_path, kind):
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as target:
        odd.backup(target)
    target.close()
    raw, before = path.read_bytes(), "\n".join(odd.iterdump())
    with read_only(path if kind == "file" else odd) as con:
        perturbed(con)
    execution_accuracy(["SELECT 1"], ["SELECT 1"], path if kind == "file" else odd, copies=2)
    assert path.read_bytes() == raw and "\n".join(odd.iterdump()) == before
    odd.execute("DELETE FROM empty")  # it is the caller's again


def test_the_demos_queries_agree_with_themselves_on_copies():
    world, con = make_world(entities=40), sqlite3.connect(":memory:")
    insert_tables(con, world["tables"])
    queries = [row["sql"] for row in (*world["sql"][::9], *make_composed(world["tables"])[::5])]
    assert execution_accuracy(queries, queries, con, copies=2)["mean"] == 1
    strict = [query.replace("<", "<=").replace(">", ">=") for query in queries]
    pairs = [pair for pair in zip(strict, queries) if pair[0] != pair[1]]
    alone, on_copies = (execution_accuracy(*zip(*pairs), con, copies=n)["mean"] for n in (0, 5))
    assert alone > 0.6 and on_copies < 0.4
