import json

import pytest
from peft import IA3Config

from tests.transfer.conftest import edit_config
from trans_peft.errors import AdapterError, InvalidSpecError
from trans_peft.transfer.scaling import has_scale, rescaled


def test_only_the_alphas_change(write_adapter, tmp_path):
    folder = edit_config(write_adapter(), lora_alpha=8, alpha_pattern={"v_proj": 4})
    scaled = rescaled(folder, tmp_path / "half", 0.5)
    config, old = (json.loads((f / "adapter_config.json").read_text()) for f in (scaled, folder))
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4.0, {"v_proj": 2.0})
    assert config | {"lora_alpha": 8, "alpha_pattern": {"v_proj": 4}} == old
    name = "adapter_model.safetensors"
    assert (scaled / name).read_bytes() == (folder / name).read_bytes()


def test_a_method_without_a_scale_is_refused(write_adapter, tmp_path):
    config = IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    folder = write_adapter(config=config)
    assert not has_scale(folder)
    with pytest.raises(AdapterError, match="has no scale"):
        rescaled(folder, tmp_path / "half", 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"lora_alpha": "x", "alpha_pattern": {"lora_alpha": 3}},
        {"lora_alpha": True},
    ],
)
def test_every_scale_must_be_a_number(options, write_adapter, tmp_path):
    with pytest.raises(AdapterError, match="every scale must be a number"):
        rescaled(edit_config(write_adapter(), **options), tmp_path / "half", 0.5)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_must_be_positive_and_finite(factor, write_adapter, tmp_path):
    with pytest.raises(InvalidSpecError, match="positive and finite"):
        rescaled(write_adapter(), tmp_path / "scaled", factor)
    assert not (tmp_path / "scaled").exists()
