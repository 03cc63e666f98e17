import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.tiny import tiny_model, write_tiny_base
from trans_peft.errors import AdapterError
from trans_peft.transfer.load_adapter import rebind_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_only_the_reference_to_the_base_changes(write_adapter, tmp_path):
    source = write_adapter()
    before = json.loads((source / CONFIG).read_text())
    target = rebind_adapter(
        source, tmp_path / "deep" / "v2", base_name="s3://b/v2", base_revision="f"
    )
    assert (target / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert json.loads((target / CONFIG).read_text()) == before | {
        "base_model_name_or_path": "s3://b/v2",
        "revision": "f",
    }
    assert json.loads((source / CONFIG).read_text()) == before
    assert {path.name for path in target.iterdir()} == {WEIGHTS, CONFIG}
    assert {path.name for path in target.parent.iterdir()} == {"v2"}


def test_peft_loads_the_copy_on_the_new_base(write_adapter, tmp_path):
    new_base = write_tiny_base(tmp_path / "base", seed=9)
    target = rebind_adapter(
        write_adapter(), tmp_path / "v2", base_name=str(new_base), base_revision=None
    )
    tokens = torch.tensor([[1, 2, 3]])
    bare = tiny_model(seed=9)(input_ids=tokens).logits
    model = PeftModel.from_pretrained(tiny_model(seed=9), target)
    assert model.peft_config["default"].base_model_name_or_path == str(new_base)
    assert not torch.equal(model(input_ids=tokens).logits, bare)


def test_only_the_chat_template_is_copied_too(write_adapter, tmp_path):
    source = write_adapter()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "optimizer.pt").write_bytes(b"pickle")
    target = rebind_adapter(source, tmp_path / "v2", base_name="b", base_revision=None)
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (target / "optimizer.pt").exists()


def test_an_equal_copy_is_kept_and_another_is_refused(write_adapter, tmp_path):
    source, target = write_adapter(), tmp_path / "v2"
    rebind_adapter(source, target, base_name="b", base_revision="1")
    written = (target / CONFIG).stat().st_mtime_ns
    assert rebind_adapter(source, target, base_name="b", base_revision="1") == target
    assert (target / CONFIG).stat().st_mtime_ns == written
    with pytest.raises(AdapterError, match="the same weights, bound to b"):
        rebind_adapter(source, target, base_name="c", base_revision="1")
    with pytest.raises(AdapterError, match="other weights"):
        rebind_adapter(write_adapter("other", seed=5), target, base_name="b", base_revision="1")
    assert json.loads((target / CONFIG).read_text())["base_model_name_or_path"] == "b"


def test_an_invalid_folder_writes_nothing(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match=r"no adapter_config.json; its weights are pickled"):
        rebind_adapter(tmp_path / "source", tmp_path / "v2", base_name="b", base_revision=None)
    assert not Path(tmp_path / "v2").exists()
