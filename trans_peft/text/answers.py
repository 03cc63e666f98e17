"""What a model said, as text: which of its tokens count, and how they become characters."""

from collections.abc import Collection, Sequence
from typing import Any

__all__ = ["answer_text", "spoken"]


def answer_text(tokenizer: Any, ids: Sequence[int], end_tokens: Collection[int]) -> str:
    """Return the text of an answer: its tokens before the first end token, padding left out.

    Special tokens inside the answer stay, see `spoken`.
    """
    length = next((i for i, token in enumerate(ids) if token in end_tokens), len(ids))
    while length and ids[length - 1] == tokenizer.pad_token_id:
        length -= 1
    return spoken(tokenizer, ids[:length])


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids, special tokens included.

    A reference is text in which special tokens stand too (`<|tool|>x`). To leave them out of
    answers alone would mark an exact answer wrong; to leave them out of both would mark an answer
    without them right.
    """
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
