import pytest, torch

from domain_llm import models
from domain_llm.core import InputError


def test_conversion_keeps_weights_and_template(tok):
    "The cached folder must hold what the GGUF file holds: dequantized here by the gguf package, not by transformers."
    from gguf import GGUFReader
    from gguf.quants import dequantize
    reader = GGUFReader(models._demo_gguf())
    tensors = {t.name: t for t in reader.tensors}
    model, _ = models.load()
    t = tensors["blk.3.ffn_down.weight"]
    assert torch.allclose(torch.tensor(dequantize(t.data, t.tensor_type)), model.model.layers[3].mlp.down_proj.weight, atol=1e-6)
    field = reader.fields["tokenizer.chat_template"]
    assert bytes(field.parts[field.data[0]]).decode() == tok.chat_template


def test_chat_answers_in_batches_as_alone(tiny_model):
    model, tok = tiny_model
    asked = ["one", "a much longer question about tides and locks", "three"]
    assert models.chat(model, tok, asked, max_new_tokens=6) == [models.chat(model, tok, [q], max_new_tokens=6)[0] for q in asked]


def test_tiny_is_deterministic(tok):
    a, b = models.tiny(tok, 1), models.tiny(tok, 1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_template_that_drops_a_turn_is_refused(tok):
    from copy import deepcopy
    broken = deepcopy(tok)
    broken.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="drops"): models.check_template(broken)
    broken.chat_template = None
    with pytest.raises(InputError, match="no chat template"): models.check_template(broken)


def test_only_safetensors(tiny_folder, tmp_path):
    import shutil
    from safetensors.torch import load_file
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError): models.load(str(folder))
