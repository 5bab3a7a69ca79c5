"""Questions composed from words: their rows against a hand-written database, their place in the grammar, bad files."""

import re
import sqlite3
from collections import Counter
from statistics import fmean

import pytest
import yaml

from domain_llm import cli
from domain_llm.core import InputError, read_jsonl
from domain_llm.demo.database import insert_tables
from domain_llm.demo.world import make_world
from domain_llm.judge.queries import run_query
from domain_llm.ship import sqlmodel
from domain_llm.ship.ask import shape_of
from domain_llm.ship.composing import composed
from domain_llm.ship.grammar import accepts, joined_sets, question_grammar
from domain_llm.ship.linking import linked
from domain_llm.ship.rules import value_index
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sqlrows import column_values, null_columns
from domain_llm.ship.things import demo_things, draft_things, read_things

SITES = [(1, "Oslo", "north"), (2, "Bergen", "west"), (3, "Rome", "south")]
PUMPS = [(1, "P 7", 3, 1), (2, "Q 1", 8, 2), (3, "O'Hara", 5, 2), (4, "R 4", 5, 1), (5, "S 9", 12, 3)]
VISITS = [(1, 1, "good"), (2, 1, "bad"), (3, 2, "good"), (4, 3, "bad"), (5, 3, "bad")]
WORDS = """
Pumps:
  one: pump
  many: pumps
  label: pumps.NAME
  properties:
    sites.town:
      noun: town
      nouns: towns
      that: ["stand in {x}"]
      with: ["in {x}"]
      not: ["do not stand in {x}"]
    pumps.hours: {noun: running time, unit: hours, most: [longest], least: [shortest]}
    visits.result:
      noun: result
      that: ["were {x} once"]
      with: ["that were {x} once"]
      not: ["were never {x}"]
"""


@pytest.fixture(scope="module")
def con():
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE sites (site_id INTEGER PRIMARY KEY, town TEXT, region TEXT)")
    con.execute(
        "CREATE TABLE pumps (pump_id INTEGER PRIMARY KEY, name TEXT, hours INTEGER, site_id INTEGER"
        " REFERENCES sites(site_id))"
    )
    con.execute(
        "CREATE TABLE visits (visit_id INTEGER PRIMARY KEY, pump_id INTEGER REFERENCES pumps(pump_id), result TEXT)"
    )
    for table, rows in (("sites", SITES), ("pumps", PUMPS), ("visits", VISITS)):
        con.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)
    con.commit()
    return con


@pytest.fixture(scope="module")
def schema(con):
    return read_schema(con)


@pytest.fixture(scope="module")
def things(schema, tmp_path_factory):
    path = tmp_path_factory.mktemp("things") / "things.yaml"
    path.write_text(WORDS, encoding="utf-8")
    return read_things(path, schema)


@pytest.fixture(scope="module")
def rows(con, schema, things):
    return composed(things, column_values(con, schema), schema, 800)


TOWN = {number: town for number, town, _ in SITES}


def of_town(town):
    return [row for row in PUMPS if TOWN[row[3]] == town]


def seen(result):
    return {pump for _, pump, found in VISITS if found == result}


def same_town(name):
    site = next(row[3] for row in PUMPS if row[1] == name)
    return [(row[1],) for row in PUMPS if row[3] == site and row[1] != name]


def names(rows):
    return [(row[1],) for row in rows]


MEAN = fmean(hours for _, _, hours, _ in PUMPS)
MEANT = {
    r"Which pumps are there in (\w+)\?": lambda town: names(of_town(town)),
    r"Which pumps stand in (\w+)\?": lambda town: names(of_town(town)),
    r"Which pumps do not stand in (\w+)\?": lambda town: names(row for row in PUMPS if TOWN[row[3]] != town),
    r"How many pumps are there in (\w+)\?": lambda town: [(len(of_town(town)),)],
    r"Which pumps were (\w+) once\?": lambda result: names(row for row in PUMPS if row[0] in seen(result)),
    r"Which pumps were never (\w+)\?": lambda result: names(row for row in PUMPS if row[0] not in seen(result)),
    r"How many pumps were (\w+) once\?": lambda result: [(len(seen(result)),)],
    r"How many pumps have more than (\d+) hours\?": lambda n: [(sum(row[2] > int(n) for row in PUMPS),)],
    r"Which pump has the longest running time\?": lambda: [("S 9",)],
    r"Which (\d) pumps have the shortest running time\?": lambda n: names(
        sorted(PUMPS, key=lambda row: (row[2], row[1]))[: int(n)]
    ),
    r"What is the average running time of the pumps in (\w+)\?": lambda town: [
        (fmean(row[2] for row in of_town(town)),)
    ],
    r"How many pumps are there per town\?": lambda: sorted(Counter(TOWN[row[3]] for row in PUMPS).items()),
    r"Which town has the most pumps\?": lambda: [("Bergen",)],
    r"Which town has more than 1 pumps\?": lambda: [("Bergen",), ("Oslo",)],
    r"Which pumps have a running time above the average\?": lambda: names(row for row in PUMPS if row[2] > MEAN),
    r"Which other pumps have the same town as (.+)\?": same_town,
    r"What is the town of the pump (.+)\?": lambda name: [(TOWN[next(r[3] for r in PUMPS if r[1] == name)],)],
    r"Which different towns do the pumps that were (\w+) once have\?": None,  # would count visits
}


@pytest.mark.parametrize("pattern", MEANT)
def test_a_question_gets_the_rows_that_it_asks_for(rows, con, pattern):
    meant, found = MEANT[pattern], 0
    for row in rows:
        asked = re.fullmatch(pattern, row["question"])
        if asked:
            found += 1
            got = run_query(con, row["sql"], seconds=5)
            assert sorted(got) == sorted(meant(*asked.groups())), row
    assert bool(found) == (meant is not None)


def test_questions_are_different_and_drawn_by_the_seed(rows, con, schema, things):
    values = column_values(con, schema)
    first = composed(things, values, schema, 50, seed=1)
    assert len({row["question"] for row in rows}) == len(rows) > 400
    assert composed(things, values, schema, 50, seed=1) == first != composed(things, values, schema, 50, seed=2)
    without = composed(things, values, schema, 200, unwanted=lambda sql: "COUNT" in sql)
    assert len(without) == 200 and not any("COUNT" in row["sql"] for row in without)
    with pytest.raises(InputError, match="give no question"):
        composed(things, values, schema, 5, unwanted=lambda sql: True)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_model_may_write_every_query(lang):
    "The grammar that a question gets has the query that was composed for it."
    pytest.importorskip("llguidance")
    con, world = sqlite3.connect(":memory:"), make_world(seed=0, lang=lang)
    insert_tables(con, world["tables"])
    schema = read_schema(con)
    index, sets = value_index(con, schema), joined_sets(schema)
    for row in composed(read_things(demo_things(lang), schema), column_values(con, schema), schema, 60):
        found = linked(row["question"], schema, index)
        assert accepts(question_grammar(found, schema, (), index, sets), row["sql"]), row
        assert run_query(con, row["sql"], seconds=5) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("sites.town:", "sites.twn:"), "table 'sites' has no column 'twn' .did you mean 'town'"),
        (("sites.town:", "site.town:"), "no table 'site' .did you mean 'sites'"),
        (("noun: town", "name: town"), "unknown 'name'"),
        (("      noun: town\n", ""), "lacks 'noun'"),
        (("stand in {x}", "stand in"), "must have {x}"),
        (("stand in {x}", "stand in {x} {z}"), "must have {x}"),
        (("stand in {x}", "stand in {x"), "brace"),
        (("stand in {x}", "stand in {x!r}"), "must have {x}"),
        (("stand in {x}", "stand in {x:d}"), "must have {x}"),
        (("noun: town", "noun: 2024-13-45"), "not valid YAML"),
        (('["in {x}"]', "in"), "must be a list"),
        (("many: pumps", "many: 3"), "must be a text"),
        (("  many: pumps\n", ""), "lacks 'many'"),
        (("nouns: towns", "nouns: towns\n      via: [roads]"), "no table 'roads'"),
        (("one: pump", "one: pump\n  one: pump"), "stands twice"),
        ((WORDS, "- pumps"), "names no thing"),
        ((WORDS, "pumps: 3"), "must be a set of"),
    ],
)
def test_a_wrong_word_is_named_with_its_place(schema, tmp_path, change, said):
    path = tmp_path / "things.yaml"
    path.write_text(WORDS.replace(*change), encoding="utf-8")
    assert path.read_text() != WORDS
    with pytest.raises(InputError, match=said):
        read_things(path, schema)


def test_the_demos_words_have_the_same_things_in_both_languages():
    "A property that one language can ask for, the other can, too."
    english, chinese = (yaml.safe_load(demo_things(lang).read_text(encoding="utf-8")) for lang in ("en", "zh"))
    assert {thing: set(words["properties"]) for thing, words in english.items()} == {
        thing: set(words["properties"]) for thing, words in chinese.items()
    }


def test_composed_questions_are_trained_beside_the_users(con, tmp_path, monkeypatch):
    "They are kept in the folder, and none asks in the shape or the words of a question that is kept apart."
    path = tmp_path / "pumps.sqlite"
    with sqlite3.connect(path) as file:
        con.backup(file)
    (tmp_path / "things.yaml").write_text(WORDS)
    asked = []
    for _, name, hours, _ in PUMPS:
        asked.append((f"Where is {name}?", "SELECT town FROM pumps JOIN sites USING (site_id) WHERE name = '{}'", name))
        asked.append((f"{hours} hours {name}?", "SELECT name FROM pumps WHERE name = '{}'", name))
    shapes = ["hours", "name", "pump_id", "site_id", "hours, name", "name, hours", "hours, site_id", "name, site_id"]
    rows = [dict(question=q, sql=sql.format(name.replace("'", "''"))) for q, sql, name in asked]
    rows += [
        dict(question=f"{s} {n}", sql=f"SELECT {s} FROM pumps WHERE hours > {n}") for s in shapes for n in range(9)
    ]
    rows += [dict(question=f"count {n}", sql=f"SELECT COUNT(*) FROM pumps WHERE hours < {n}") for n in range(30)]
    trained = []

    def stop(own, more, *rest):
        trained.append((own, more))
        raise RuntimeError("here")

    monkeypatch.setattr(sqlmodel, "_train", stop)
    given = dict(things=tmp_path / "things.yaml", number=300)
    with pytest.raises(RuntimeError, match="here"):
        sqlmodel.make_sql_model(rows, path, "base", tmp_path / "sql", **given)
    ((own, more),) = trained
    assert read_jsonl(tmp_path / "sql" / "composed.jsonl") == more and len(more) > 200
    _, apart = sqlmodel.parted(sqlmodel.checked_rows(rows, path, read_schema(path)))
    hidden = {shape_of(row["sql"]) for row in apart} - {shape_of(row["sql"]) for row in own}
    assert hidden and not hidden & {shape_of(row["sql"]) for row in more}
    for other in (dict(things=None), dict(given, number=200)):
        with pytest.raises(InputError, match="made with other things"):
            sqlmodel.make_sql_model(rows, path, "base", tmp_path / "sql", **other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--composed", "5"], "--composed is the number"),
        (["--composed", "0", "--things", "demo"], "--composed is the number"),
        (["--things", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_options_that_do_not_fit(options, said, tmp_path, capsys):
    assert cli.main(["text2sql", "demo", "--out", str(tmp_path / "sql"), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_first_version_of_the_words_is_made_from_names(con, schema, tmp_path):
    "It can be read and composed from as it stands; what it calls things was looked up by hand."
    path = tmp_path / "draft.yaml"
    path.write_text(draft_things(schema), encoding="utf-8")
    drafted = read_things(path, schema)
    assert {table: (said["one"], said["many"], said["label"]) for table, said in drafted.items()} == {
        "sites": ("site", "sites", "sites.town"),
        "pumps": ("pump", "pumps", "pumps.name"),
        "visits": ("visit", "visits", "visits.result"),
    }
    assert drafted["pumps"]["properties"] == {"pumps.hours": dict(noun="hours"), "sites.town": dict(noun="site")}
    for row in composed(drafted, column_values(con, schema), schema, 50):
        run_query(con, row["sql"], seconds=5)


def test_the_command_drafts_words_and_overwrites_none(con, tmp_path, capsys):
    path, words = tmp_path / "pumps.sqlite", tmp_path / "words.yaml"
    with sqlite3.connect(path) as file:
        con.backup(file)
    asked = ["text2sql", str(path), "--draft-things", str(words)]
    assert cli.main(asked) == 0 and "--things" in capsys.readouterr().out
    words.write_text("mine")
    assert cli.main(asked) == 2 and words.read_text() == "mine"
    assert cli.main(["text2sql", str(path)]) == 2
    assert "--out FOLDER" in capsys.readouterr().err


UNTIDY = """
logs:
  one: log
  many: logs
  label: logs.title
  properties:
    logs.size: {noun: size}
    logs.note: {noun: note}
    marks.mark: {noun: mark, with: ["with the mark {x}"]}
"""


def test_a_table_that_holds_anything_is_asked_only_for_what_somebody_would_ask(tmp_path):
    """Texts among numbers, infinity, long and broken texts stand in no question; a key of two columns is not counted,
    and a name that several rows have is compared with all of them."""
    con = sqlite3.connect(":memory:")
    con.execute("CREATE TABLE logs (a INTEGER, b INTEGER, title TEXT, size INTEGER, note TEXT, PRIMARY KEY (a, b))")
    con.execute("CREATE TABLE marks (a INTEGER, b INTEGER, mark TEXT, FOREIGN KEY (a) REFERENCES logs(a))")
    rows = [(1, 1, "x", "n/a", "short"), (1, 2, "x", 9e999, "two\nlines"), (2, 1, "y", 4, "long " * 20)]
    rows += [(3, 1, "z", 9, "other"), (4, 1, "w", 4, "short")]
    con.executemany("INSERT INTO logs VALUES (?, ?, ?, ?, ?)", rows)
    con.executemany("INSERT INTO marks VALUES (?, ?, ?)", [(1, 1, "red"), (1, 2, "red"), (2, 1, "blue")])
    (tmp_path / "things.yaml").write_text(UNTIDY)
    schema = read_schema(con)
    made = composed(read_things(tmp_path / "things.yaml", schema), column_values(con, schema), schema, 300)
    asked = " ".join(row["question"] for row in made)
    assert not re.search("n/a|inf|lines|long ", asked) and "short" in asked
    assert not any("COUNT" in row["sql"] and "marks.mark = " in row["sql"] for row in made)
    same = [row for row in made if row["question"].startswith("Which other logs have the same note as x")]
    assert same and all(" IN (SELECT logs.note" in row["sql"] for row in same)
    for row in made:
        run_query(con, row["sql"], seconds=5)


def made_from(tmp_path, tables, rows, words, number=400):
    "A database, its schema and the questions that are composed from it."
    con = sqlite3.connect(":memory:")
    for statement in tables:
        con.execute(statement)
    for table, values in rows.items():
        con.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(values[0]))})", values)
    (tmp_path / "things.yaml").write_text(words, encoding="utf-8")
    schema = read_schema(con)
    things = read_things(tmp_path / "things.yaml", schema)
    nulls = null_columns(con, schema)
    made = composed(things, column_values(con, schema), schema, number, nulls=nulls)
    return con, {row["question"]: row["sql"] for row in made}


def test_two_keys_to_one_table_are_not_asked_for(tmp_path):
    "A game has two teams: which one is meant, no key says."
    _, made = made_from(
        tmp_path,
        [
            "CREATE TABLE teams (id INTEGER PRIMARY KEY, name TEXT)",
            "CREATE TABLE games (id INTEGER PRIMARY KEY, day TEXT, home INT REFERENCES teams,"
            " guest INT REFERENCES teams)",
        ],
        dict(teams=[(1, "A1"), (2, "B1"), (3, "C1")], games=[(1, "g1", 1, 2), (2, "g2", 2, 1), (3, "g3", 3, 1)]),
        """
games: {one: game, many: games, label: games.day, properties: {teams.name: {noun: team}, games.day: {noun: day}}}
teams:
  one: team
  many: teams
  label: teams.name
  properties: {games.day: {noun: game, that: ["played {x}"], not: ["did not play {x}"]}, teams.name: {noun: name}}
""",
    )
    assert made and not any("teams" in sql and "games" in sql for sql in made.values())


def test_a_triangle_of_keys_is_not_asked_for(tmp_path):
    "An order and its customer both have an address: which one is meant, no key says."
    _, made = made_from(
        tmp_path,
        [
            "CREATE TABLE addresses (id INTEGER PRIMARY KEY, town TEXT)",
            "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, address_id INT REFERENCES addresses)",
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INT REFERENCES customers,"
            " address_id INT REFERENCES addresses)",
        ],
        dict(
            addresses=[(1, "Rome"), (2, "Oslo")],
            customers=[(1, "Ann", 1), (2, "Bob", 2)],
            orders=[(1, 1, 1), (2, 2, 1), (3, 2, 2)],
        ),
        """
orders:
  one: order
  many: orders
  properties: {customers.name: {noun: customer, with: ["of {x}"]}, addresses.town: {noun: town, with: ["to {x}"]}}
""",
    )
    assert made and not any("customers" in sql and "addresses" in sql for sql in made.values())


def test_never_means_no_row_that_points_to_the_thing(tmp_path):
    "Also where a table points to itself, names have spaces, and the key that points is NULL somewhere."
    con, made = made_from(
        tmp_path,
        [
            'CREATE TABLE staff ("staff id" INTEGER PRIMARY KEY, name TEXT, boss INTEGER REFERENCES staff)',
            'CREATE TABLE jobs (id INTEGER PRIMARY KEY, "who did" INTEGER REFERENCES STAFF("staff id"), what TEXT)',
        ],
        dict(
            staff=[(1, "Ann", None), (2, "Bob", 1), (3, "Cy", 2)],
            jobs=[(1, 1, "weld"), (2, 2, "paint"), (3, None, "weld")],
        ),
        """
staff:
  one: person
  many: people
  label: staff.name
  properties: {jobs.what: {noun: job, that: ["did {x}"], not: ["never did {x}"]}, staff.name: {noun: name}}
""",
    )
    assert run_query(con, made["Which people never did weld?"], seconds=5) == [("Bob",), ("Cy",)]
    assert run_query(con, made["Which people did weld?"], seconds=5) == [("Ann",)]


def test_what_is_not_known_is_neither_the_least_nor_a_group(tmp_path):
    con, made = made_from(
        tmp_path,
        ["CREATE TABLE pumps (id INTEGER PRIMARY KEY, name TEXT, power INTEGER, kind TEXT)"],
        dict(pumps=[(1, "P", None, None), (2, "Q", 4, None), (3, "R", 7, "gear"), (4, "S", 9, None)]),
        """
pumps:
  one: pump
  many: pumps
  label: pumps.name
  properties: {pumps.power: {noun: power, least: [smallest]}, pumps.kind: {noun: kind, nouns: kinds}}
""",
    )
    assert run_query(con, made["Which pump has the smallest power?"], seconds=5) == [("Q",)]
    assert run_query(con, made["Which kind has the most pumps?"], seconds=5) == [("gear",)]
    assert run_query(con, made["How many pumps are there per kind?"], seconds=5) == [("gear", 1)]
    assert run_query(con, made["Which different kinds do the pumps have?"], seconds=5) == [("gear",)]


def test_values_stand_in_the_question_as_they_are(tmp_path):
    "Words are put right round a value and not in it; a text of digits is a text, a date in another order is one, too."
    _, made = made_from(
        tmp_path,
        ["CREATE TABLE pumps (id INTEGER PRIMARY KEY, name TEXT, grade TEXT, day DATE, len INTEGER, wid INTEGER)"],
        dict(
            pumps=[
                (1, "1001", "Class A engine", "05/01/2024", 3, 4),
                (2, "1002", "Core .NET", "12/31/2022", 6, 5),
                (3, "1003", "oak", "07/02/2023", 8, 9),
            ]
        ),
        """
pumps:
  one: pump
  many: pumps
  label: pumps.name
  properties:
    pumps.grade: {noun: grade, that: ["have a {x} grade"], with: ["of {x}"]}
    pumps.day: {noun: day}
    pumps.len: {noun: length, unit: m}
    pumps.wid: {noun: width, unit: m}
""",
        800,
    )
    assert made["How many pumps are there of Class A engine?"].endswith("pumps.grade = 'Class A engine'")
    assert made["List all pumps of Core .NET."].endswith("pumps.grade = 'Core .NET'")
    oaken = [question for question in made if "oak grade" in question]
    assert oaken and all(" an oak grade" in question for question in oaken)
    assert any(question.startswith("What is the grade of the pump 1002") for question in made)
    assert not any(re.search(r"pumps.day [<>] |(MAX|MIN)\(pumps.day", sql) for sql in made.values())
    assert not any(re.search(r"(above|below|than) \d+ m\b", q) and not re.search("length|width", q) for q in made)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (["CREATE TABLE a (id INTEGER PRIMARY KEY, name TEXT, other INT REFERENCES gone(id))"], {}),
        (["CREATE TABLE a (id INTEGER PRIMARY KEY, size INT, name TEXT, up INT REFERENCES a)"], {"a": {"a.size"}}),
        (
            [
                "CREATE TABLE Sites (ID INTEGER PRIMARY KEY, town TEXT)",
                'CREATE TABLE "a.b" (id INTEGER PRIMARY KEY, name TEXT, size INT)',
                "CREATE TABLE pumps (id INTEGER PRIMARY KEY, label TEXT, site INT REFERENCES sites)",
            ],
            {"pumps": {"Sites.town"}},
        ),
    ],
)
def test_odd_keys_are_drafted_without_error(tables, said, tmp_path):
    con = sqlite3.connect(":memory:")
    for statement in tables:
        con.execute(statement)
    schema = read_schema(con)
    drafted = yaml.safe_load(draft_things(schema)) or {}
    assert {thing: set(words["properties"]) for thing, words in drafted.items()} == said
    (tmp_path / "things.yaml").write_text(draft_things(schema))
    if said:
        things = read_things(tmp_path / "things.yaml", schema)
        with pytest.raises(InputError, match="give no question"):  # the tables are empty
            composed(things, column_values(con, schema), schema, 5, unwanted=lambda sql: "WHERE" not in sql)
