"""The guard on a real PostgreSQL server, which the test starts in a folder of its own; skipped where there is none."""

import glob
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from fixtures.attacks import attacks, joined

from domain_llm.core import InputError
from domain_llm.demo.database import insert_tables
from domain_llm.demo.world import make_world
from domain_llm.ship.guard import Refusal
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sql import run_guarded

sa = pytest.importorskip("sqlalchemy")
pytest.importorskip("psycopg")
FOUND = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
BIN = Path(shutil.which("postgres") or (FOUND[-1] if FOUND else "/nowhere")).resolve().parent
pytestmark = pytest.mark.skipif(not (BIN / "initdb").is_file(), reason="no PostgreSQL server here")


@pytest.fixture(scope="module")
def server():
    "The folder of a server that listens on a socket in it alone; PostgreSQL does not run as root."
    folder = tempfile.mkdtemp(prefix="pg", dir="/tmp")
    who = dict(user="postgres", group="postgres", extra_groups=[]) if os.geteuid() == 0 else {}
    if who:
        shutil.chown(folder, "postgres", "postgres")
    how = dict(cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120, **who)
    subprocess.run([BIN / "initdb", "-D", f"{folder}/data", "-U", "owner", "-A", "trust", "-E", "UTF8"], **how)
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c autovacuum=off"
    control = [BIN / "pg_ctl", "-D", f"{folder}/data", "-w"]
    subprocess.run([*control, "-l", f"{folder}/log", "-o", options, "start"], **how)
    yield Path(folder)
    subprocess.run([*control, "-m", "immediate", "stop"], **how)
    shutil.rmtree(folder)


class _Executing:
    "A SQLAlchemy connection with the two methods of SQLite's that `insert_tables` uses."

    def __init__(self, con):
        self.con, self.commit = con, con.commit

    def execute(self, statement):
        self.con.exec_driver_sql(statement)

    def executemany(self, statement, rows):
        self.con.exec_driver_sql(statement.replace("?", "%s"), rows)


@pytest.fixture(scope="module")
def urls(server):
    "The owner's URL and that of a role that may only read, over the demo's database."
    owner, reader = (f"postgresql+psycopg://{who}@/postgres?host={server}" for who in ("owner", "reader"))
    engine = sa.create_engine(owner)
    with engine.connect() as con:
        insert_tables(_Executing(con), make_world(seed=0, lang="zh")["tables"])
        con.exec_driver_sql("CREATE TABLE secrets (name TEXT)")
        con.exec_driver_sql("INSERT INTO secrets VALUES ('password')")
        con.exec_driver_sql('CREATE TABLE "Odd %%s :a" ("Name" TEXT, data JSON)')
        con.exec_driver_sql("""INSERT INTO "Odd %%s :a" VALUES ('100%%s :b', '{"a": 1}')""")
        con.exec_driver_sql("CREATE ROLE reader LOGIN")
        con.exec_driver_sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        con.commit()
    engine.dispose()
    return owner, reader


@pytest.fixture(scope="module")
def schema(urls):
    found = read_schema(urls[1])
    del found["tables"]["secrets"]
    return found


def contents(url):
    "Everything in the tables, and the names of all relations."
    engine = sa.create_engine(url)
    with engine.connect() as con:
        names = [name for (name,) in con.exec_driver_sql("SELECT relname FROM pg_class ORDER BY 1")]
        tables = [name for name in read_schema(url)["tables"] if not name.startswith("Odd")]
        found = {name: con.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in tables}
    engine.dispose()
    return names, found


def test_the_schema_is_read(schema):
    assert schema["dialect"] == "postgres"
    machines = schema["tables"]["machines"]
    assert machines["key"] == ["machine_id"]
    assert sorted(machines["foreign"]) == [["site_id", "sites", "site_id"], ["type_id", "types", "type_id"]]
    assert machines["columns"]["name"]["type"] == "TEXT" and len(machines["columns"]["name"]["samples"]) == 3
    odd = schema["tables"]["Odd %s :a"]["columns"]
    assert odd["Name"]["samples"] == ["100%s :b"] and odd["data"]["samples"] == []


@pytest.mark.parametrize("who", [0, 1], ids=["owner", "reader"])
def test_no_attack_comes_through(who, urls, schema, server):
    "Even for the owner of the server, who may do everything."
    before = contents(urls[0])
    for name, query, refused in attacks():
        if name == "slow" or (who and name not in ("writable WITH", "recursion", "by hand")):
            continue
        try:
            rows = run_guarded(query.replace("{folder}", str(server)), urls[who], schema, seconds=1, most=50)["rows"]
        except Refusal:
            continue
        assert not refused, f"{query[:200]!r} gave {rows[:3]}"
        assert "password" not in str(rows)
    assert contents(urls[0]) == before
    assert not list(server.glob("evil*"))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT sites FROM sites",
        "SELECT secrets FROM secrets",
        "SELECT CAST(sites AS TEXT) FROM sites",
        "SELECT ctid, xmin FROM sites",
        "SELECT tableoid::regclass FROM sites",
        "SELECT sites.pg_sleep FROM sites",
        "SELECT (sites).name FROM sites",
        "SELECT 1 OPERATOR(pg_catalog.+) 1",
        "SELECT '{1}'::int[]",
        "SELECT ARRAY[1, 2]",
        "SELECT U&'\\0041'",
        "SELECT * FROM LATERAL (SELECT 1) AS a",
        "SELECT * FROM ROWS FROM (pg_ls_dir('/')) AS a",
        "SELECT * FROM ONLY secrets",
        "TABLE secrets",
        "SELECT $$x$$ ; DROP TABLE sites",
        "SELECT E'\\'; DROP TABLE sites; --'; DROP TABLE sites",
        "SELECT CURRENT_USER",
        "SELECT * FROM sites FOR SHARE",
        "EXPLAIN ANALYZE SELECT 1",
        "SELECT DISTINCT ON (pg_sleep(9)) name FROM sites",
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY tide_m) FROM sites",
    ],
)
def test_what_only_postgres_knows_is_refused(query, urls, schema):
    with pytest.raises(Refusal):
        run_guarded(query, urls[0], schema, seconds=1)


def test_a_query_ends_in_time(urls, schema):
    for query in (
        f"SELECT COUNT(*) FROM {joined(6)}",
        f"SELECT t0.name FROM {joined(6)} WHERE t0.part_id + t1.part_id + t2.part_id + t3.part_id + t4.part_id = -1",
        f"SELECT COUNT(*) FROM {joined(6)} WHERE t0.name NOT LIKE '%a' || t1.name || t2.name",
    ):
        begun = time.monotonic()
        with pytest.raises(Refusal, match="stopped after 0.5 s"):
            run_guarded(query, urls[0], schema, seconds=0.5)
        assert time.monotonic() - begun < 3
    answer = run_guarded(f"SELECT t0.name FROM {joined(6)}", urls[0], schema, seconds=2, most=5)
    assert len(answer["rows"]) == 5 and "there are more" in answer["note"]


def test_the_transaction_alone_writes_nothing(urls, schema, monkeypatch):
    "Without the parser: PostgreSQL itself refuses."
    allowed = dict(read={})
    monkeypatch.setattr("domain_llm.ship.sql.checked", lambda query, schema: allowed | dict(sql=query))
    before = contents(urls[0])
    for query in (
        "DELETE FROM sites RETURNING name",
        "CREATE TABLE evil (a INT)",
        "SELECT 1; COMMIT; DROP TABLE parts",
    ):
        with pytest.raises(Refusal):
            run_guarded(query, urls[0], schema)
    assert contents(urls[0]) == before


def test_ordinary_queries_run_as_they_are(urls, schema):
    engine = sa.create_engine(urls[1])
    world = make_world(seed=0, lang="zh")
    queries = sorted({row["shape"]: row["sql"] for row in world["sql"]}.values())
    with engine.connect() as con:
        for query in (
            *queries,
            "SELECT * FROM sites ORDER BY name DESC",
            "SELECT SUBSTRING(day, 1, 4) FROM inspections",
        ):
            answer = run_guarded(query, urls[1], schema)
            result = con.exec_driver_sql(query)
            assert answer["rows"] == [tuple(row) for row in result] and answer["columns"] == list(result.keys())
    engine.dispose()
    odd = run_guarded("""SELECT "Name" FROM "Odd %s :a" WHERE "Name" LIKE '%\\% :b'""", urls[1], schema)
    assert odd["rows"] == []
    assert run_guarded("""SELECT "Name" FROM "Odd %s :a" WHERE "Name" LIKE '%:b'""", urls[1], schema)["rows"]


def test_a_server_that_is_not_there(schema):
    with pytest.raises(InputError, match="cannot connect"):
        read_schema("postgresql+psycopg://reader:secret@localhost:1/x")
    with pytest.raises(InputError) as e:
        run_guarded("SELECT name FROM sites", "postgresql+psycopg://reader:secret@localhost:1/x", schema)
    assert "secret" not in str(e.value)
