"""The made-up domain: its promises to every other chapter."""

import hashlib
import re
import sqlite3
import time
from collections import Counter

import pytest

from domain_llm.core import InputError, read_json, read_jsonl
from domain_llm.data.corpus import build_corpus
from domain_llm.data.density import density
from domain_llm.data.read import read_documents
from domain_llm.data.tasks import mined
from domain_llm.demo.facts import LANGS, demo_strings
from domain_llm.demo.files import spoil, write_database, write_world
from domain_llm.demo.general import common_questions, general_instructions, general_text, python_docs
from domain_llm.demo.world import make_world
from domain_llm.judge.choice import CLOZE

both = pytest.mark.parametrize("lang", LANGS)


@pytest.fixture(scope="module", params=LANGS)
def lang(request):
    return request.param


@pytest.fixture(scope="module")
def d(lang):
    return make_world(lang=lang)


@pytest.fixture(scope="module")
def folder(lang, tmp_path_factory):
    f = tmp_path_factory.mktemp("demo") / "plant"
    return f, write_world(f, lang=lang)


def pieces(text, lang):
    "The words of an English text, the characters of a Chinese one."
    return re.findall(r"\w", text) if lang == "zh" else text.split()


def states(text, words, lang):
    "Whether a text holds a name or value, in English as whole words."
    return words in text if lang == "zh" else re.search(rf"\b{words}\b", text) is not None


def tree(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_world(d, lang):
    assert make_world(lang=lang) == d
    other = make_world(seed=1, lang=lang)
    assert other["facts"] != d["facts"] and other["documents"] != d["documents"] and other["mcq"] != d["mcq"]


def test_counts(d):
    assert len(d["facts"]) == 80 and len(d["mcq"]) == 640 and len(d["open"]) >= 40 and len(d["sql"]) >= 600
    assert len(d["planted"]["duplicates"]) >= 8 and len(d["planted"]["leaks"]) >= 8
    assert Counter(f["entity"] for f in d["facts"]) == {e: 4 for e in {f["entity"] for f in d["facts"]}}
    kinds = Counter(r["kind"] for r in d["documents"])
    assert set(kinds) == {"standard", "book", "web", "news"} and kinds["standard"] > 20
    assert {m["task"] for m in d["instructions"]} == {"domain_qa", "domain_extraction", "domain_summary"}


@pytest.mark.parametrize("part", ["facts", "documents", "mcq", "open", "sql", "instructions"])
def test_columns(d, part):
    want = dict(
        facts={"id", "entity", "attribute", "value"},
        documents={"text", "source", "kind", "id"},
        mcq={"question", "choices", "answer", "group", "fact", "part"},
        open={"question", "reference", "group", "part"},
        sql={"question", "sql", "split", "shape"},
        instructions={"messages", "task"},
    )[part]
    assert all(set(r) == want for r in d[part])


def test_ids_are_unique(d):
    for part in ("facts", "documents"):
        assert len({r["id"] for r in d[part]}) == len(d[part])


# ------------------------------------------------------------------ questions
def test_positions_are_balanced_and_say_nothing_about_the_wording(d):
    assert set(Counter(q["answer"] for q in d["mcq"]).values()) == {160}
    for wording in range(8):  # the k-th question of every fact: no position may dominate
        assert max(Counter(q["answer"] for q in d["mcq"][wording::8]).values()) < 40


def test_options_are_values_of_the_same_attribute(d):
    fact = {f["id"]: f for f in d["facts"]}
    known = {}
    for f in d["facts"]:
        known.setdefault(f["attribute"], set()).add(f["value"])
    for q in d["mcq"]:
        f = fact[q["fact"]]
        assert q["group"] == f["entity"]
        assert q["choices"][q["answer"]] == f["value"] and f["entity"] in q["question"]
        assert len(set(q["choices"])) == 4 and set(q["choices"]) <= known[f["attribute"]]


def accuracy(rows, score):
    "Share of questions whose answer has the highest score; ties count as their chance."
    hit = 0
    for q in rows:
        s = [score(q, c) for c in q["choices"]]
        hit += (s[q["answer"]] == max(s)) / s.count(max(s))
    return hit / len(rows)


@both
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_surface_clue(seed, lang):
    rows = make_world(seed, lang=lang)["mcq"]
    answer, option = Counter(q["choices"][q["answer"]] for q in rows), Counter(c for q in rows for c in q["choices"])
    clues = dict(
        answers=lambda q, c: answer[c],
        share=lambda q, c: answer[c] / option[c],
        often=lambda q, c: option[c],
        seldom=lambda q, c: -option[c],
        longest=lambda q, c: len(c),
        shortest=lambda q, c: -len(c),
        last=lambda q, c: q["choices"].index(c),
        alphabet=lambda q, c: sorted(q["choices"]).index(c),
    )
    for name, score in clues.items():
        assert accuracy(rows, score) < 0.35, name


def test_instructions_use_other_words_than_the_tests(d, lang):
    long = 7 if lang == "zh" else 30
    tests = {q["question"] for q in d["mcq"]} | {q["question"] for q in d["open"]}
    assert not any(
        m["content"] in tests or any(len(t) > long and t in m["content"] for t in tests)
        for r in d["instructions"]
        for m in r["messages"]
    )


# ------------------------------------------------------------------ taught and held-out machines
def said(row):
    return "\n".join(m["content"] for m in row["messages"])


def named_in(text, d, lang):
    return {f["entity"] for f in d["facts"] if states(text, f["entity"], lang)}


@both
@pytest.mark.parametrize("seed, n", [(0, 20), (1, 16), (2, 40)])
def test_instructions_speak_of_the_taught_machines_only(seed, n, lang):
    d = make_world(seed, n, lang)
    assert set().union(*(named_in(said(r), d, lang) for r in d["instructions"])) == set(d["taught"])
    assert len(d["taught"]) == n // 2 == len(set(d["taught"]))


@pytest.mark.parametrize("n", [8, 9, 20, 51, 200])
def test_half_of_each_kind_of_machine_is_taught(n):
    d = make_world(seed=4, entities=n)
    kind = {
        name: demo_strings()["splits"][k // 2 % 5][k % 2][0]
        for k, name in enumerate(dict.fromkeys(f["entity"] for f in d["facts"]))
    }
    machines, taught = Counter(kind.values()), Counter(kind[name] for name in d["taught"])
    assert all(abs(taught[k] - machines[k] / 2) <= 0.5 for k in machines)
    assert abs(len(d["taught"]) - n / 2) <= 0.5


def test_another_seed_teaches_other_kinds_first():
    def places(seed):
        d = make_world(seed)
        return [name in d["taught"] for name in dict.fromkeys(f["entity"] for f in d["facts"])]

    assert len({tuple(places(seed)) for seed in range(5)}) == 5


def test_every_attribute_is_taught_on_some_machines_and_held_out_on_others(d):
    attributes = {
        part: {f["attribute"] for f in d["facts"] if (f["entity"] in d["taught"]) == part} for part in (True, False)
    }
    assert len(attributes[True]) == len(attributes[False]) == 8


def test_questions_say_their_part(d):
    for part in ("mcq", "open"):
        assert {(q["group"], q["part"]) for q in d[part]} == {
            (f["entity"], "taught" if f["entity"] in d["taught"] else "held-out") for f in d["facts"]
        }


def test_a_taught_fact_is_told_in_eight_wordings_and_four_orders(d, lang):
    for name in d["taught"]:
        talks = [r for r in d["instructions"] if len(r["messages"]) == 8 and named_in(said(r), d, lang) == {name}]
        asked = [m["content"] for r in talks for m in r["messages"][::2]]
        assert len(talks) == 8 and len(set(asked)) == 32
        for f in [f for f in d["facts"] if f["entity"] == name]:
            told = [m["content"] for r in talks for m in r["messages"][1::2]]
            answers = [text for text in told if states(text, f["value"], lang)]
            assert len(answers) >= 8 and len(set(answers)) >= 8, f
        orders = {
            tuple(
                min(range(0, 8, 2), key=lambda k: v not in r["messages"][k + 1]["content"])
                for v in sorted(f["value"] for f in d["facts"] if f["entity"] == name)
            )
            for r in talks
        }
        assert len(orders) >= 4


@both
def test_conversations_use_many_wordings_of_their_own(lang):
    for a in demo_strings(lang)["attributes"].values():
        questions, answers = zip(*a["qa"])
        assert len(set(questions)) >= 8 and len(set(answers)) >= 8
        assert all("{e}" in q and "{e}" in answer and "{v}" in answer for q, answer in a["qa"])

        def bare(wording):
            return re.sub(r"\W+", " ", wording).lower()

        assert not {bare(q) for q in questions} & {bare(q) for q in [*a["mcq"], a["open"][0]]}


# ------------------------------------------------------------------ the exam's own format
def exam_items(text):
    return re.findall(r"(?im)^\W*Question:.*\n+\W*Answer:", text)


def test_no_training_text_has_the_format_of_the_exam(d, lang):
    assert exam_items(CLOZE.format(question="Who?"))  # the search knows the format
    general = [*general_text(lang=lang), *general_text("probe", lang)]
    documents = [r["text"] for r in [*d["documents"], *general]]
    conversations = [said(r) for r in [*d["instructions"], *general_instructions(lang)]]
    assert not [item for text in documents + conversations for item in exam_items(text)]


def test_no_written_document_has_the_format_of_the_exam(folder):
    rows, skipped = read_documents(folder[1]["docs"])
    assert len(rows) > 40 and not skipped
    assert not [item for r in rows for item in exam_items(r["text"])]


# ------------------------------------------------------------------ documents
def test_every_fact_is_stated_in_four_documents_and_four_forms(d):
    copies = {b for _, b in d["planted"]["duplicates"]}
    docs = [r for r in d["documents"] if r["id"] not in copies]
    for f in d["facts"]:
        hits = [r for r in docs if f["entity"] in r["text"] and f["value"] in r["text"]]
        assert len(hits) >= 4 and {"standard", "book", "web"} <= {r["kind"] for r in hits}
        lines = [line for r in hits for line in re.sub(r"(\. |。)", ".\n", r["text"]).splitlines()]
        stating = [line for line in lines if f["entity"] in line and f["value"] in line]
        forms = {line.replace(f["entity"], "").replace(f["value"], "") for line in stating}
        assert len(forms) >= 4, f


def test_density_falls_from_standard_to_news(d, lang):
    copies = {b for _, b in d["planted"]["duplicates"]}
    hits, words = Counter(), Counter()
    for r in d["documents"]:
        if r["id"] in copies:
            continue
        words[r["kind"]] += len(pieces(r["text"], lang))
        hits[r["kind"]] += sum(r["text"].count(f["value"]) for f in d["facts"] if f["entity"] in r["text"])
    rate = {k: hits[k] / words[k] for k in words}
    assert rate["standard"] > 1.25 * rate["book"] and rate["book"] > rate["web"] > 3 * rate["news"]


def test_the_score_of_density_sees_that_order_too(d):
    scores = {kind: [] for kind in ("standard", "book", "web", "news")}
    for r in d["documents"]:
        scores[r["kind"]].append(density(r["text"])["score"])
    means = [sum(found) / len(found) for found in scores.values()]
    assert means == sorted(means, reverse=True)


def test_the_documents_give_every_fact_as_a_triple(d):
    rows = mined(d["documents"], ["d2spo"], seed=0)
    found = {tuple(line.split(" | ")) for r in rows for line in r["messages"][-1]["content"].splitlines()}
    facts = {(f["entity"], f["attribute"], f["value"]) for f in d["facts"]}
    assert facts <= found and len(found - facts) <= 2  # a copy renames an attribute


def test_no_slot_was_left_open(d):
    texts = (
        [r["text"] for r in d["documents"]]
        + [q["question"] for q in d["mcq"] + d["sql"]]
        + [m["content"] for r in d["instructions"] for m in r["messages"]]
    )
    menu = "MENU  News  Shop  Reviews  Contact  Search"
    assert not any("{" in t or "}" in t or "  " in t.replace(menu, "") for t in texts)


def test_planted_duplicates_are_near_but_not_equal(d, lang):
    text = {r["id"]: r["text"] for r in d["documents"]}

    def grams(t):
        return {tuple(w) for w in zip(*(pieces(t, lang)[i:] for i in range(5)))}

    for a, b in d["planted"]["duplicates"]:
        x, y = grams(text[a]), grams(text[b])
        assert text[a] not in text[b] and 0.55 < len(x & y) / len(x | y) < 1
        assert a.startswith("standard") and b.startswith("web")


def test_planted_leaks_quote_the_question(d):
    row = {r["id"]: r for r in d["documents"]}
    answered = 0
    for leak in d["planted"]["leaks"]:
        q, r = d["mcq"][leak["question"]], row[leak["id"]]
        assert q["question"] in r["text"] and r["kind"] in ("web", "news")
        answered += q["choices"][q["answer"]] in r["text"]
    assert 0 < answered < len(d["planted"]["leaks"])
    planted = {leak["id"] for leak in d["planted"]["leaks"]}
    assert not any(q["question"] in r["text"] for r in d["documents"] if r["id"] not in planted for q in d["mcq"])


@both
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_cleaning_finds_everything_that_was_planted(lang, seed):
    d = make_world(seed, lang=lang)
    kept = build_corpus(d["documents"], d["mcq"], threshold=0.7, min_chars=200)["rows"]
    text = {r["id"]: r["text"] for r in kept}
    assert not [pair for pair in d["planted"]["duplicates"] if set(pair) <= set(text)]
    for leak in d["planted"]["leaks"]:
        assert d["mcq"][leak["question"]]["question"] not in text.get(leak["id"], "")
    planted = {leak["id"] for leak in d["planted"]["leaks"]} | {i for pair in d["planted"]["duplicates"] for i in pair}
    assert len([r for r in d["documents"] if r["id"] not in text and r["id"] not in planted]) <= 1


# ------------------------------------------------------------------ database
def test_gold_sql_runs_and_agrees_with_the_facts(d, lang, tmp_path):
    con = sqlite3.connect(write_database(tmp_path / "plant.db", d))
    assert (
        con.execute("PRAGMA foreign_key_check").fetchall() == []
        and len(con.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall()) >= 6
    )
    got = {r["sql"]: con.execute(r["sql"]).fetchall() for r in d["sql"]}
    assert all(rows and rows[0][0] not in (None, 0) for rows in got.values())
    column = {a["name"]: a["column"] for a in demo_strings(lang)["attributes"].values()}
    for f in d["facts"]:
        [(v,)] = con.execute(
            f"SELECT {column[f['attribute']]} FROM specifications JOIN machines USING (machine_id) WHERE name = ?",
            [f["entity"]],
        ).fetchall()
        assert str(v) == re.match(r"\d+", f["value"])[0] if isinstance(v, int) else v == f["value"]


def test_sql_splits(d, lang):
    by = {s: [r for r in d["sql"] if r["split"] == s] for s in ("train", "dev", "test")}
    shapes = {s: {r["shape"] for r in rows} for s, rows in by.items()}
    assert len(by["train"]) >= 400 and len(by["dev"]) >= 50 and len(by["test"]) >= 200
    assert (
        len(shapes["test"] - shapes["train"]) >= 5
        and shapes["dev"] - shapes["train"]
        and shapes["test"] & shapes["train"]
    )
    sql = {s: {r["sql"] for r in rows} for s, rows in by.items()}
    assert not sql["train"] & sql["test"] and not sql["train"] & sql["dev"] and not sql["dev"] & sql["test"]
    assert len({r["question"] for r in d["sql"]}) == len(d["sql"])
    assert all(len(set(s["questions"])) >= 3 for s in demo_strings(lang)["sql"])


# ------------------------------------------------------------------ Chinese
CODES = {"bar", "N", "m", "TLS", "T"}  # units and numbers of documents
ABOUT_LETTERS = {"下面哪种食物含维生素C最多？", "英语单词“book”的意思是什么？"}


def strings_in(node):
    "All texts of a nested dict or list of strings."
    if isinstance(node, str):
        return [node]
    parts = node.values() if isinstance(node, dict) else node
    return [text for part in parts for text in strings_in(part)]


def spoken(t):
    "What is language in the strings: not the queries, nor the names of tables and attributes in the code."
    attributes = [{k: v for k, v in a.items() if k != "column"} for a in t["attributes"].values()]
    questions = [shape["questions"] for shape in t["sql"]]
    rest = {k: v for k, v in t.items() if k not in ("schema", "sql", "attributes", "splits")}
    kinds = [kind for pair in t["splits"] for kind, _ in pair]
    return strings_in([rest, attributes, questions, kinds])


def slots(text):
    return sorted(set(re.findall(r"{\w+}", text)))


def same_shape(a, b):
    "Whether two nested structures have the same keys and lengths, and texts with the same slots in the same places."
    if isinstance(a, str):
        return isinstance(b, str) and slots(a) == slots(b)
    if len(a) != len(b) or (isinstance(a, dict) and list(a) != list(b)):
        return False
    return all(same_shape(a[k], b[k]) for k in (a if isinstance(a, dict) else range(len(a))))


def test_both_languages_have_the_same_slots_in_the_same_places():
    en, zh = demo_strings("en"), demo_strings("zh")
    kinds = [kind for pair in zh["splits"] for kind, _ in pair]
    assert list(en.pop("type_note")) == [kind for pair in en["splits"] for kind, _ in pair]
    assert list(zh.pop("type_note")) == kinds and len(set(kinds)) == 10
    assert same_shape(en, zh)
    assert en["schema"] == zh["schema"]
    queries = [[{k: v for k, v in shape.items() if k != "questions"} for shape in t["sql"]] for t in (en, zh)]
    assert queries[0] == queries[1]
    assert [[side[1] for side in pair] for pair in en["splits"]] == [
        [side[1] for side in pair] for pair in zh["splits"]
    ]


def chinese_texts():
    made = make_world(entities=40, lang="zh")
    general = general_text(lang="zh") + general_text("probe", "zh")
    conversations = [said(r) for r in [*made["instructions"], *general_instructions("zh")]]
    rows = [*made["mcq"], *made["open"], *made["sql"], *common_questions("zh")]
    return spoken(demo_strings("zh")), [r["text"] for r in made["documents"] + general] + conversations, rows


def test_chinese_is_written_with_chinese_punctuation_and_without_english_words():
    strings, texts, rows = chinese_texts()
    asked = [r["question"] for r in rows] + [r["reference"] for r in rows if "reference" in r]
    for text in [re.sub(r"{\w+}", "", s) for s in strings] + texts + asked:
        assert not re.search(r"[一-鿿][,.;:?!()\"']|[,;:?!()\"'][一-鿿]", text), text
        if text not in ABOUT_LETTERS:
            assert set(re.findall(r"[A-Za-z]+", text)) <= CODES, text


def test_no_chinese_name_or_value_stands_in_another():
    t = demo_strings("zh")
    values = [v for a in t["attributes"].values() for v in a["values"]]
    machines = {f["entity"] for f in make_world(entities=900, lang="zh")["facts"]}
    sites = [form.format(p=p) for form in t["place_form"] for p in t["places"]]
    kinds = list(t["type_note"])
    parts = [*t["parts"], *t["results"], *[a["name"] for a in t["attributes"].values()]]
    for names in (values, machines, sites, kinds, parts, t["families"], [name for name, _ in t["suppliers"]]):
        assert len(set(names)) == len(names)
        joined = "\n".join(sorted(names))
        assert all(joined.count(name) == 1 for name in names)


def test_no_chinese_sentence_form_holds_a_value_by_itself():
    t = demo_strings("zh")
    values = [v for a in t["attributes"].values() for v in a.pop("values")]
    text = "\n".join(spoken(t))
    assert [v for v in values if v in text] == []
    spelled = make_world(entities=40, lang="zh")
    own = {}
    for f in spelled["facts"]:
        own.setdefault(f["entity"], set()).add(f["value"])
    planted = {leak["id"] for leak in spelled["planted"]["leaks"]}
    for r in spelled["documents"]:
        named = [e for e in own if e in r["text"]]
        if r["id"] not in planted and len(named) == 1:
            assert {v for v in values if v in r["text"]} <= own[named[0]], r


def test_no_chinese_number_grows_by_its_neighbour(d, lang):
    "A number that touches another digit or letter would be another value or another machine."
    if lang != "zh":
        return
    named = sorted({f["entity"] for f in d["facts"]} | {f["value"] for f in d["facts"]})
    for r in d["documents"]:
        for name in named:
            assert not re.search(rf"[0-9A-Za-z.]{name}" if name[0].isdigit() else rf"{name}[0-9]", r["text"]), (name, r)


# ------------------------------------------------------------------ size
@both
def test_it_scales_linearly(lang):
    def seconds(n):
        t = time.process_time()
        x = make_world(entities=n, lang=lang)
        return time.process_time() - t, x

    small, _ = seconds(250)
    large, big = seconds(2000)
    assert len(big["facts"]) == 8000 and len({f["entity"] for f in big["facts"]}) == 2000 and len(big["mcq"]) == 64000
    assert large < 25 * max(small, 0.05)
    staff = big["tables"]["rows"]["staff"]
    assert len({r[1] for r in staff}) == len(staff) == 2000


@both
@pytest.mark.parametrize("n", [8, 9, 13, 51])
def test_other_sizes(n, lang):
    x = make_world(seed=3, entities=n, lang=lang)
    assert len(x["facts"]) == 4 * n and all(len(set(q["choices"])) == 4 for q in x["mcq"])
    assert set(Counter(q["answer"] for q in x["mcq"]).values()) == {8 * n}


@pytest.mark.parametrize(
    "call", [lambda: make_world(entities=7), lambda: make_world(lang="de"), lambda: general_text("test")]
)
def test_bad_input_is_explained(call):
    with pytest.raises(InputError):
        call()


# ------------------------------------------------------------------ shipped data
def test_common_questions(lang):
    rows = common_questions(lang)
    assert (
        len(rows) >= dict(en=220, zh=60)[lang]
        and len({r["question"] for r in rows}) == len(rows)
        and len({r["group"] for r in rows}) >= 6
    )
    assert all(len(set(r["choices"])) == 4 and 0 <= r["answer"] < 4 for r in rows)
    count = Counter(r["answer"] for r in rows)
    assert max(count.values()) - min(count.values()) <= 1
    assert accuracy(rows, lambda q, c: len(c)) < 0.4 and accuracy(rows, lambda q, c: -len(c)) < 0.4


def test_general_text_is_clean_and_split(lang):
    train, probe = general_text(lang=lang), general_text("probe", lang)
    least = dict(en=(40_000, 5_000), zh=(5_000, 1_000))[lang]
    assert all(sum(len(pieces(r["text"], lang)) for r in rows) > n for rows, n in zip((train, probe), least))
    texts = [r["text"] for r in train + probe]
    assert (
        len(set(texts)) == len(texts)
        and all(r["kind"] == "general" for r in train + probe)
        and len({r["id"] for r in train + probe}) == len(texts)
    )
    rows = general_instructions(lang)
    assert len(rows) >= dict(en=300, zh=30)[lang] and all(
        [m["role"] for m in r["messages"]] == ["user", "assistant"] for r in rows
    )


def test_python_docs():
    rows = python_docs()
    assert (
        len(rows) > 50
        and sum(len(r["text"]) for r in rows) > 300_000
        and [r["id"] for r in rows] == sorted(r["id"] for r in rows)
    )


def test_the_domain_is_nowhere_in_the_general_data(d, lang):
    text = "\n".join(r["text"] for r in general_text(lang=lang) + general_text("probe", lang))
    text += "\n".join(said(r) for r in general_instructions(lang))
    text += "\n".join(q["question"] for q in common_questions(lang))
    assert not any(f["entity"] in text for f in d["facts"])


# ------------------------------------------------------------------ the folder
def test_write_round_trip(folder, d):
    f, paths = folder
    assert all(p.exists() for p in paths.values())
    assert (
        read_jsonl(paths["mcq"]) == d["mcq"]
        and read_jsonl(paths["open"]) == d["open"]
        and read_jsonl(paths["instructions"]) == d["instructions"]
    )
    assert [r for s in ("train", "dev", "test") for r in read_jsonl(paths[f"sql_{s}"])] == sorted(
        d["sql"], key=lambda r: ["train", "dev", "test"].index(r["split"])
    )
    truth = read_json(paths["truth"])
    assert (
        truth["facts"] == d["facts"]
        and truth["taught"] == d["taught"]
        and len(truth["duplicates"]) == len(d["planted"]["duplicates"])
    )
    for a, b in truth["duplicates"]:
        assert (f / a).exists() and (f / b).exists()
    for leak in truth["leaks"]:
        assert (f / leak["file"]).exists()
    assert {p.suffix for p in paths["docs"].rglob("*") if p.is_file()} == {".md", ".docx", ".html", ".txt"}


def test_write_twice_gives_the_same_bytes(folder, lang, tmp_path):
    f, _ = folder
    write_world(tmp_path / "again", lang=lang)
    assert tree(tmp_path / "again") == tree(f)


def test_write_replaces_only_a_demo(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError):
        write_world(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    write_world(tmp_path / "demo", entities=8)
    with pytest.raises(InputError):
        write_world(tmp_path / "demo", seed=1, entities=8)


def test_word_files_open_in_python_docx(folder, d):
    docx = pytest.importorskip("docx")
    path = sorted(folder[1]["docs"].rglob("*.docx"))[2]
    doc = docx.Document(path)
    text = "\n".join(p.text for p in doc.paragraphs)
    want = "\n".join(r["text"] for r in d["documents"] if r["source"].endswith(path.name))
    assert text == "\n".join(line.lstrip("# ") for line in want.splitlines() if line.strip())
    assert {p.style.name.lower().rstrip(" 12") for p in doc.paragraphs} == {"heading", "normal"}


def test_html_holds_the_page_and_its_junk(folder, d):
    bs4 = pytest.importorskip("bs4")
    copies = {b for _, b in d["planted"]["duplicates"]}
    row = next(r for r in d["documents"] if r["kind"] == "web" and r["id"] not in copies)
    soup = bs4.BeautifulSoup((folder[0] / row["source"]).read_text(encoding="utf-8"), "html.parser")
    assert soup.nav and soup.script and soup.footer
    assert all(line in soup.get_text() for line in row["text"].splitlines() if line.strip())


def test_read_documents_gives_back_every_fact(folder, d, lang):
    rows, skipped = read_documents(folder[1]["docs"])
    assert not skipped and {r["kind"] for r in rows} == {"standard", "book", "web", "news"}
    text = "\n".join(r["text"] for r in rows if r["kind"] == "web")
    stated = [f for f in d["facts"] if any(f["entity"] in x and f["value"] in x for x in text.split("\n"))]
    assert len(stated) == len(d["facts"])
    whole = {r["source"]: r["text"] for r in rows}
    for r in d["documents"]:
        if r["source"].endswith((".md", ".txt")) and r["kind"] != "book":
            assert whole[r["source"].removeprefix("docs/")].strip() == r["text"]


def test_spoilt_standards_can_be_read(lang, tmp_path):
    docs = write_world(tmp_path / "world", 0, 8, lang)["docs"]
    spoil(docs, lang)
    rows, skipped = read_documents(docs)
    assert sorted(s["file"] for s in skipped) == ["book/annex.pdf", "web/forum.jsonl, line 2"]
    found = {r["source"]: r["text"] for r in rows}
    assert found["web/forum.jsonl"].endswith("？" if lang == "zh" else "?")
    whole = re.sub(r"\s", "", found["standard/TLS-complete.pdf"])
    for f in make_world(0, 8, lang)["facts"]:
        row = f"| {f['entity']} | {f['attribute']} | {f['value']} |"
        assert re.sub(r"\s", "", row) in whole


def test_spoil_overwrites_nothing(tmp_path):
    docs = write_world(tmp_path / "world", 0, 8)["docs"]
    (docs / "web" / "forum.jsonl").write_text("mine")
    with pytest.raises(InputError, match="forum.jsonl exists already"):
        spoil(docs)
    assert (docs / "web" / "forum.jsonl").read_text() == "mine"
    assert not (docs / "book" / "annex.pdf").exists()
