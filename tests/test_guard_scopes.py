"""A WITH hides no table elsewhere, and a time limit holds from the first step, for a schema as well."""

import sqlite3
import time

import pytest
from test_guard import database, folder, schema  # noqa: F401
from test_guard_postgres import pytestmark, server, urls  # noqa: F401
from test_guard_postgres import schema as postgres_schema  # noqa: F401

from domain_llm.judge.queries import FAILURES, read_only, run_query
from domain_llm.ship.guard import Refusal, guarded
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sql import run_guarded

SCOPES = (
    "WITH secrets AS (SELECT * FROM secrets) SELECT * FROM secrets",
    "WITH a AS (SELECT secrets.name FROM secrets), secrets AS (SELECT 1 AS name) SELECT name FROM a",
    "WITH a AS (SELECT COUNT(*) AS n FROM secrets), secrets AS (SELECT 1 AS x) SELECT n FROM a",
    "SELECT secrets.name FROM secrets, (WITH secrets AS (SELECT 1 AS name) SELECT name FROM secrets) AS x",
    "SELECT COUNT(*) FROM secrets, (WITH secrets AS (SELECT 1 AS a) SELECT a FROM secrets) AS x",
)


@pytest.mark.parametrize("query", SCOPES)
def test_postgres_shows_no_table_that_shares_the_name_of_a_with(query, urls, postgres_schema):  # noqa: F811
    with pytest.raises(Refusal):
        print(run_guarded(query, urls[1], postgres_schema)["rows"])


@pytest.mark.parametrize("query", SCOPES)
def test_sqlite_does_not_even_count_its_rows(query, database, schema):  # noqa: F811
    with pytest.raises(Refusal, match="there is no table 'secrets'"):
        run_guarded(query, database, schema)


def test_a_with_is_seen_where_it_is_in_sight(database, schema):  # noqa: F811
    for query in (
        "WITH a AS (SELECT 5 AS n), b AS (SELECT n FROM a) SELECT n FROM b",
        "WITH a AS (SELECT 5 AS n) SELECT n FROM a UNION SELECT n FROM a",
        "SELECT n FROM (WITH a AS (SELECT 5 AS n) SELECT n FROM a) AS x",
        "WITH a AS (SELECT 5 AS n) SELECT (SELECT n FROM a) AS m",
    ):
        assert run_guarded(query, database, schema)["rows"] == [(5,)], query


def test_a_limit_that_ends_before_the_first_step_holds(database):  # noqa: F811
    begun = time.monotonic()
    with read_only(database) as con, pytest.raises(FAILURES):
        run_query(con, "SELECT COUNT(*) FROM parts a, parts b, parts c, parts d, parts e", 0)
    assert time.monotonic() - begun < 2


def test_an_endless_view_does_not_hold_up_the_schema():
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE t (a)")
    rows = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r WHERE n < 0"
    con.execute(f"CREATE VIEW v AS {rows}")
    begun = time.monotonic()
    assert read_schema(con)["tables"]["v"]["columns"]["n"]["samples"] == []
    assert time.monotonic() - begun < 5


def test_what_is_no_text_is_refused(schema):  # noqa: F811
    for query in (None, 5, b"SELECT 1"):
        with pytest.raises(Refusal, match="no text"):
            guarded(query, schema)
