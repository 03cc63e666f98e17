import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from tests.tiny import tiny_model
from trans_peft.domain.base import Fingerprint, TensorSignature

WriteAdapter = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """Return a function that saves an adapter with random weights for the tiny model."""

    def write(
        name: str = "adapter",
        *,
        seed: int = 1,
        config: PeftConfig | None = None,
        shape: dict | None = None,
        **options,
    ) -> Path:
        base = tiny_model(**(shape or {}))
        torch.manual_seed(seed)
        config = config or LoraConfig(
            **{
                "r": 4,
                "target_modules": ["q_proj", "v_proj"],
                "init_lora_weights": False,
                "task_type": "CAUSAL_LM",
            }
            | options
        )
        get_peft_model(base, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def edit_config(folder: Path, **changes) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def fingerprint_of(model: torch.nn.Module, **changes) -> Fingerprint:
    """Return a fingerprint with up to 64 evenly spaced values of each tensor."""
    tensors = {}
    for name, value in model.state_dict().items():
        flat = value.flatten()
        at = torch.linspace(0, len(flat) - 1, min(64, len(flat))).long()
        tensors[name] = TensorSignature(
            tuple(value.shape),
            "F32",
            hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
            tuple(flat[at].tolist()),
        )
    fields = {
        "architecture": "LlamaForCausalLM",
        "layer_count": model.config.num_hidden_layers,
        "config_sha256": "c",
        "tensors": tensors,
        "vocabulary_sha256": "v",
        "tokenizer_sha256": "t",
        "chat_template_sha256": "x",
    }
    return Fingerprint(**fields | changes)
