"""The schema of a database and its guard: what is not allowed does not run, what runs ends and writes nothing."""

import hashlib
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fixtures.attacks import BY_HAND, attacks
from record_rules import geoquery_rows

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables
from domain_llm.demo.world import make_world
from domain_llm.judge.queries import FAILURES, read_only, run_query
from domain_llm.ship.guard import Refusal, guarded
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sql import run_guarded

ROOT = Path(__file__).resolve().parent.parent
SHARED = next((p / "shared/data" for p in ROOT.parents if (p / "shared/data").is_dir()), Path("/nowhere"))
GEOQUERY = SHARED / "text2sql" / "geoquery"
SECONDS = 0.15  # time limit of an attack
ATTACKS = list(attacks())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guard")


@pytest.fixture(scope="module")
def database(folder):
    "The demo's database as a file, with a table that the schema does not have."
    path = folder / "demo.sqlite"
    con = sqlite3.connect(path)
    insert_tables(con, make_world(seed=0)["tables"])
    con.execute("CREATE TABLE secrets (name TEXT)")
    con.execute("INSERT INTO secrets VALUES ('password')")
    con.commit()
    con.close()
    return path


@pytest.fixture(scope="module")
def schema(database):
    found = read_schema(database)
    del found["tables"]["secrets"]
    return found


def state(folder):
    "The files of a folder and their bytes."
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def outcome(query, database, schema):
    "'refused', or the rows."
    begun = time.monotonic()
    try:
        return run_guarded(query, database, schema, seconds=SECONDS, most=50)["rows"]
    except Refusal:
        return "refused"
    finally:
        assert time.monotonic() - begun < SECONDS + 1.5, f"too slow: {query[:200]!r}"


def test_there_are_many_attacks_of_every_family():
    assert len({query for _, query, _ in ATTACKS}) >= 1000
    assert min(Counter(family for family, *_ in ATTACKS).values()) >= 5


@pytest.mark.parametrize("family", sorted({family for family, *_ in ATTACKS}))
def test_no_attack_comes_through(family, database, schema, folder):
    "Refused, or ended in time; the secret is never shown and no file changes or appears."
    before = state(folder)
    for name, query, refused in ATTACKS:
        if name == family:
            query = query.replace("{folder}", str(folder))
            rows = outcome(query, database, schema)
            assert rows == "refused" or not refused, f"{query[:200]!r} gave {rows[:3]}"
            assert "password" not in str(rows) and "CREATE TABLE" not in str(rows), query[:200]
    assert state(folder) == before


@pytest.mark.parametrize("family", ["statements", "writable WITH", "hidden tables", "functions", "recursion"])
def test_the_connection_alone_lets_no_attack_write(family, database, schema, folder):
    "Without the parser: the second layer refuses what the first would have."
    before = state(folder)
    tables = {name: set(table["columns"]) for name, table in schema["tables"].items()}
    shown = []
    for name, query, _ in ATTACKS:
        if name == family:
            try:
                with read_only(database, tables, {"count", "max", "coalesce"}) as con:
                    shown.append((query, run_query(con, query.replace("{folder}", str(folder)), SECONDS, 50)))
            except FAILURES:
                continue
    assert state(folder) == before
    told = [query for query, rows in shown if "password" in str(rows) or "CREATE TABLE" in str(rows)]
    assert not told


def test_a_given_connection_is_as_it_was(schema):
    con = sqlite3.connect(":memory:")
    con.row_factory = sqlite3.Row
    insert_tables(con, make_world(seed=0)["tables"])
    con.execute("CREATE TEMP TABLE secrets (name)")
    before = con.getlimit(sqlite3.SQLITE_LIMIT_LENGTH), "\n".join(con.iterdump())
    assert run_guarded("SELECT COUNT(*) FROM sites", con, schema)["rows"] == [(5,)]
    for query in (*BY_HAND, "SELECT * FROM secrets", "DELETE FROM sites"):
        assert outcome(query, con, schema) == "refused"
    assert (con.getlimit(sqlite3.SQLITE_LIMIT_LENGTH), "\n".join(con.iterdump())) == before
    con.execute("DELETE FROM sites")
    con.execute("ATTACH ':memory:' AS other")


def test_harm_in_cells_and_in_names_stays_text():
    "Cells and names that look like SQL are read as they are."
    evil = 'x\'); DROP TABLE "t"; --'
    table = 'odd "; DROP TABLE t; --'
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE t (a TEXT)")
    con.execute("INSERT INTO t VALUES (?)", (evil,))
    con.execute('CREATE TABLE "odd ""; DROP TABLE t; --" ("a b""c" TEXT)')
    con.execute('INSERT INTO "odd ""; DROP TABLE t; --" VALUES (?)', (evil,))
    schema = read_schema(con)
    assert schema["tables"][table]["columns"]['a b"c']["samples"] == [evil]
    literal = evil.replace("'", "''")
    assert run_guarded(f"SELECT a FROM t WHERE a = '{literal}'", con, schema)["rows"] == [(evil,)]
    assert run_guarded('SELECT "a b""c" FROM "odd ""; DROP TABLE t; --"', con, schema)["rows"] == [(evil,)]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM sites ORDER BY name",
        "SELECT DISTINCT s.region AS r FROM sites s WHERE s.tide_m BETWEEN 1 AND 9 ORDER BY r DESC LIMIT 2 OFFSET 1",
        "SELECT role, COUNT(*) AS n FROM staff GROUP BY role HAVING n > 1 ORDER BY n, role",
        "WITH a AS (SELECT machine_id, MAX(day) AS d FROM inspections GROUP BY machine_id) "
        "SELECT machines.name, a.d FROM a JOIN machines USING (machine_id) ORDER BY 1",
        "WITH a AS (SELECT 1) SELECT COUNT(*) FROM a",
        "SELECT name FROM sites EXCEPT SELECT name FROM sites WHERE region LIKE '%north%' ORDER BY 1",
        "SELECT name, ROW_NUMBER() OVER (PARTITION BY site_id ORDER BY name) FROM staff ORDER BY staff_id",
        "SELECT SUBSTR(day, 1, 4), ROUND(AVG(hours), 1), COUNT(DISTINCT staff_id) FROM inspections GROUP BY 1",
        "SELECT strftime('%m', day) AS m, SUM(hours) FROM inspections GROUP BY m ORDER BY m",
        "SELECT CASE WHEN stock > 9 THEN 'many' ELSE 'few' END AS k, COUNT(*) FILTER (WHERE price > 50) FROM parts "
        "GROUP BY k ORDER BY k",
        "SELECT m.name FROM machines m WHERE NOT EXISTS (SELECT 1 FROM parts p WHERE p.machine_id = m.machine_id)",
        "SELECT name FROM machines m WHERE installed = (SELECT MAX(installed) FROM machines WHERE site_id = m.site_id) "
        "ORDER BY name",
        'SELECT "name" FROM [sites] WHERE `region` = "north"',
        "SELECT UPPER(name) || '; DROP TABLE sites; --' FROM sites -- and no more",
        "SELECT IFNULL(seal, ''), CAST(torque_nm AS REAL) / 2, torque_nm / 2, torque_nm % 7 FROM specifications",
        "(SELECT name FROM sites)",
        "SELECT * FROM sites CROSS JOIN types;",
        "SELECT NAME FROM Sites ORDER BY Tide_M NULLS LAST",
    ],
)
def test_ordinary_queries_run_as_they_are(query, database, schema):
    con = sqlite3.connect(database)
    answer = run_guarded(query, database, schema)
    cursor = con.execute(query[1:-1] if query.startswith("(") else query)
    assert answer["rows"] == cursor.fetchall()
    assert [name.lower() for name in answer["columns"]] == [name.lower() for name, *_ in cursor.description] or (
        "(" in str(answer["columns"])  # an expression without a name is named by its text, which is written anew
    )
    assert answer["note"] is None


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_no_reference_of_the_demo_is_refused(lang):
    con = sqlite3.connect(":memory:")
    world = make_world(seed=0, lang=lang)
    insert_tables(con, world["tables"])
    schema = read_schema(con)
    queries = sorted({row["sql"] for row in world["sql"]})
    assert len(queries) > 300
    for query in queries:
        assert run_guarded(query, con, schema)["rows"] == con.execute(query).fetchall()
        con.set_authorizer(None)


@pytest.mark.skipif(not GEOQUERY.is_dir(), reason="GeoQuery is not here")
def test_no_reference_of_geoquery_is_refused():
    "872 of its 877 queries run on its database, and give the same rows through the guard."
    path = GEOQUERY / "geography.sqlite"
    schema = read_schema(path)
    con = sqlite3.connect(path)
    queries = Counter(row["sql"] for row in geoquery_rows(GEOQUERY) if row["sql"])
    assert queries.total() == 872
    for query in queries:
        rows = con.execute(query).fetchall()
        assert run_guarded(query, path, schema, most=10_000)["rows"] == rows, query


def test_a_refusal_says_what_and_why(schema):
    for query, said in (
        ("DROP TABLE sites", "DROP is not allowed. Only SELECT is"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT hex(name) FROM sites", "the function hex is not allowed"),
        ("SELECT name FROM site", "did you mean 'sites'?"),
        ("SELECT nam FROM sites", "'nam'"),
        ("SELECT FROM WHERE", "cannot be read as SQL"),
        ("SELECT 1" + " " * 20_000, "characters"),
    ):
        with pytest.raises(Refusal) as e:
            guarded(query, schema)
        assert said in str(e.value), str(e.value)


def test_a_column_that_the_schema_leaves_out_is_not_read(database):
    schema = read_schema(database)
    del schema["tables"]["staff"]["columns"]["role"]
    for query in (
        "SELECT role FROM staff",
        "SELECT * FROM staff",
        "SELECT staff.* FROM staff",
        "SELECT name FROM staff ORDER BY role",
        "SELECT name FROM staff WHERE role LIKE 'a%'",
        "SELECT a.name FROM staff a NATURAL JOIN staff b",
        "SELECT COUNT(*) FROM staff a JOIN staff b USING (role)",
        "SELECT x.role FROM (SELECT * FROM staff) x",
    ):
        assert outcome(query, database, schema) == "refused", query


def test_the_cap_is_told(database, schema):
    answer = run_guarded("SELECT name FROM parts", database, schema, most=7)
    assert len(answer["rows"]) == 7 and "first 7 rows" in answer["note"]
    answer = run_guarded("SELECT name FROM parts", database, schema, most=60)
    assert len(answer["rows"]) == 60 and answer["note"] is None


def test_a_wide_answer_is_capped_by_its_size(tmp_path):
    path = tmp_path / "wide.sqlite"
    con = sqlite3.connect(path)
    con.execute("CREATE TABLE t (a TEXT)")
    con.executemany("INSERT INTO t VALUES (?)", [("x" * 90_000,) for _ in range(300)])
    con.commit()
    answer = run_guarded("SELECT a FROM t", path, read_schema(path))
    assert len(answer["rows"]) == 10**7 // 90_000 and "there are more" in answer["note"]


def test_views_and_attached_databases(tmp_path):
    "A view is read where it and its tables are in the schema; a database that was attached before is out of reach."
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE t (a, b)")
    con.execute("INSERT INTO t VALUES (1, 2)")
    con.execute("CREATE VIEW v AS SELECT a FROM t")
    con.execute("ATTACH ':memory:' AS other")
    con.execute("CREATE TABLE other.u (a)")
    schema = read_schema(con)
    assert set(schema["tables"]) == {"t", "v"}
    assert run_guarded("SELECT a FROM v", con, schema)["rows"] == [(1,)]
    for query in ("SELECT a FROM u", "SELECT a FROM other.u"):
        assert outcome(query, con, schema) == "refused"
    with read_only(con, {"u": {"a"}}, set()), pytest.raises(sqlite3.DatabaseError):
        run_query(con, "SELECT a FROM u", 1)


def test_databases_that_are_none(tmp_path):
    (tmp_path / "text.sqlite").write_text("no database " * 200)
    sqlite3.connect(tmp_path / "empty.sqlite").execute("PRAGMA user_version = 1")
    for database, said in (
        (tmp_path / "missing.sqlite", "is no file"),
        (tmp_path / "text.sqlite", "is no SQLite database"),
        (tmp_path / "empty.sqlite", "has no tables"),
        ("nosuch://user:secret@host/x", "address that begins with nosuch://"),
        ("mysql+nodriver://user:secret@host/x", "none of a known database"),
    ):
        with pytest.raises(InputError) as e:
            read_schema(database)
        assert said in str(e.value) and "secret" not in str(e.value)


def test_what_is_missing_is_named(database, schema, monkeypatch):
    with pytest.raises(InputError, match="the URL of a PostgreSQL database"):
        run_guarded("SELECT name FROM sites", f"sqlite:///{database}", schema)
    with pytest.raises(InputError, match="the driver of mysql"):
        run_guarded("SELECT name FROM sites", "mysql+mysqldb://user:secret@host/x", dict(schema, dialect="mysql"))
    with pytest.raises(InputError, match="is no file"):
        run_guarded("SELECT name FROM sites", database.with_name("missing"), schema)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(InputError, match=r"domain_llm\[databases\]"):
        read_schema("postgresql://host/x")


def test_sqlalchemy_reads_the_same_schema(database):
    pytest.importorskip("sqlalchemy")
    ours, theirs = read_schema(database), read_schema(f"sqlite:///{database}")
    assert ours["dialect"] == theirs["dialect"]
    for side in (ours, theirs):
        for table in side["tables"].values():
            table["foreign"].sort()
    assert ours["tables"] == theirs["tables"]
