"""Tiny models of several architectures, and their answers with transformers' `generate`."""

from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

VOCABULARY = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}
SHAPE = VOCABULARY | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "gpt2": GPT2Config(**VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "mistral, window 24": MistralConfig(**SHAPE, sliding_window=24),
    "gemma2, window 24": Gemma2Config(**SHAPE, head_dim=8, sliding_window=24),
    "gemma3, window 8": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8),
    # The window is applied by the mask, which counts columns, and not by the cache.
    "gpt neo, window 8": GPTNeoConfig(
        **VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=256,
        attention_types=[[["global", "local"], 1]], window_size=8,
    ),
    "falcon, alibi": FalconConfig(
        **VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "lfm2, convolution": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def model_of(name, seed=0):
    """A model whose answers depend on the whole prompt; default weights repeat its last token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model.eval()


def by_transformers(model, prompts, **options):
    """What plain `generate` gives, prompt by prompt, without any padding."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@contextmanager
def ending_with(model, tokens):
    """Let these be the model's end tokens inside the block."""
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = tokens
    yield
    model.generation_config.eos_token_id = own


class Counting(nn.Module):
    """Runs the model, notes the shape of each call, and has room for so many rows only."""

    def __init__(self, model, room=10**9, error=None):
        super().__init__()
        self.model, self.room, self.shapes = model, room, []
        self.error = error or torch.OutOfMemoryError("no room")

    @property
    def generation_config(self):
        return self.model.generation_config

    def get_base_model(self):
        """The probe of a base is not counted."""
        return self.model

    def forward(self, **inputs):
        rows, columns = inputs["input_ids"].shape
        if rows > self.room:
            raise self.error
        self.shapes.append((rows, columns))
        return self.model(**inputs)
