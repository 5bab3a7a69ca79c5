"""Near-duplicates beside datasketch's MinHashLSH: same documents, one run; writes nbs/results/bench_dedup.json.

    python tools/bench_dedup.py [--documents 200000] [--rounds 1]

Documents of 200 words are drawn by Zipf's law from the words of Python's own documentation. One in twenty is an edited
copy of another one (case and layout alone, 2 words, or 4 words of the 200: truly similar), and one in twenty a heavily
edited one (20 or 60 words: not similar). Each arm runs in a process of its own on a quarter, a half and all of the
documents; its seconds hold everything from the list of texts to the list of pairs, its memory is the peak above the
texts themselves.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time

from domain_llm.data.dedup import jaccard, near_duplicates, shingles
from domain_llm.devices import peak_memory_gb, reset_peak_memory
from domain_llm.results import save_result

THRESHOLD, WORDS = 0.7, 200
EDITS = {"layout": 0, "2 words": 2, "4 words": 4, "20 words": 20, "60 words": 60}  # words replaced of 200
COPIES = ("layout", "2 words", "4 words")


def vocabulary():
    "Real words, the most frequent first."
    from collections import Counter
    from pydoc_data.topics import topics

    return [w for w, _ in Counter(re.findall(r"[a-z]+", " ".join(topics.values()).lower())).most_common()]


def edit(words, n, vocab, rng):
    "The words with `n` of them replaced, or another layout when `n` is 0."
    if not n:
        return [w.upper() if i % 9 == 0 else w + "," * (i % 7 == 0) + "\n" * (i % 12 == 0) for i, w in enumerate(words)]
    words = list(words)
    for i in rng.sample(range(len(words)), n):
        words[i] = rng.choice(vocab)
    return words


def corpus(n, seed=0):
    "`n` documents, and the planted pairs (i, j) by level of editing; every document is in one pair at most."
    import numpy as np

    rng, draw, vocab = random.Random(seed), np.random.default_rng(seed), np.array(vocabulary())
    share = 1 / np.arange(1, len(vocab) + 1)
    plan = [level for level in COPIES for _ in range(n // 60)] + [
        level for level in EDITS if level not in COPIES for _ in range(n // 40)
    ]
    docs = [vocab[draw.choice(len(vocab), WORDS, p=share / share.sum())].tolist() for _ in range(n - len(plan))]
    docs += [edit(docs[i], EDITS[level], vocab.tolist(), rng) for i, level in enumerate(plan)]
    place, planted = rng.sample(range(n), n), {level: set() for level in EDITS}
    for i, level in enumerate(plan):
        planted[level].add(tuple(sorted((place[i], place[n - len(plan) + i]))))
    out = [None] * n
    for at, d in zip(place, docs):
        out[at] = " ".join(d)
    return out, planted


def word_shingles(text):
    "Sets of 5 words in a row, as bytes."
    w = re.findall(r"\w+", text.lower())
    return {" ".join(w[i : i + 5]).encode() for i in range(len(w) - 4)}


def ours(texts):
    return {(i, j) for i, j, _ in near_duplicates(texts, THRESHOLD)}


def datasketch(texts):
    "MinHashLSH with 128 permutations; what its index proposes is kept when the signatures agree in 0.7 of places."
    from datasketch import MinHash, MinHashLSH

    lsh, found, signatures = MinHashLSH(threshold=THRESHOLD, num_perm=128), set(), []
    for j, m in enumerate(MinHash.generator(map(word_shingles, texts), num_perm=128)):
        found |= {(i, j) for i in lsh.query(m) if signatures[i].jaccard(m) >= THRESHOLD}
        lsh.insert(j, m)
        signatures.append(m)
    return found


ARMS = dict(ours=ours, datasketch=datasketch)


def similarity(texts, planted, most=200):
    "Lowest and highest true similarity of planted pairs by level, over 5-word shingles and over those of the package."

    def words(a, b):
        a, b = word_shingles(a), word_shingles(b)
        return len(a & b) / len(a | b)

    def in_bytes(a, b):
        return jaccard(shingles(a), shingles(b))

    def span(how, pairs):
        found = [how(texts[i], texts[j]) for i, j in sorted(pairs)[:most]]
        return [round(min(found), 3), round(max(found), 3)]

    return {level: dict(words=span(words, pairs), bytes=span(in_bytes, pairs)) for level, pairs in planted.items()}


def measure(name, n):
    "One arm on `n` documents: seconds, memory above the texts (MB), recall by level and precision."

    texts, planted = corpus(n)
    ARMS[name](texts[:300])  # so are first calls
    reset_peak_memory()
    before, start = peak_memory_gb(), time.perf_counter()
    found = ARMS[name](texts)
    seconds, true = time.perf_counter() - start, set().union(*(planted[level] for level in COPIES))
    return dict(
        seconds=round(seconds, 2),
        documents_per_second=round(n / seconds),
        memory_mb=round(1024 * (peak_memory_gb() - before)),
        pairs=len(found),
        recall=len(found & true) / len(true),
        recall_by_level={level: len(found & p) / len(p) for level, p in planted.items()},
        precision=len(found & true) / max(len(found), 1),
    )


def arm(name, n):
    "`measure` in a process of its own."
    p = subprocess.run(
        [sys.executable, __file__, "--arm", name, "--documents", str(n)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(p.stdout.splitlines()[-1])


def line(sizes, memory):
    "Memory over size as a straight line: MB per 1,000 documents, and the share of variance that it explains."
    from scipy.stats import linregress

    fit = linregress(sizes, memory)
    return dict(mb_per_1000=round(1000 * fit.slope, 3), mb_at_0=round(fit.intercept, 1), r2=round(fit.rvalue**2, 4))


def bench(n, rounds):
    sizes = [n // 4, n // 2, n]
    runs = {a: {s: [] for s in sizes} for a in ARMS}
    for s in sizes:
        for _ in range(rounds):
            for a in ARMS:
                r = arm(a, s)
                runs[a][s].append(r)
                print(
                    f"{a:<11}{s:>8,} documents: {r['documents_per_second']:>7,}/s, {r['memory_mb']:>6,} MB, "
                    f"recall {r['recall']:.4f}, precision {r['precision']:.4f}",
                    flush=True,
                )
    speed = {
        a: {s: statistics.median(r["documents_per_second"] for r in rs) for s, rs in by.items()}
        for a, by in runs.items()
    }
    memory = {
        a: line(sizes, [statistics.median(r["memory_mb"] for r in by[s]) for s in sizes]) for a, by in runs.items()
    }
    texts, planted = corpus(min(n, 20_000))
    return dict(
        documents=n,
        rounds=rounds,
        threshold=THRESHOLD,
        similarity=similarity(texts, planted),
        runs=runs,
        documents_per_second=speed,
        memory=memory,
        speedup=speed["ours"][n] / speed["datasketch"][n],
    )


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--documents", type=int, default=200_000, help="number of documents (%(default)s)")
    a.add_argument("--rounds", type=int, default=1, help="times each arm runs at each size, arms in turn (%(default)s)")
    a.add_argument("--arm", choices=ARMS, help="run one arm and print its figures")
    a.add_argument("--dry", action="store_true", help="print only, write nothing")
    a = a.parse_args()
    if a.arm:
        return print(json.dumps(measure(a.arm, a.documents)))
    start = time.time()
    result = bench(a.documents, a.rounds)
    print(
        f"{result['speedup']:.1f} times datasketch's throughput; memory "
        + ", ".join(
            f"{k}: {m['mb_per_1000']} MB per 1,000 documents (r2 {m['r2']})" for k, m in result["memory"].items()
        )
    )
    if not a.dry:
        print(save_result("bench_dedup", result, started=start))


if __name__ == "__main__":
    main()
