"""A language model small enough to make in milliseconds, with a real tokenizer: random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Every byte is one token; then <pad>, <eos> and whatever else is asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<pad>", "<eos>", *extra_tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model_in_4_bits() -> LlamaForCausalLM:
    """`tiny_model()` with the linear layers of its decoder in NF4, computing in float32."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = tiny_model()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    packed = Linear4bit(
                        child.in_features, child.out_features, bias=False,
                        compute_dtype=torch.float32, quant_type="nf4",
                    )  # fmt: skip
                    packed.weight = Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4", module=packed
                    )
                    # Some processors would pack the weights again in eval mode, and round them.
                    packed.support_avx512bf16_for_cpu = False
                    setattr(parent, name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def tiny_model(
    seed: int = 0, layers: int = 2, hidden: int = 32, vocabulary: int = 258
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=257,
            pad_token_id=256,
            tie_word_embeddings=True,
        )
    )


def write_tiny_base(folder: Path, seed: int = 0, **shape: int) -> Path:
    """Write a Hugging Face folder (config, safetensors, tokenizer, chat template) and return it."""
    tiny_model(seed, **shape).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
