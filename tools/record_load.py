"""Record the task server under load, many clients at once, then kills while feedback is sent; in nbs/results/load.json,
or load_model.json where a model answers.

    python tools/record_load.py [--minutes 10] [--clients 32] [--kills 20] [--model FOLDER] [--out FOLDER]

Each question is asked alone first; an answer under load that differs from it is wrong, and a request without an answer
is lost. A client that is told to come again (503) does so. For the kills every client sends thumbs up, each with a text
of its own; the server is killed with SIGKILL at a random moment and started again on the same file, which has to hold
every thumb that was confirmed at the end.
"""

import argparse
import http.client
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from domain_llm.demo.world import make_world
from domain_llm.results import save_result

COMMAND = Path(sys.executable).parent / "domain-llm"
QUESTIONS = 40  # different ones
SAMPLES = 60  # figures of memory that are kept
BROKEN = (OSError, http.client.HTTPException, ValueError)  # what a request without an answer raises


@contextmanager
def served(store, model):
    "A server over the demo's database on a free port: its process and port; killed at the end if it still runs."
    words = [COMMAND, "serve", "--task", "text2sql", "demo", "--store", store, "--port", "0"]
    words += ["--model", model] if model else []
    with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
            if not found:
                raise SystemExit(f"the server did not start: {said}")
            yield process, int(found[1])
        finally:
            process.kill()


def sent(port, path, body):
    "Status, headers and decoded body of a POST request."
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as con:
        con.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = con.getresponse()
        return reply.status, reply.headers, json.loads(reply.read())


def asking(port, expected, until, rng, counts, seconds):
    "One client: ask until the time is over; counts what came back and keeps how long each answer took."
    questions = list(expected)
    while time.monotonic() < until:
        question, begun = rng.choice(questions), time.monotonic()
        try:
            status, headers, found = sent(port, "/ask", {"question": question})
        except BROKEN:
            counts["lost"] += 1
            continue
        if status == 503 and headers.get("Retry-After"):
            counts["told to come again"] += 1
            time.sleep(float(headers["Retry-After"]) * rng.uniform(0.5, 1.5))
            continue
        seconds.append(time.monotonic() - begun)
        counts["lost" if status != 200 else "right" if found == expected[question] else "wrong"] += 1


def together(work, given):
    "Run a function in a thread for each tuple of arguments; gives the threads."
    threads = [threading.Thread(target=work, args=args) for args in given]
    for thread in threads:
        thread.start()
    return threads


def memory(process, threads, begun):
    "Pairs of seconds and MB of a process and its children, once a second while any thread runs."
    found, watched = [], psutil.Process(process.pid)
    while any(thread.is_alive() for thread in threads):
        family = [watched, *watched.children(recursive=True)]
        found.append((round(time.monotonic() - begun, 1), sum(p.memory_info().rss for p in family) / 1e6))
        time.sleep(1)
    return found


def quantile(values, share):
    "The value below which a share of sorted values lies."
    return values[min(len(values) - 1, int(share * len(values)))]


def distribution(seconds):
    "How long answers took, in milliseconds."
    values = sorted(1000 * value for value in seconds)
    shares = {f"p{percent}": quantile(values, percent / 100) for percent in (5, 25, 50, 75, 90, 95, 99)}
    found = shares | dict(mean=sum(values) / len(values), max=values[-1])
    return dict(n=len(values)) | {name: round(value, 1) for name, value in found.items()}


def growth(samples):
    "Mean MB of each third of the time; the first holds what is loaded at the first questions."
    size = max(1, len(samples) // 3)
    thirds = [samples[:size], samples[size : 2 * size] or samples, samples[2 * size :] or samples]
    return [round(sum(mb for _, mb in third) / len(third), 1) for third in thirds]


def under_load(store, clients, minutes, model):
    "Many clients ask at once."
    rows = [row for row in make_world(seed=0)["sql"] if row["split"] == "test"]
    questions = [row["question"] for row in rows[:: max(1, len(rows) // QUESTIONS)]][:QUESTIONS]
    with served(store, model) as (process, port):
        expected = {question: sent(port, "/ask", {"question": question})[2] for question in questions}
        counts, seconds, begun = [Counter() for _ in range(clients)], [[] for _ in range(clients)], time.monotonic()
        until = begun + 60 * minutes
        given = [(port, expected, until, random.Random(i), counts[i], seconds[i]) for i in range(clients)]
        threads = together(asking, given)
        samples = memory(process, threads, begun)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    total, took = sum(counts, Counter()), [value for some in seconds for value in some]
    counted = {name: total[name] for name in ("right", "wrong", "lost", "told to come again")}
    by = dict(Counter(found["by"] for found in expected.values()))
    kept = [(at, round(mb, 1)) for at, mb in samples[:: max(1, len(samples) // SAMPLES)]]
    return dict(
        minutes=minutes,
        clients=clients,
        questions=len(questions),
        answered_by=by,
        answers=counted,
        milliseconds=distribution(took),
        per_second=round(len(took) / (60 * minutes), 1),
        memory_mb=kept,
        memory_mb_thirds=growth(samples),
        exit_status=status,
    )


def voting(port, name, confirmed):
    "One client: send thumbs up until the server is gone; keeps the texts of those that were confirmed."
    for n in range(10**6):
        text = f"{name}-{n}"
        try:
            status, _, _ = sent(port, "/feedback", {"question": text, "sql": "SELECT 1", "good": True})
        except BROKEN:
            return
        if status == 200:
            confirmed.append(text)


def under_kills(store, clients, kills, model):
    "The server is killed while feedback is sent, and started again on the same file."
    rng, confirmed = random.Random(0), []
    for k in range(kills):
        with served(store, model) as (process, port):
            threads = together(voting, [(port, f"{k}-{i}", confirmed) for i in range(clients)])
            time.sleep(rng.uniform(0.5, 2.5))
            process.kill()
            for thread in threads:
                thread.join()
        print(f"killed {k + 1} of {kills}: {len(confirmed):,} thumbs confirmed so far", flush=True)
    with closing(sqlite3.connect(store)) as con:
        kept = {text for (text,) in con.execute("SELECT question FROM feedback")}
        whole = con.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    lost = len(set(confirmed) - kept)
    return dict(kills=kills, clients=clients, confirmed=len(confirmed), kept=len(kept), lost=lost, file_is_whole=whole)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--minutes", type=float, default=10)
    a.add_argument("--clients", type=int, default=32)
    a.add_argument("--kills", type=int, default=20)
    a.add_argument("--model", help="folder that 'domain-llm text2sql' made; without it the rules answer")
    a.add_argument("--out", help="folder of the record (nbs/results)")
    a = a.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        load = under_load(Path(folder) / "load.sqlite", a.clients, a.minutes, a.model)
        print(json.dumps({name: load[name] for name in ("answers", "milliseconds", "memory_mb_thirds")}), flush=True)
        kills = under_kills(Path(folder) / "kills.sqlite", a.clients, a.kills, a.model) if a.kills else None
    result = dict(load=load, kills=kills, model=bool(a.model))
    print(save_result("load_model" if a.model else "load", result, started, a.out))


if __name__ == "__main__":
    main()
