"""The schema of a MySQL database: of a real MariaDB server, which the test starts in a folder of its own; skipped where
there is none."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from domain_llm.core import InputError
from domain_llm.demo.world import make_world
from domain_llm.ship.guard import Refusal, guarded
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sql import run_guarded

sa = pytest.importorskip("sqlalchemy")
pytest.importorskip("pymysql")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
SERVER, INSTALL = (shutil.which(name, path=PATH) for name in ("mariadbd", "mariadb-install-db"))
pytestmark = pytest.mark.skipif(not (SERVER and INSTALL), reason="no MariaDB server here")


def wait_for(socket, process):
    "Until the server has made its socket."
    for _ in range(600):
        if socket.exists():
            return
        assert process.poll() is None, "the server ended"
        time.sleep(0.1)
    raise TimeoutError(socket)


@pytest.fixture(scope="module")
def url():
    "A server that listens on a socket alone, with an empty database."
    folder = Path(tempfile.mkdtemp(prefix="my", dir="/tmp"))
    who = ["--user=root"] if os.geteuid() == 0 else []
    data, socket = f"--datadir={folder}/data", folder / "socket"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    method = "--auth-root-authentication-method=normal"
    subprocess.run([INSTALL, "--no-defaults", data, method, *who], check=True, timeout=120, **quiet)
    options = [data, f"--socket={socket}", "--skip-networking", f"--pid-file={folder}/pid", *who]
    process = subprocess.Popen([SERVER, "--no-defaults", *options], **quiet)
    try:
        wait_for(socket, process)
        address = "mysql+pymysql://root@localhost/{}?charset=utf8mb4&unix_socket=" + str(socket)
        engine = sa.create_engine(address.format("mysql"))
        with engine.connect() as con:
            con.exec_driver_sql("CREATE DATABASE plant CHARACTER SET utf8mb4")
        engine.dispose()
        yield address.format("plant")
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def world(url):
    "The sites of the demo in Chinese, people, and a table with odd names and values; gives the names of the sites."
    rows = make_world(seed=0, lang="zh")["tables"]["rows"]["sites"]
    engine = sa.create_engine(url)
    with engine.connect() as con:
        con.exec_driver_sql("CREATE TABLE sites (site_id INT PRIMARY KEY, name VARCHAR(80))")
        con.exec_driver_sql(
            "CREATE TABLE staff (staff_id INT, part INT, name VARCHAR(80), site_id INT, PRIMARY KEY (staff_id, part), "
            "FOREIGN KEY (site_id) REFERENCES sites (site_id))"
        )
        con.exec_driver_sql("CREATE TABLE `Odd ``%%s :a` (`The Name` TEXT, data JSON, kind ENUM('a', 'b'), blank DATE)")
        con.exec_driver_sql("""INSERT INTO `Odd ``%%s :a` VALUES ('100%%s :b', '{"a": 1}', 'b', NULL)""")
        sites = [(number, name) for number, name, *_ in rows]
        con.exec_driver_sql("INSERT INTO sites VALUES (%s, %s)", sites)
        con.exec_driver_sql("INSERT INTO staff VALUES (1, 1, '王', 1), (1, 2, '王', 1), (2, 1, '李', NULL)")
        con.exec_driver_sql("CREATE VIEW names AS SELECT name FROM staff")
        con.commit()
    engine.dispose()
    return dict(sites)


def test_the_schema_is_read(url, world):
    schema = read_schema(url)
    assert schema["dialect"] == "mysql"
    assert set(schema["tables"]) == {"sites", "staff", "Odd `%s :a", "names"}
    staff = schema["tables"]["staff"]
    assert staff["key"] == ["staff_id", "part"] and staff["foreign"] == [["site_id", "sites", "site_id"]]
    assert staff["columns"]["name"]["type"].startswith("VARCHAR") and staff["columns"]["part"]["type"] == "INTEGER"
    assert set(staff["columns"]["name"]["samples"]) == {"王", "李"}
    assert set(schema["tables"]["names"]["columns"]["name"]["samples"]) == {"王", "李"}
    found = schema["tables"]["sites"]["columns"]["name"]["samples"]
    assert len(set(found)) == 3 and set(found) <= set(world.values())
    odd = schema["tables"]["Odd `%s :a"]["columns"]
    assert odd["The Name"]["samples"] == ["100%s :b"] and odd["kind"]["samples"] == ["b"]
    assert odd["blank"]["samples"] == [] and odd["kind"]["type"].startswith("ENUM")


def test_the_guard_reads_mysql(url, world):
    "What it lets through runs on the server; its own words of reading and writing files are refused."
    schema = read_schema(url)
    engine = sa.create_engine(url)
    with engine.connect() as con:
        for query, rows in (
            ("SELECT `name` FROM staff WHERE staff_id = 2", [("李",)]),
            ("SELECT s.name, COUNT(*) FROM staff JOIN sites AS s USING (site_id) GROUP BY s.name", [(world[1], 2)]),
            ("SELECT `The Name` FROM `Odd ``%s :a`", [("100%s :b",)]),
        ):
            text = guarded(query, schema)
            assert [tuple(row) for row in con.exec_driver_sql(text.replace("%", "%%"))] == rows, text
    engine.dispose()
    for query in (
        "SELECT LOAD_FILE('/etc/passwd')",
        "SELECT name FROM staff INTO OUTFILE '/tmp/evil'",
        "SELECT SLEEP(9)",
        "SELECT BENCHMARK(1000000000, MD5('a'))",
        "SELECT user FROM mysql.user",
        "SELECT @@version",
        "SELECT name FROM staff; DROP TABLE staff",
        "SELECT /*!50000 SLEEP(9), */ name FROM staff WHERE SLEEP(1)",
        "DELETE FROM staff",
        "SELECT name FROM staff FOR UPDATE",
        "SELECT nothing FROM staff",
    ):
        with pytest.raises(Refusal):
            guarded(query, schema)


def test_a_query_does_not_run_there(url, world):
    with pytest.raises(InputError, match="by a URL of mysql"):
        run_guarded("SELECT name FROM staff", url, read_schema(url))


def test_an_address_without_a_server_is_said(url):
    with pytest.raises(InputError, match="cannot connect to") as e:
        read_schema(url.replace("root@", "root:secret@").replace("unix_socket=/tmp/", "unix_socket=/nowhere/"))
    assert "secret" not in str(e.value)
