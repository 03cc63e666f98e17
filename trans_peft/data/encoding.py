"""Render and tokenize examples in child processes with limits.

Chat templates are programs, and tokenizers contain regular expressions and replacement rules. Both
are untrusted. Their cost depends on the text, so checking them once, without the texts, is not
enough.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from trans_peft.isolation import CallLimits, call_isolated
from trans_peft.text.chat import CHAT_IMPORTS

__all__ = ["encoded", "token_ids"]

_LIMITS = CallLimits(cpu_s=300, wall_s=1800, memory_bytes=4 << 30)
_CHUNK_CHARACTERS, _CHUNK_ITEMS = 1 << 24, 10_000
T = TypeVar("T")


def encoded(
    function: Callable[..., list[Any]],
    items: Sequence[T],
    tokenizer: Any,
    *arguments: Any,
    characters: Callable[[T], int],
) -> list[Any]:
    """Return `function(items, tokenizer, *arguments)`, computed in child processes.

    `function` must be importable by name, handle each item independently and return one result for
    each. Items are sent in chunks; a chunk may take 5 minutes of processor time and 4 GiB.
    `characters` returns the length of an item. Raises LimitExceededError, and what `function`
    raises for a chunk.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    found: list[Any] = []
    for chunk in _chunks(items, characters):
        found += call_isolated(
            function,
            chunk,
            tokenizer,
            *arguments,
            limits=_LIMITS,
            subject=f"the tokenizer or the chat template of {name}",
            imports=(*CHAT_IMPORTS, type(tokenizer).__module__),
        )
    return found


def token_ids(
    texts: Sequence[str], tokenizer: Any, *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the token ids of each text, from a tokenizer that runs in a child process."""
    return encoded(_token_ids, texts, tokenizer, add_special_tokens, characters=len)


def _token_ids(texts: list[str], tokenizer: Any, add_special_tokens: bool) -> list[list[int]]:
    ids = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    return [list(row) for row in ids]


def _chunks(items: Sequence[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    chunk: list[T] = []
    size = 0
    for item in items:
        length = characters(item)
        if chunk and (size + length > _CHUNK_CHARACTERS or len(chunk) == _CHUNK_ITEMS):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += length
    if chunk:
        yield chunk
