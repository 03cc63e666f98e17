"""Read training and evaluation data, report all invalid rows at once, and pin data by hash."""

from trans_peft.data.encoding import token_ids
from trans_peft.data.example import (
    ChatMessage,
    Example,
    end_of_turn,
    full_ids,
    prompt_ids,
    token_counts,
)
from trans_peft.data.parsing import parse_examples
from trans_peft.data.sources import pin, read_examples, read_prompts, write_examples

__all__ = [
    "ChatMessage",
    "Example",
    "end_of_turn",
    "full_ids",
    "parse_examples",
    "pin",
    "prompt_ids",
    "read_examples",
    "read_prompts",
    "token_counts",
    "token_ids",
    "write_examples",
]
