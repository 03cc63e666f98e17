"""InternLM2 from the formulas, and the smallest upload of one: the reference for its conversion.

Nothing here comes from `trans_peft`: names, shapes and the order of rows are written down again.
"""

import json
import math

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

BOMB = """
import pathlib
pathlib.Path(__file__).with_name("EXECUTED").touch()
raise SystemExit("code of an upload was run")
"""
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
AUTO_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
}
CONFIG = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": AUTO_MAP,
    "bias": False,
    "bos_token_id": 259,
    "eos_token_id": 260,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "model_type": "internlm2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 260,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.0",
    "use_cache": True,
    "vocab_size": 261,
}
TOKENIZER_SETTINGS = {
    "auto_map": {
        "AutoTokenizer": [
            "tokenization_internlm2.InternLM2Tokenizer",
            "tokenization_internlm2_fast.InternLM2TokenizerFast",
        ]
    },
    "bos_token": "<s>",
    "chat_template": CHAT_TEMPLATE,
    "eos_token": "</s>",
    "pad_token": "</s>",
    "sp_model_kwargs": None,
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}


def random_weights(config, seed=0, dtype=torch.float32):
    """Draw all weights at random, norms and biases too: swapped tensors then change the logits."""
    generator = torch.Generator().manual_seed(seed)
    d, f, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fused = (heads + 2 * kv_heads) * (d // heads)
    shapes = {"model.tok_embeddings.weight": (vocabulary, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (vocabulary, d)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.attention_norm.weight": (d,),
            f"{layer}.attention.wqkv.weight": (fused, d),
            f"{layer}.attention.wo.weight": (d, d),
            f"{layer}.ffn_norm.weight": (d,),
            f"{layer}.feed_forward.w1.weight": (f, d),
            f"{layer}.feed_forward.w2.weight": (d, f),
            f"{layer}.feed_forward.w3.weight": (f, d),
        }
        if config["bias"]:
            shapes |= {
                f"{layer}.attention.wqkv.bias": (fused,),
                f"{layer}.attention.wo.bias": (d,),
            }
    return {
        name: (torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) * 2).to(dtype)
        for name, shape in shapes.items()
    }


def internlm2_logits(config, weights, ids):
    """Return the logits (positions, vocabulary) of one text, as the paper's formulas say."""
    count = len(ids)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    group, head = heads // kv_heads, config["hidden_size"] // heads

    def rms(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    theta, positions = float(config["rope_theta"]), torch.arange(count).float()
    match config["rope_scaling"]:
        case {"type": "linear", "factor": factor}:
            positions = positions / factor
        case {"type": "dynamic", "factor": factor} if count > config["max_position_embeddings"]:
            longer = factor * count / config["max_position_embeddings"] - (factor - 1)
            theta *= longer ** (head / (head - 2))
    angles = positions[:, None] / theta ** (torch.arange(0, head, 2) / head)

    def rotate(x):  # (positions, head): rotates the i-th and the (i + head/2)-th number as a pair
        a, b = x.chunk(2, dim=-1)
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1
        )

    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    x = weights["model.tok_embeddings.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        w = {
            name.removeprefix(f"model.layers.{n}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{n}.")
        }
        fused = rms(x, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T
        fused = (fused + w.get("attention.wqkv.bias", 0.0)).split(head, dim=-1)
        answers = []
        for g in range(kv_heads):
            *queries, key, value = fused[g * (group + 2) : (g + 1) * (group + 2)]
            for query in queries:
                scores = rotate(query) @ rotate(key).T / math.sqrt(head)
                answers.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
        attended = torch.cat(answers, dim=-1) @ w["attention.wo.weight"].T
        x = x + attended + w.get("attention.wo.bias", 0.0)
        h = rms(x, w["ffn_norm.weight"])
        gate, up = h @ w["feed_forward.w1.weight"].T, h @ w["feed_forward.w3.weight"].T
        x = x + (silu(gate) * up) @ w["feed_forward.w2.weight"].T
    last = weights.get("output.weight", weights["model.tok_embeddings.weight"])
    return rms(x, weights["model.norm.weight"]) @ last.T


def write_internlm2(folder, config=CONFIG, weights=None, shards=1, **files):
    """Write what the hub has; `name_json=...` replaces or adds a file, None leaves it out."""
    folder.mkdir(parents=True)
    weights = random_weights(config) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names, index = sorted(weights), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            index |= dict.fromkeys(names[shard::shards], file)
            save_file({name: weights[name] for name in names[shard::shards]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    for name in ("configuration_internlm2", "modeling_internlm2", "tokenization_internlm2"):
        (folder / f"{name}.py").write_text(BOMB)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    tokenizer = tiny_tokenizer(extra_tokens=SPECIAL_TOKENS).backend_tokenizer.to_str()
    written = {
        "config_json": config,
        "tokenizer_json": json.loads(tokenizer),
        "tokenizer_config_json": TOKENIZER_SETTINGS,
        "generation_config_json": {"eos_token_id": [260, 257]},
    }
    for name, content in (written | files).items():
        if content is not None:
            (folder / name.replace("_json", ".json")).write_text(json.dumps(content))
    return folder
