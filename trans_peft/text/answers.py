"""Decode the token ids of a model's answer to text."""

from collections.abc import Collection, Sequence
from typing import Any

__all__ = ["answer_text", "decode_ids"]


def answer_text(tokenizer: Any, ids: Sequence[int], end_tokens: Collection[int]) -> str:
    """Return the text of an answer: all tokens before the first end token.

    `ids` are not padded: a padding token is part of the answer. Special tokens inside the answer
    are kept (see `decode_ids`).
    """
    length = next((i for i, token in enumerate(ids) if token in end_tokens), len(ids))
    return decode_ids(tokenizer, ids[:length])


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids, including special tokens.

    References may contain special tokens (`<|tool|>x`). If answers lacked them, a correct answer
    would not equal its reference.
    """
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
