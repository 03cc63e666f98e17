import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.errors import (
    AdapterError,
    InvalidSpecError,
    NotFoundError,
    UnsupportedModelError,
)
from trans_peft.models import (
    adapter_weights_sha256,
    load_base,
    load_tokenizer,
    remove_unrecorded_template,
)
from trans_peft.text.chat import pinned


def saved(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> str:
    folder.mkdir(exist_ok=True)
    configure(folder)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata)
    return adapter_weights_sha256(folder)


def configure(folder: Path, **fields: object) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q", "v"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_the_hash_covers_tensors_but_not_file_metadata(tmp_path):
    first = saved(tmp_path / "one", TENSORS, format="pt")
    second = saved(tmp_path / "two", dict(reversed(TENSORS.items())), format="pt", note="other")
    assert first == second
    assert len(first) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"a": TENSORS["a"] + torch.eye(2, 3) * 1e-6},
        {"a": TENSORS["a"].reshape(3, 2)},
        {"a": TENSORS["a"].view(torch.int32)},
        {"c": torch.zeros(0)},
    ],
    ids=["value", "shape", "dtype", "name"],
)
def test_every_change_of_a_tensor_changes_the_hash(tmp_path, other):
    assert saved(tmp_path, TENSORS) != saved(tmp_path, TENSORS | other)


@pytest.mark.parametrize(
    ("fields", "is_hashed"),
    [
        ({"lora_alpha": 16}, True),
        ({"use_dora": True}, True),
        ({"target_modules": ["v", "q"]}, False),  # PEFT saves a set
        ({"base_model_name_or_path": "s3://bases/v2", "revision": "2"}, False),
        ({"inference_mode": True, "peft_version": "0.22"}, False),
    ],
)
def test_the_hash_covers_the_configuration_without_provenance(tmp_path, fields, is_hashed):
    before = saved(tmp_path, TENSORS)
    configure(tmp_path, **fields)
    assert (adapter_weights_sha256(tmp_path) != before) is is_hashed


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    saved(tmp_path, TENSORS)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="configuration"):
        adapter_weights_sha256(tmp_path)


@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_an_invalid_safetensors_file_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "broken"
    folder.mkdir(exist_ok=True)
    configure(folder)
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError):
        adapter_weights_sha256(folder)


def test_a_truncated_file_is_refused(tmp_path):
    saved(tmp_path, TENSORS)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="ends 1 bytes too early"):
        adapter_weights_sha256(tmp_path)


def test_a_folder_without_weights_is_not_found(tmp_path):
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(NotFoundError):
        adapter_weights_sha256(tmp_path)


def test_a_loaded_base_computes_the_logits_of_the_saved_model(tiny_base):
    base = load_base(tiny_base, "float32", "cpu")
    ids = torch.arange(12)[None]
    assert not base.model.training
    assert torch.equal(base.model(ids).logits, tiny_model().eval()(ids).logits)
    assert load_base(tiny_base, "bfloat16", "cpu").model.dtype == torch.bfloat16


@pytest.mark.quantized
def test_an_adapter_can_be_added_to_a_base_in_4_bits(tiny_base):
    model = load_base(tiny_base, "nf4", "cpu").model
    packed = {name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(packed) == 2 * 7
    assert "lm_head" not in packed
    assert model.model.layers[0].mlp.down_proj.weight.quant_state.quant_type == "nf4"
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    with torch.no_grad():  # some processors would pack the weights again
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    ids = torch.arange(12)[None]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).train()
    logits, exact = adapted(ids).logits.float(), tiny_model()(ids).logits
    assert 0.95 < torch.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) < 1


def test_4_bits_need_bitsandbytes(tiny_base, monkeypatch):
    monkeypatch.setattr("trans_peft.models.find_spec", lambda name: None)
    with pytest.raises(InvalidSpecError, match=r"(?s)needs bitsandbytes.*\[quantized\]"):
        load_base(tiny_base, "nf4", "cpu")


def test_a_base_is_loaded_once(tiny_base):
    first = load_base(tiny_base, "float32", "cpu")
    first.model.train()
    again = load_base(tiny_base, "float32", "cpu")
    assert again.model is first.model
    assert not again.model.training


def test_a_base_that_still_has_an_adapter_is_loaded_again(tiny_base):
    first = load_base(tiny_base, "float32", "cpu")
    get_peft_model(first.model, LoraConfig(target_modules=["q_proj"]))
    again = load_base(tiny_base, "float32", "cpu")
    assert again.model is not first.model
    assert not any("lora" in name for name, _ in again.model.named_parameters())


def test_a_folder_with_changed_files_is_loaded_again(tmp_path):
    write_tiny_base(tmp_path)
    first = load_base(tmp_path, "float32", "cpu")
    write_tiny_base(tmp_path, seed=1)
    again = load_base(tmp_path, "float32", "cpu")
    assert not torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_part_is_refused(tiny_base, tmp_path, name):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / name).rename(folder / f"{name}.bin")
    (folder / "tokenizer_config.json").unlink()
    if name != "tokenizer.json":
        assert (folder / "tokenizer.json").is_file()
    with pytest.raises(NotFoundError, match="is not the folder of a base model"):
        load_base(folder, "float32")


def test_code_in_a_base_is_never_run(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    own_code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": own_code}))
    with pytest.raises(UnsupportedModelError, match="never run"):
        load_base(folder, "float32", "cpu")
    assert not marker.exists()


def test_a_tokenizer_without_a_padding_token_uses_its_end_of_text_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<eos>"


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


def test_the_hash_covers_the_pinned_chat_template(tmp_path):
    before = saved(tmp_path, TENSORS)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    first = adapter_weights_sha256(tmp_path)
    assert first != before
    assert adapter_weights_sha256(tmp_path, template=False) == before
    (tmp_path / "chat_template.jinja").write_text("{{ messages }} ")
    assert adapter_weights_sha256(tmp_path) not in (before, first)
    # A template and its pinned form have the same hash.
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    unpinned = adapter_weights_sha256(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(pinned("{{ strftime_now('%Y') }}"))
    assert adapter_weights_sha256(tmp_path) == unpinned


def test_a_template_that_the_recorded_hash_does_not_cover_is_removed(tmp_path):
    before = saved(tmp_path, TENSORS)
    assert not remove_unrecorded_template(tmp_path, before)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert not remove_unrecorded_template(tmp_path, "another hash")
    assert (tmp_path / "chat_template.jinja").is_file()
    assert remove_unrecorded_template(tmp_path, before)
    assert adapter_weights_sha256(tmp_path) == before


@pytest.mark.parametrize("end", ["2", [[256]], [256.5], True, -1, 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_no_token_ids_are_refused(tmp_path, name, end):
    folder = write_tiny_base(tmp_path / "base")
    path = folder / name
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"eos_token_id": end}))
    with pytest.raises(UnsupportedModelError, match="eos_token_id"):
        load_base(folder, "float32", "cpu")


def test_a_base_that_is_configured_to_return_tuples_has_named_outputs(tmp_path):
    folder = write_tiny_base(tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    base = load_base(folder, "float32", "cpu")
    assert base.model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.shape[:2] == (1, 2)
