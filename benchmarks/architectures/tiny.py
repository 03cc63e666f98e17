"""A tiny random model of every causal-LM architecture of the installed transformers."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["ARCHITECTURES", "UNBUILT", "VOCABULARY", "tiny"]

ARCHITECTURES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every model type that `AutoModelForCausalLM` has, and its class."""

VOCABULARY = 64
_LAYERS = 4
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
_INDEXER = {
    "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embedding_dim",
         "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "encoder_ffn_dim",
         "decoder_ffn_dim", "dim_ff", "dff", "d_inner"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "num_decoder_layers", "encoder_layers", "num_encoder_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
        4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "global_head_dim"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
         "attention_window"), 64),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 40),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "n_shared_experts": 1, "first_k_dense_replace": 1, "rotary_dim": 4,
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 24, "layer_types": None,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    **dict.fromkeys(
        ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "relu_dropout",
         "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_probs_dropout_prob",
         "resid_pdrop", "embd_pdrop", "emb_pdrop", "classifier_dropout",
         "layerdrop", "decoder_layerdrop", "embedding_dropout", "ff_dropout", "residual_dropout"),
        0.0),
    "attn_pdrop": 0,
}  # fmt: skip
"""Values for fields that many configurations have."""

_HALF_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * (_LAYERS // 2)}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2)}
_HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
_TOWERS = ("vision_config", "audio_config", "vision_tower_config")
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "mlp_dim": 24, "output_channels": 8, "num_pos_feats": 8,
}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_HALF_LINEAR},
    "cohere_compass_text": {
        **_SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in _SLIDING["layer_types"]
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 4,
        "n_groups": 2,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_state": 8},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "cross_attn_k": 1,
        "encoder_config": {"cross_attn_k": 1, "hidden_size_global": 32},
        "decoder_config": {"cross_attn_k": 1, "hidden_size_global": 32},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_lora_rank": 8, "o_groups": 2, "head_dim": 8},
    "dots3_note": {
        "text_config": {"per_layer_config": {}, "head_dim": 8},
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 16, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 8},
    "gemma4_unified_assistant": {
        "text_config_type": "gemma4_unified_text",
        "text_config": {
            "num_kv_shared_layers": 2,
            "layer_types": ["full_attention"] * _LAYERS,
        },
    },
    "gemma3n_text": {
        **_SLIDING,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.5],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        **_SLIDING,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "kimi_linear": {**_HALF_LINEAR, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    # Without experts that pass x on, which no weights can drop in the formulas.
    "longcat_flash": {"zero_expert_num": 0},
    "mamba2": {"num_heads": 8, "state_size": 8},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen3_5_text": {**_HALF_LINEAR},
    "qwen4_exp_text": {
        **_HALF_LINEAR,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local"] * _LAYERS,
        "local_attention_probs_dropout_prob": 0.0,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": len(_HYBRID),
        "layers_block_type": _HYBRID,
        "mamba_d_state": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": len(_HYBRID),
        "layers_block_type": _HYBRID,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "adapter_rank": 4,
        "chunk_size": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
"""Values for fields of one architecture, added to `_SMALL`."""

_OF_PARTS = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
"""Model types of several parts, whose class for causal language modeling takes one part's."""

UNBUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm; its text model is the row gemma3n_text",
    "gemma4_assistant": "every layer must share keys and values, which its text model refuses",
}
"""Architectures that are not built, with the reason."""


def tiny(model_type: str, seed: int = 0) -> nn.Module:
    """Return a random model in training mode (float32, without dropout); ~100,000 parameters.

    Parameters that begin at zero, and biases, get noise.
    """
    torch.manual_seed(seed)
    config = _config(model_type)
    if model_type in _OF_PARTS:
        model = getattr(transformers, ARCHITECTURES[model_type])(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def _config(model_type: str) -> PreTrainedConfig:
    options = dict(_OPTIONS.get(model_type, {}))
    return _shrunk(CONFIG_MAPPING[_OF_PARTS.get(model_type, model_type)], options)


def _shrunk(config: type[PreTrainedConfig], options: Mapping[str, Any]) -> PreTrainedConfig:
    own = dict(options)
    fields = _fields(config)
    values = {
        name: value
        for name, value in _SMALL.items()
        if name in fields and config.attribute_map.get(name) not in _SMALL
    }
    if "kv_lora_rank" in fields:
        values |= {name: value for name, value in _MLA.items() if name in fields}
    values |= {n: v for n, v in _INDEXER.items() if n in fields}
    for name, part in config.sub_configs.items():
        if part is AutoConfig:
            part = CONFIG_MAPPING[own.pop(f"{name}_type")] if f"{name}_type" in own else None
            part = part or type(getattr(config(), name))
        if name in _TOWERS:
            values[name] = {**_VISION, **own.pop(name, {})}
        else:
            values[name] = _shrunk(part, own.pop(name, {}))
    return config(**{**values, **own})


def _fields(config: type[PreTrainedConfig]) -> set[str]:
    return {name for c in config.__mro__ for name in getattr(c, "__annotations__", {})}
