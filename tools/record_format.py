"""Record what the chat format of a tuning is worth to the pre-trained demo model, in nbs/results/format_demo.json.

    python tools/record_format.py [--seeds 5] [--plan] [--runs FOLDER]

The demo model is tuned on conversations about a few machines: in its own chat format, in that without its system
prompt, in foreign marks, and as plain text. It is asked about these machines in unread wordings, in the format of the
tuning and in its own, and told in its own to do sixty things whose doing a program can check. Every arm and seed is
kept in a folder, so a cut recording goes on where it was. `--plan` runs two seeds and says what all would resolve.
"""

import copy
import random
import re

from tellings import by_machine, make_told, record

from domain_llm.data.mix import passes
from domain_llm.demo.facts import make_instructions
from domain_llm.judge.answers import value_in_answer
from domain_llm.models import greedy, load
from domain_llm.train.fit import fitted
from domain_llm.train.sft import encode_all, render

SETTINGS = dict(machines=12, tokens=20000, learning_rate=2e-4)
TUNED = ("own", "no system prompt", "foreign", "plain")
ARMS = {"before": dict(machines=12, format="own")} | {name: dict(SETTINGS, format=name) for name in TUNED}
MARKS = {
    "no system prompt": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "foreign": ("### Question:\n", "\n\n### Answer:\n"),
    "plain": ("", "\n"),
}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ BEFORE + m['content'] + AFTER }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)

SUBJECTS = ("the sea", "horses", "bread", "the moon", "rain")


def sentences(text):
    "The number of sentence ends in a text."
    return len(re.findall(r"[.!?](?=\s|$)", text))


# What is asked for, and whether an answer does it.
TOLD = {
    "Write one sentence about {}.": lambda said: sentences(said) == 1,
    "Write exactly two sentences about {}.": lambda said: sentences(said) == 2,
    "Write more than thirty words about {}.": lambda said: len(said.split()) > 30,
    "Write a question about {}.": lambda said: said.endswith("?"),
    "Write a sentence about {} that begins with the word Today.": lambda said: said.startswith("Today"),
    "Write a sentence about {} with the word river in it.": lambda said: "river" in said.lower(),
    "Repeat this sentence: I know much about {}.": lambda said: "I know much about" in said,
    "Begin a story about {} with the words Once upon a time.": lambda said: said.startswith("Once upon a time"),
    "Write a letter to a friend about {}.": lambda said: said.startswith("Dear"),
    "Write a poem of four lines about {}.": lambda said: said.count("\n") >= 3,
    "Give three facts about {} as a list numbered 1, 2 and 3.": lambda said: numbers(said) == ["1", "2", "3"],
    "Name three words that go with {}, with commas between them.": lambda said: 2 <= said.count(",") <= 3,
}


def numbers(text):
    "The numbers that begin the lines of a text."
    return re.findall(r"^\s*(\d+)[.):]", text, re.MULTILINE)


def claim(text, arm, base, metric, **rest):
    "A claim on a share of answers."
    return dict(text=text, metric=metric, arm=arm, base=base, matters=0.1, **rest)


CLAIMS = [
    claim("the tuning teaches", "own", "before", "as trained", control=True),
    claim("the own format teaches more than a foreign one", "own", "foreign", "as trained"),
    claim("the own format teaches more than plain text", "own", "plain", "as trained"),
    claim("a model tuned in a foreign format knows less when asked in its own", "own", "foreign", "in its own"),
    claim("a model tuned on plain text knows less when asked in its own format", "own", "plain", "in its own"),
    claim("without its system prompt it knows less when asked with it", "own", "no system prompt", "in its own"),
    claim("the own format keeps instructions better than a foreign one", "own", "foreign", "instructions"),
    claim("the tuning costs instructions", "before", "own", "instructions", control=True),
]


def in_format(tok, name):
    "The tokenizer with the chat template of a format."
    coder = copy.deepcopy(tok)
    if name != "own":
        before, after = (repr(mark) for mark in MARKS[name])
        coder.chat_template = TEMPLATE.replace("BEFORE", before).replace("AFTER", after)
    return coder


def trained(arm, seed, tok, model, world):
    "The model, tuned on conversations about the taught machines in an arm's format."
    own = make_instructions(world["strings"], world["machines"], random.Random(f"{seed}/instructions"))
    rows, _ = encode_all(own, in_format(tok, arm["format"]), length=512, source="own")
    read = list(passes(rows, arm["tokens"], random.Random(seed)))
    return fitted(model, read, seed, learning_rate=arm["learning_rate"], tokens_per_step=256, length=512, probes=1)


def answered(model, tok, asked, longest):
    "The greedy answers to questions in the tokenizer's format, and whether each ended by itself."
    turns = [[dict(role="user", content=question)] for question in asked]
    return greedy(model, tok, [render(turn, tok, "the exam", ask=True) for turn in turns], longest, batch_size=64)


def known(model, tok, questions):
    "For each machine the share of the questions whose answer names the right value, and of the answers that end."
    said, ended = answered(model, tok, [row["question"] for row in questions], 48)
    right = value_in_answer(said, [row["choices"][row["answer"]] for row in questions])["values"]
    machines = [row["group"] for row in questions]
    return by_machine(right, machines), by_machine(map(float, ended), machines)


def followed(model, tok):
    "Whether each instruction is done, in the model's own format."
    told = [(text.format(subject), check) for text, check in TOLD.items() for subject in SUBJECTS]
    said, _ = answered(model, tok, [text for text, _ in told], 64)
    return dict(values=[float(check(answer)) for answer, (_, check) in zip(said, told)])


def measure(arm, seed):
    "What an arm's model knows in both formats, which instructions it follows, and how many of its answers end."
    model, tok = load(device="cpu")
    world = make_told(seed, arm["machines"])
    if "tokens" in arm:
        model = trained(arm, seed, tok, model, world)
    questions = [row for row in world["mcq"] if row["part"] == "taught"][::2]
    right, ended = known(model, in_format(tok, arm["format"]), questions)
    in_its_own, _ = known(model, tok, questions)
    return {"as trained": right, "in its own": in_its_own, "instructions": followed(model, tok), "ended": ended}


if __name__ == "__main__":
    record("format_demo", __doc__, measure, ARMS, CLAIMS)
