"Runs whose recipe has new pieces: from documents to files that plain transformers and peft load, stopped and changed."

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from fixtures.pairs import saved
from peft import PeftModel
from test_keep import hashes
from test_start_runs import run
from test_vocab import other_kinds
from transformers import AutoModelForCausalLM, AutoTokenizer

from domain_llm import cli
from domain_llm.core import InputError, read_json, read_jsonl
from domain_llm.demo.world import make_world
from domain_llm.judge.score import bits_per_byte
from domain_llm.models import load, load_tokenizer, tiny
from domain_llm.run import experiments, keep, training
from domain_llm.run.base_model import adapter_parameters, sizes, sizes_of_run
from domain_llm.run.pipeline import check_run, final_model
from domain_llm.run.plan import CPU, GPU, disk_parts, memory_parts
from domain_llm.run.preflight import pieces_findings, vocab_findings
from domain_llm.run.recipe import check_recipe
from domain_llm.run.stages import identities, marks, stages
from domain_llm.run.training import Job, _reference, texts_of
from domain_llm.small_world import small_tokenizer
from domain_llm.train.loop import add_lora
from domain_llm.train.vocab import extend, new_pieces, new_rows, replaced, resize

SMALL = dict(length=128, tokens_per_step=256, probes=1, learning_rate=3e-3, rank=4, forgetting_budget=100)


DESCRIBED = {"machine": "a thing that works by itself"}


def recipe(model, **more):
    "A small recipe of the demo with new pieces."
    return (
        dict(
            name="small",
            demo=8,
            model=str(model),
            vocab=dict(pieces=60),
            mix=dict(parts=dict(domain=1), tokens=1500),
            pretrain=dict(SMALL, method="full"),
            sft=False,
            evaluate=dict(questions=8, probe_tokens=100),
            quantize=False,
        )
        | more
    )


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    "A random model over the tokenizer of the small world."
    tok = small_tokenizer()
    return saved(tiny(tok), tok, tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def whole(small_folder, tmp_path_factory):
    "A run with a described word, two adapters, one after the other, and a GGUF file."
    lora = dict(SMALL, method="lora")
    given = recipe(
        small_folder,
        vocab=dict(pieces=60, start="semantic", descriptions=DESCRIBED),
        pretrain=lora,
        sft=dict(lora, length=256, epochs=0.3),
        quantize=dict(types=["q8_0"]),
    )
    return run(tmp_path_factory.mktemp("whole"), given)


def ids_of(tok, text):
    return tok(text, add_special_tokens=False).input_ids


def texts(out, name):
    return [row["text"] for row in read_jsonl(out / "corpus" / f"{name}.jsonl")]


def test_the_pieces_are_those_of_the_training_documents_alone(whole):
    old = small_tokenizer()
    found = read_json(whole / "vocab" / "vocab.json")
    assert found["pieces"] == new_pieces(texts(whole, "documents"), old, 60)
    both = texts(whole, "documents") + 5 * texts(whole, "held_out")
    assert found["pieces"] != new_pieces(both, old, 60)
    before, after = (sum(len(ids_of(tok, t)) for t in texts(whole, "held_out")) for tok in (old, extended(whole)))
    assert found["saving"]["saved"]["value"] == pytest.approx(1 - after / before)
    assert read_json(whole / "vocab" / "manifest.json")["metrics"]["pieces"] == 60


def extended(out):
    "The longer tokenizer of a run, by plain transformers."
    return AutoTokenizer.from_pretrained(out / "vocab" / "model")


def test_the_files_load_in_plain_transformers_and_peft(whole, small_folder):
    old, new = small_tokenizer(), extended(whole)
    base = AutoModelForCausalLM.from_pretrained(whole / "vocab" / "model").eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight and len(base.lm_head.weight) == len(new) == 1084
    rows = AutoModelForCausalLM.from_pretrained(small_folder).model.embed_tokens.weight
    assert torch.equal(base.model.embed_tokens.weight[: len(old)], rows)
    described = {new.decode([number]): number for number in replaced(old, new)}
    for number, pieces in replaced(old, new).items():
        if number == described[" machine"]:
            pieces = ids_of(old, DESCRIBED["machine"])
        torch.testing.assert_close(base.model.embed_tokens.weight[number], rows[pieces].mean(0))
    read = [i for text in texts(whole, "documents") for i in ids_of(new, text)]
    assert max(read) < 1084 and len({i for i in read if i >= 1024}) > 20

    adapter = final_model(whole)
    start = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), adapter).eval()
    ids = torch.tensor([ids_of(new, texts(whole, "held_out")[0])[:64]])
    merged = plain.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    ours, tok = load(str(adapter), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    assert tok.get_vocab() == new.get_vocab() and tok.chat_template == old.chat_template
    moved = (merged.model.embed_tokens.weight != base.model.embed_tokens.weight).any(1).nonzero()[:, 0].tolist()
    assert (
        moved
        and set(moved) <= set(range(1024, 1084))
        and new_rows(ours) == {"model.embed_tokens": list(range(1024, 1084))}
    )


def test_before_is_the_original_and_both_are_told_by_the_byte(whole, small_folder):
    "The figures of the run, by hand: nats of plain transformers over the bytes of the same texts."
    read = dict(held_out=whole / "corpus/held_out.jsonl", general_probe=whole / "inputs/general_probe/rows.jsonl")
    _, reported = texts_of({}, read, 200)
    size = sum(len(row["text"].encode()) for row in reported["domain"])
    found = []
    for folder, tok in ((small_folder, small_tokenizer()), (final_model(whole), extended(whole))):
        model, nats = load(str(folder), device="cpu")[0], 0.0
        for row in reported["domain"]:
            ids = torch.tensor([[tok.eos_token_id, *ids_of(tok, row["text"])]])
            with torch.no_grad():
                nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        found.append(nats / size / torch.log(torch.tensor(2.0)).item())
    metrics = read_json(whole / "metrics.json")
    assert [metrics["domain_bpb_before"], metrics["domain_bpb_after"]] == pytest.approx(found, rel=2e-3)
    measured = [read_json(whole / stage / "measured.json")["domain_bpb"] for stage in ("baseline", "evaluate")]
    assert measured[0]["bytes"] == measured[1]["bytes"] == size and measured[0]["tokens"] > measured[1]["tokens"]
    page = (whole / "report.html").read_text()
    assert "New pieces" in page and "60 pieces, chosen from the training documents" in page
    assert "extended by 60 pieces" in (whole / "MODEL_CARD.md").read_text()
    checks = read_json(whole / "quantize" / "checks.json")["checks"]["q8_0"]
    assert checks["problems"] == [] and checks["agreement"] > 0.9


def test_the_budget_counts_from_the_original_model(whole, tmp_path, small_folder):
    before = read_json(whole / "vocab" / "vocab.json")["before"]
    read = dict(held_out=whole / "corpus/held_out.jsonl", general_probe=whole / "inputs/general_probe/rows.jsonl")
    choose, _ = texts_of({}, read, 100)
    original = bits_per_byte(*load(str(small_folder), device="cpu"), choose["general"])["bpb"]
    read = dict(vocab=whole / "vocab" / "vocab.json", history=whole / "pretrain" / "history.json")
    job = Job({}, dict(method="lora"), read, tmp_path, "")
    assert before["general_bpb"] == _reference(job, None) == pytest.approx(original, rel=1e-3)
    assert read_json(whole / "pretrain" / "history.json")[0]["general_bpb"] != before["general_bpb"]


def test_a_cut_stage_resumes_and_a_changed_number_of_pieces_repeats_what_depends_on_it(
    small_folder, tmp_path, monkeypatch, capsys
):
    given, real = recipe(small_folder, vocab=dict(pieces=40, start="random")), training._save
    want = run(tmp_path, given, "whole")
    for cut_after in (False, True):

        def cut(model, tok, folder, cut_after=cut_after):
            if cut_after:
                real(model, tok, folder)
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "_save", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, given)
        assert (tmp_path / "out" / "vocab" / "model").exists() == cut_after
    monkeypatch.setattr(training, "_save", real)
    out = run(tmp_path, given)
    for stage in ("vocab", "pretrain"):
        names = ("vocab.json", "history.json", "model/model.safetensors", "model/tokenizer.json")
        made, wanted = (read_json(folder / stage / "manifest.json")["files"] for folder in (out, want))
        assert [made.get(n) for n in names] == [wanted.get(n) for n in names]
    capsys.readouterr()

    def done():
        said = capsys.readouterr().out.split("\n[")
        return [part.split("] ")[1].split(":")[0] for part in said[1:] if "unchanged, skipped" not in part]

    run(tmp_path, given | dict(vocab=dict(pieces=30, start="random")))
    assert done() == ["vocab", "pretrain", "evaluate", "answers", "report"]
    assert len(extended(out)) == 1024 + 30
    kept = hashes(want)
    assert run(tmp_path, given) == out and done() == []
    assert hashes(out / "pretrain" / "model") == hashes(want / "pretrain" / "model")
    without = {name: value for name, value in given.items() if name != "vocab"}
    run(tmp_path, without)
    assert done() == ["pretrain", "evaluate", "answers", "report"] and not (out / "vocab").exists()
    assert load_tokenizer(str(final_model(out))).get_vocab() == small_tokenizer().get_vocab()
    assert hashes(want) == kept


def test_a_base_model_gets_pieces_and_its_chat_models_template(pair, tok, tmp_path):
    lora = dict(SMALL, method="lora", length=256, epochs=0.2)
    out = run(tmp_path, recipe(pair["base"], chat_model=str(pair["chat"]), pretrain=False, sft=lora))
    model, its_tok = load(str(final_model(out)), device="cpu")
    assert its_tok.chat_template == tok.chat_template and len(its_tok) > len(tok)
    assert len(model.get_input_embeddings().weight) == len(its_tok)
    assert tok.eos_token_id in model.generation_config.eos_token_id
    assert read_json(out / "sft" / "manifest.json")["reads"]["start"] == "vocab/model"


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(vocab=dict(pieces=0)), "'vocab.pieces' is 0, but must be a whole number of at least 1"),
        (dict(vocab=dict(start="meen")), "did you mean 'mean'"),
        (dict(vocab=dict(start="semantic")), "vocab.start is semantic, but vocab.descriptions is empty"),
        (dict(vocab=dict(descriptions=dict(pump=3))), "vocab.descriptions"),
        (dict(vocab=500), "the recipe's vocab must be a set of 'name: value' lines"),
        (dict(vocab={}, chat_model="owner/chat", chat_vector=True), "rows that chat_model does not have"),
        (dict(vocab={}, chat_model="owner/chat", sft=dict(start="chat")), "sft.start is chat, which needs both alike"),
    ],
)
def test_what_a_recipe_may_not_say(given, says, tmp_path):
    with pytest.raises(InputError, match=says):
        check_recipe(dict(demo=8, output=str(tmp_path / "out")) | given)


def test_a_tokenizer_of_another_kind_is_refused_before_the_run(tmp_path, capsys):
    unigram = other_kinds()["Unigram"]
    unigram.eos_token = "<unk>"
    unigram.chat_template = small_tokenizer().chat_template
    folder = saved(tiny(unigram), unigram, tmp_path / "unigram")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(folder)))
    assert cli.main(["check", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "which has no merges to add to" in said.err and "Take the recipe's line 'vocab:' out" in said.err
    assert not (tmp_path / "out" / "corpus").exists()


def test_documents_that_need_no_piece_are_an_error(small_folder, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "documents.jsonl").write_text(json.dumps(dict(text="12 34")) + "\n")
    cfg = check_recipe(recipe(small_folder, output=str(tmp_path / "out")))
    (found,) = pieces_findings(cfg, tmp_path)
    assert found["level"] == "error" and "needs no new piece" in found["said"]


def test_check_says_what_the_pieces_save_and_trains_nothing(small_folder, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(small_folder)))
    check_run(tmp_path / "r.yaml", tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "at most 60 new pieces: 60 more rows" in said and "60 new pieces: held-out documents take" in said
    assert not (tmp_path / "out" / "vocab").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_knows_the_new_rows(tied):
    "Against the real model with its rows and an adapter on it."
    tok = small_tokenizer()
    config = tiny(tok).config
    config.tie_word_embeddings = tied
    cfg = check_recipe(dict(demo=8, vocab=dict(pieces=25)))
    size, before = sizes_of_run(cfg, config, tok), sizes(config)
    (note,) = vocab_findings(cfg, config, tok)
    off = check_recipe(dict(demo=8))
    assert sizes_of_run(off, config, tok) == before and vocab_findings(off, config, tok) == []
    assert config.vocab_size == 1024
    model = AutoModelForCausalLM.from_config(config)
    longer = extend(tok, new_pieces([row["text"] for row in make_world(entities=8)["documents"]], tok, 25))
    resize(model, tok, longer)
    assert size["parameters"] == sum(p.numel() for p in model.parameters()) and size["vocabulary"] == 1049
    tuned = add_lora(model, 4, 4, new_rows(model))
    assert adapter_parameters(size, 4) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert size["copied"] == 2 * 1049 * 64
    lora, full = (dict(method=m, rank=4, length=128) for m in ("lora", "full"))
    assert memory_parts(lora, size, GPU)["copies of the embedding"] == 2 * size["copied"]
    assert "copies of the embedding" not in memory_parts(full, size, CPU)
    most = [sum(disk_parts(c | dict(quantize=None), size, GPU).values()) for c in (cfg, off)]
    assert most[0] == most[1] + 2 * size["parameters"]
    assert note["level"] == "note" and f"{25 * 64 * (1 if tied else 2):,} numbers to learn" in note["said"]


def test_without_the_key_no_fingerprint_knows_of_it(monkeypatch):
    monkeypatch.setattr(keep, "content", lambda out, path: "x")

    def fingerprints(**more):
        cfg = check_recipe(dict(demo=8, model="owner/name") | more)
        plan, models = stages(cfg), identities(cfg)
        return {n: marks(cfg, n, stage, cfg["output"], models)[0] for n, stage in plan.items() if n != "report"}

    off, on, more = fingerprints(vocab=None), fingerprints(vocab=dict(pieces=9)), fingerprints(vocab=dict(pieces=8))
    assert off == fingerprints() and "vocab" not in off
    for stage in ("corpus", "baseline", "evaluate", "quantize"):
        assert off[stage] == on[stage] == more[stage]  # what is after the training reads other files
    for stage in ("pretrain", "sft", "answers"):
        assert len({off[stage], on[stage], more[stage]}) == 3


def test_the_shipped_experiment_compares_vocabularies_at_equal_characters(tmp_path):
    lab = dict(entities=8, renderings=3, wordings=1)
    small = dict(name="small", model="small-world", lab=lab, pretrain=SMALL, sft=False, quantize=False)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(small))
    result = experiments.ablation("vocab", tmp_path / "r.yaml", seeds=1, output=tmp_path / "out")
    seen = [runs["0"]["domain_bpb"]["values"] for runs in result["runs"].values()]
    assert [len(values) for values in seen] == [8, 8, 8] and seen[0] != seen[1] != seen[2]
    assert result["arms"]["new pieces"]["vocab"] == dict(pieces=500, start="mean", descriptions={})
    assert "vocab" not in result["arms"]["own pieces"]
    rates = [arm["pretrain"]["learning_rate"] for arm in result["arms"].values()]
    assert rates == pytest.approx([3e-3, 3e-3, 3e-4])


COPIES = """from transformers import LlamaConfig, LlamaForCausalLM
import torch
from domain_llm.devices import reset_peak_memory, trim_memory
from domain_llm.train.loop import add_lora
def held(what): return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith(what)).split()[1])
shape = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
def peak(tied, rows):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60000, tie_word_embeddings=tied, **shape))
    layers = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    tuned = add_lora(model, 4, 4, dict.fromkeys(layers, rows) if rows else None)
    ids = torch.randint(0, 60000, (1, 8))
    trim_memory()
    reset_peak_memory()
    before = held("VmRSS")
    for _ in range(2):
        tuned(input_ids=ids, labels=ids).loss.backward()
    return held("VmHWM") - before
for tied in (True, False):
    print(*(peak(tied, rows) for rows in ([], list(range(59000, 60000)))))"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not say how much memory a process held"
)
def test_rows_beside_an_adapter_cost_two_copies_of_a_matrix():
    done = subprocess.run([sys.executable, "-c", COPIES], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines()[-2:]:
        without, with_rows = map(float, line.split())
        assert with_rows - without == pytest.approx(2 * 60000 * 256 * 4, rel=0.15)
