"""The models and amounts of work of `benchmarks.gpu`."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from demo.base import write_base_v1

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Shape:
    """One model, and how much of it a benchmark does.

    Attributes:
        name: part of the names of its figures.
        about: the model in words.
        sizes: fields of a LlamaConfig with random weights; empty for SmolLM2-135M's weights.
        dtype: of the base's weights.
        sequence: tokens of a packed sequence.
        batch: sequences of a step.
        steps: steps of one measurement.
        adapters: adapters of the fleet.
        items: items of the suite, which every adapter answers.
        harness_adapters: how many of the adapters lm-evaluation-harness evaluates. It loads the
            base again for each, so that the time of all follows from a few.
    """

    name: str
    about: str
    sizes: dict[str, int] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    sequence: int = 2048
    batch: int = 4
    steps: int = 8
    adapters: int = 64
    items: int = 500
    harness_adapters: int = 3

    def write(self, folder: Path) -> Path:
        """Write the base as Hugging Face files; return the folder."""
        if not self.sizes:
            folder.mkdir(parents=True)
            return write_base_v1(folder)
        config = LlamaConfig(
            **self.sizes,
            max_position_embeddings=4096,
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        model.save_pretrained(folder)
        word_tokenizer(self.sizes["vocab_size"]).save_pretrained(folder)
        return folder


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "tiny",
            "Llama of 2 layers, random weights",
            sizes=TINY,
            dtype="float32",
            sequence=64,
            batch=2,
            steps=2,
            adapters=3,
            items=4,
            harness_adapters=1,
        ),
        Shape("smollm2", "SmolLM2-135M", batch=8, adapters=16, items=200, harness_adapters=2),
        Shape("7b", "Llama of 7B's shape, random weights", sizes=LLAMA_7B),
    )
}


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` tokens, in which a word is a token."""
    words = [*SPECIAL.values(), *(f"w{i}" for i in range(size - len(SPECIAL)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def texts(count: int, shortest: int, longest: int, seed: int) -> list[str]:
    """Return texts of random words of `word_tokenizer`."""
    draw = random.Random(seed)
    text: Callable[[], str] = lambda: " ".join(  # noqa: E731
        f"w{draw.randrange(500)}" for _ in range(draw.randint(shortest, longest))
    )
    return [text() for _ in range(count)]
