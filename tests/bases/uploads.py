"""The smallest Hugging Face folders there are, as dictionaries of files.

`folder_of()` has a fingerprint and is no model; `model_of()` also loads.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from trans_peft.edges.memory import MemoryStore

URI = "s3://bases/smol/v1"

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "rms_norm_eps": 1e-05}
TOKENIZER = {
    "version": "1.0",
    "padding": None,
    "truncation": None,
    "added_tokens": [
        {
            "id": 3,
            "content": "<eos>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
SETTINGS = {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"embed": (4, 3), "layer.0": (3, 3), "layer.1": (3, 3), "norm": (3,), "scale": ()}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def folder_of(tensors: Mapping[str, np.ndarray] | None = None, **files: Any) -> dict[str, bytes]:
    """Return the files; `config_json=...` replaces or adds one of that name, None leaves it out."""
    made: dict[str, Any] = {
        "config.json": CONFIG,
        "model.safetensors": save(dict(tensors or weights())),
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": SETTINGS,
    }
    made |= {name.replace("_json", ".json"): content for name, content in files.items()}
    return {
        name: content if isinstance(content, bytes) else json.dumps(content).encode()
        for name, content in made.items()
        if content is not None
    }


MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4, "hidden_size": 4,
    "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip


def model_weights(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (4, 4),
        "model.norm.weight": (4,),
        f"{layer}.input_layernorm.weight": (4,),
        f"{layer}.post_attention_layernorm.weight": (4,),
        f"{layer}.mlp.gate_proj.weight": (6, 4),
        f"{layer}.mlp.up_proj.weight": (6, 4),
        f"{layer}.mlp.down_proj.weight": (4, 6),
    } | {f"{layer}.self_attn.{name}_proj.weight": (4, 4) for name in "qkvo"}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def model_of(tensors: Mapping[str, np.ndarray] | None = None, **files: Any) -> dict[str, bytes]:
    """Return the files of a Llama of 4 tokens; `files` as in `folder_of`."""
    return folder_of(tensors or model_weights(), **({"config_json": MODEL_CONFIG} | files))


def sharded(tensors: Mapping[str, np.ndarray], shards: Mapping[str, int]) -> dict[str, bytes]:
    """Return the weight files with each tensor in the shard of that number, and their index."""
    numbers = sorted(set(shards.values()))
    files = {number: f"model-{number:05}-of-{len(numbers):05}.safetensors" for number in numbers}
    index = {"metadata": {}, "weight_map": {name: files[number] for name, number in shards.items()}}
    return {
        **{
            file: save({name: tensors[name] for name in shards if shards[name] == number})
            for number, file in files.items()
        },
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def store_of(files: Mapping[str, bytes], uri: str = URI, chunk_bytes: int = 1 << 20) -> MemoryStore:
    store = MemoryStore(chunk_bytes)
    for name, data in files.items():
        store.write(f"{uri}/{name}", io.BytesIO(data))
    return store
