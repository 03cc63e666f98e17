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
    keeps_no_template,
    load_base,
    load_tokenizer,
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


def test_the_hash_is_of_the_tensors_not_of_the_file(tmp_path):
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
def test_the_hash_feels_every_change(tmp_path, other):
    assert saved(tmp_path, TENSORS) != saved(tmp_path, TENSORS | other)


@pytest.mark.parametrize(
    ("field", "feels"),
    [
        ({"lora_alpha": 16}, True),
        ({"use_dora": True}, True),
        ({"target_modules": ["v", "q"]}, False),  # PEFT saves a set
        ({"base_model_name_or_path": "s3://bases/v2", "revision": "2"}, False),
        ({"inference_mode": True, "peft_version": "0.22"}, False),
    ],
)
def test_the_hash_feels_the_configuration_but_not_where_it_came_from(tmp_path, field, feels):
    before = saved(tmp_path, TENSORS)
    configure(tmp_path, **field)
    assert (adapter_weights_sha256(tmp_path) != before) is feels


def test_a_configuration_that_is_none_is_refused(tmp_path):
    saved(tmp_path, TENSORS)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="configuration"):
        adapter_weights_sha256(tmp_path)


@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_what_is_no_safetensors_file_is_refused(tmp_path_factory, data):
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


def test_a_loaded_base_computes_what_was_saved(tiny_base):
    base = load_base(tiny_base, "float32", "cpu")
    ids = torch.arange(12)[None]
    assert not base.model.training
    assert torch.equal(base.model(ids).logits, tiny_model().eval()(ids).logits)
    assert load_base(tiny_base, "bfloat16", "cpu").model.dtype == torch.bfloat16


@pytest.mark.quantized
def test_a_base_in_4_bits_is_one_to_train_on(tiny_base):
    model = load_base(tiny_base, "nf4", "cpu").model
    packed = {name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(packed) == 2 * 7
    assert "lm_head" not in packed
    assert model.model.layers[0].mlp.down_proj.weight.quant_state.quant_type == "nf4"
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    ids = torch.arange(12)[None]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).train()
    logits, exact = adapted(ids).logits.float(), tiny_model()(ids).logits
    assert 0.95 < torch.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) < 1


def test_4_bits_without_bitsandbytes_are_told(tiny_base, monkeypatch):
    monkeypatch.setattr("trans_peft.models.find_spec", lambda name: None)
    with pytest.raises(InvalidSpecError, match=r"(?s)needs bitsandbytes.*trans-peft\[quantized\]"):
        load_base(tiny_base, "nf4", "cpu")


def test_one_base_serves_many_adapters(tiny_base):
    first = load_base(tiny_base, "float32", "cpu")
    first.model.train()
    again = load_base(tiny_base, "float32", "cpu")
    assert again.model is first.model
    assert not again.model.training


def test_a_base_left_with_an_adapter_inside_is_not_handed_out(tiny_base):
    first = load_base(tiny_base, "float32", "cpu")
    get_peft_model(first.model, LoraConfig(target_modules=["q_proj"]))
    again = load_base(tiny_base, "float32", "cpu")
    assert again.model is not first.model
    assert not any("lora" in name for name, _ in again.model.named_parameters())


def test_a_folder_with_other_files_is_another_base(tmp_path):
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
    with pytest.raises(NotFoundError, match="not a base model's folder"):
        load_base(folder, "float32")


def test_code_that_comes_with_the_files_never_runs(tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    own_code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": own_code}))
    with pytest.raises(UnsupportedModelError, match="never run"):
        load_base(folder, "float32", "cpu")
    assert not marker.exists()


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<eos>"


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


def test_a_chat_template_is_part_of_an_adapter(tmp_path):
    before = saved(tmp_path, TENSORS)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    first = adapter_weights_sha256(tmp_path)
    assert first != before
    assert adapter_weights_sha256(tmp_path, template=False) == before
    (tmp_path / "chat_template.jinja").write_text("{{ messages }} ")
    assert adapter_weights_sha256(tmp_path) not in (before, first)
    # Pinned or not, a template renders the same prompts.
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    unpinned = adapter_weights_sha256(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(pinned("{{ strftime_now('%Y') }}"))
    assert adapter_weights_sha256(tmp_path) == unpinned


def test_a_version_from_before_templates_is_used_as_it_was_evaluated(tmp_path):
    before = saved(tmp_path, TENSORS)
    assert not keeps_no_template(tmp_path, before)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert not keeps_no_template(tmp_path, "another hash")
    assert (tmp_path / "chat_template.jinja").is_file()
    assert keeps_no_template(tmp_path, before)
    assert adapter_weights_sha256(tmp_path) == before


@pytest.mark.parametrize("end", ["2", [[256]], [256.5], True, -1, 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_that_no_answer_can_have_are_refused(tmp_path, name, end):
    folder = write_tiny_base(tmp_path / "base")
    path = folder / name
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"eos_token_id": end}))
    with pytest.raises(UnsupportedModelError, match="eos_token_id"):
        load_base(folder, "float32", "cpu")


def test_a_base_that_returns_tuples_is_read_by_name(tmp_path):
    folder = write_tiny_base(tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    base = load_base(folder, "float32", "cpu")
    assert base.model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.shape[:2] == (1, 2)
