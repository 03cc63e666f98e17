"""One row per architecture: how to make a tiny one, and where its formulas have their weights."""

from dataclasses import dataclass, field

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.perturbation.reference import Down

LAYERS = 3
_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA_DOWN = Down(("model.layers.{}.mlp.down_proj.weight",))
_LLAMA_OUT = Down(("model.layers.{}.self_attn.o_proj.weight",))


@dataclass(frozen=True)
class Architecture:
    name: str
    config: str
    options: dict = field(default_factory=dict)
    ffn: Down = _LLAMA_DOWN
    attention: Down = _LLAMA_OUT
    lora: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    sliced: bool = True

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        """A random one in training mode, with no dropout of its own and no bias at zero."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**_SHAPE, **self.options})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.train()

    def __str__(self) -> str:
        return self.name


ARCHITECTURES = (
    Architecture("llama", "LlamaConfig"),
    Architecture(
        "llama with biases",
        "LlamaConfig",
        {"mlp_bias": True, "attention_bias": True},
        ffn=Down(_LLAMA_DOWN.weights, biases=("model.layers.{}.mlp.down_proj.bias",)),
        attention=Down(_LLAMA_OUT.weights, biases=("model.layers.{}.self_attn.o_proj.bias",)),
    ),
    Architecture("llama with d_ff = d", "LlamaConfig", {"intermediate_size": 16}),
    Architecture("qwen2", "Qwen2Config"),
    Architecture("qwen3", "Qwen3Config", {"head_dim": 4}),
    Architecture("mistral", "MistralConfig"),
    Architecture("gemma2", "Gemma2Config", {"head_dim": 4}),
    Architecture("gemma3", "Gemma3TextConfig", {"head_dim": 4}),
    Architecture("olmo2", "Olmo2Config"),
    Architecture("internlm3", "InternLM3Config", {"head_dim": 4}),
    Architecture("phi3", "Phi3Config", lora=("gate_up_proj", "down_proj")),
    Architecture(
        "gpt2",
        "GPT2Config",
        {"n_inner": 24, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
        ffn=Down(
            ("transformer.h.{}.mlp.c_proj.weight",),
            axis=0,
            biases=("transformer.h.{}.mlp.c_proj.bias",),
        ),
        attention=Down(
            ("transformer.h.{}.attn.c_proj.weight",),
            axis=0,
            biases=("transformer.h.{}.attn.c_proj.bias",),
        ),
        lora=("c_fc", "mlp.c_proj"),
    ),
    *(
        Architecture(
            f"gpt_neox, {style} residual",
            "GPTNeoXConfig",
            {"use_parallel_residual": style == "parallel"},
            ffn=Down(
                ("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",),
                biases=("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",),
            ),
            attention=Down(
                ("gpt_neox.layers.{}.attention.dense.weight",),
                biases=("gpt_neox.layers.{}.attention.dense.bias",),
            ),
            lora=("dense_h_to_4h", "dense_4h_to_h"),
        )
        for style in ("parallel", "serial")
    ),
    *(
        Architecture(
            f"opt, {norm} norm",
            "OPTConfig",
            {
                "ffn_dim": 24,
                "word_embed_proj_dim": 16,
                "dropout": 0.0,
                "do_layer_norm_before": norm == "pre",
            },
            ffn=Down(
                ("model.decoder.layers.{}.fc2.weight",),
                biases=("model.decoder.layers.{}.fc2.bias",),
            ),
            attention=Down(
                ("model.decoder.layers.{}.self_attn.out_proj.weight",),
                biases=("model.decoder.layers.{}.self_attn.out_proj.bias",),
            ),
            lora=("fc1", "fc2"),
        )
        for norm in ("pre", "post")
    ),
    *(
        Architecture(
            f"falcon, {name}",
            "FalconConfig",
            {"ffn_hidden_size": 24, "hidden_dropout": 0.0, **options},
            ffn=Down(("transformer.h.{}.mlp.dense_4h_to_h.weight",)),
            attention=Down(("transformer.h.{}.self_attention.dense.weight",)),
            lora=("dense_h_to_4h", "dense_4h_to_h"),
            sliced=False,
        )
        for name, options in {
            "7b": {"parallel_attn": True, "multi_query": True},
            "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
            "rw": {"parallel_attn": False, "multi_query": False, "alibi": True},
        }.items()
    ),
    Architecture(
        "bloom",
        "BloomConfig",
        {"n_layer": LAYERS, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        ffn=Down(
            ("transformer.h.{}.mlp.dense_4h_to_h.weight",),
            biases=("transformer.h.{}.mlp.dense_4h_to_h.bias",),
        ),
        attention=Down(
            ("transformer.h.{}.self_attention.dense.weight",),
            biases=("transformer.h.{}.self_attention.dense.bias",),
        ),
        lora=("dense_h_to_4h", "dense_4h_to_h"),
    ),
    Architecture(
        "mixtral",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        ffn=Down(("model.layers.{}.mlp.experts.down_proj",)),
        lora=(),
        sliced=False,
    ),
    Architecture(
        "qwen2_moe",
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 1,
        },
        ffn=Down(
            (
                "model.layers.{}.mlp.experts.down_proj",
                "model.layers.{}.mlp.shared_expert.down_proj.weight",
            )
        ),
        lora=(),
        sliced=False,
    ),
)
