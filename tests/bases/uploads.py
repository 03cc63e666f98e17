"""The smallest Hugging Face folder there is, as a dictionary of files."""

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
    "added_tokens": [{"id": 3, "content": "<eos>", "special": True}],
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


def sharded(tensors: Mapping[str, np.ndarray], shards: Mapping[str, int]) -> dict[str, bytes]:
    """Return the weight files with each tensor in the shard of that number, and their index."""
    numbers = sorted(set(shards.values()))
    files = {number: f"model-{number:05}-of-{len(numbers):05}.safetensors" for number in numbers}
    index = {"weight_map": {name: files[number] for name, number in shards.items()}}
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
