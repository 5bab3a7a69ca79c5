"""Record the rule-based extractor on GeoQuery's question split in nbs/results/rules_geoquery.json.

    python tools/record_rules.py PATH/TO/GEOQUERY

The folder holds geography.json and geography.sqlite of jkkummerfeld/text2sql-data. A question counts with the first of
its queries; the five queries that do not run on the database are left out. The rules are learnt from train, the
threshold is chosen on dev. The answers are judged on copies of the database with other contents as well.
"""

import argparse
import sqlite3
import time
from pathlib import Path

from domain_llm.core import read_json
from domain_llm.judge.answers import execution_accuracy
from domain_llm.judge.stats import wilson
from domain_llm.results import save_result
from domain_llm.ship.rules import choose_threshold, learn_rules
from domain_llm.ship.schema import read_schema
from domain_llm.ship.sql import tried

WANTED = 0.95  # accuracy among the answered of dev
COPIES = 5  # of the database, with other contents


def geoquery_rows(
    folder: Path,  # with geography.json and geography.sqlite
    split: str = "question",  # which of the two splits: by "question", or by "query"
):
    "Rows {question, sql, split} with the variables filled in; those whose query does not run have sql None."
    con, rows = sqlite3.connect(folder / "geography.sqlite"), []
    for entry in read_json(folder / "geography.json"):
        for sentence in entry["sentences"]:
            question, sql = sentence["text"], entry["sql"][0]
            for name in sorted(sentence["variables"], key=len, reverse=True):
                value = sentence["variables"][name]
                question, sql = question.replace(name, value), sql.replace(name, value)
            try:
                con.execute(sql).fetchall()
            except sqlite3.Error:
                sql = None
            rows.append(
                dict(
                    question=question,
                    sql=sql,
                    split=sentence["question-split"] if split == "question" else entry["query-split"],
                )
            )
    con.close()
    return rows


def figures(found, threshold):
    "Accuracy over all questions, coverage at the threshold and accuracy among the answered, with Wilson intervals."
    n, right = len(found["correct"]), sum(found["correct"])
    kept = [good for good, c in zip(found["correct"], found["confidence"]) if c >= threshold]
    out = dict(
        n=n, right=right, accuracy=right / n, interval=wilson(right, n), answered=len(kept), coverage=len(kept) / n
    )
    if kept:
        out |= dict(right_answered=sum(kept), of_answered=sum(kept) / len(kept))
        out |= dict(interval_answered=wilson(sum(kept), len(kept)))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder, started = parser.parse_args().folder, time.time()
    rows = geoquery_rows(folder)
    database = folder / "geography.sqlite"
    split = {s: [r for r in rows if r["split"] == s and r["sql"]] for s in ("train", "dev", "test")}
    rules = learn_rules(split["train"], database, read_schema(database))
    dev = tried(split["dev"], rules, database)
    threshold = choose_threshold(dev["confidence"], dev["correct"], WANTED)
    test = tried(split["test"], rules, database)
    result = dict(train=len(split["train"]), left_out=sum(r["sql"] is None for r in rows), wanted=WANTED, copies=COPIES)
    result["threshold"] = threshold
    for part, found in (("dev", dev), ("test", test)):
        references = [row["sql"] for row in split[part]]
        everywhere = execution_accuracy(found["sql"], references, database, copies=COPIES)
        result[part] = figures(found, threshold) | dict(right_on_copies=int(sum(everywhere["values"])))
    print(result)
    print(save_result("rules_geoquery", result, started))


if __name__ == "__main__":
    main()
