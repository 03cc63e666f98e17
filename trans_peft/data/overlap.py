"""Remove prompts that repeat each other, or that are items of a suite, exactly or nearly.

Two prompts are near matches if the Jaccard similarity of their character 5-grams is at least 0.8,
after case and white space were normalized (Lee et al. 2022 use the same threshold to deduplicate
training data).
"""

import unicodedata
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["distinct_from", "similarity"]

_GRAM = 5
_THRESHOLD = 0.8

T = TypeVar("T")


def similarity(first: str, second: str) -> float:
    """Return the Jaccard similarity of the character 5-grams of two texts, from 0 to 1.

    >>> similarity("def area(r):", "def  Area(r):")
    1.0
    """
    one, two = _grams(first), _grams(second)
    return len(one & two) / len(one | two)


def distinct_from(
    candidates: Iterable[T], items: Iterable[str], *, text: Callable[[T], str]
) -> list[T]:
    """Return the candidates that match no text of `items` and no earlier candidate.

    `text` returns a candidate's text. The order is kept. Time grows with the number of texts that
    share 5-grams, not with the number of pairs.
    """
    index = _Index()
    for item in items:
        index.add(_grams(item))
    kept = []
    for candidate in candidates:
        grams = _grams(text(candidate))
        if not index.has_near_match(grams):
            index.add(grams)
            kept.append(candidate)
    return kept


class _Index:
    """Sets of 5-grams, found by their rarest members.

    Two sets with a similarity of at least t share more than a fraction t of each. So a match must
    contain one of the first n - ceil(t * n) + 1 grams of a set of n, in any fixed order (prefix
    filter, Chaudhuri et al. 2006).
    """

    def __init__(self) -> None:
        self._sets: list[frozenset[str]] = []
        self._by_gram: dict[str, list[int]] = {}

    def add(self, grams: frozenset[str]) -> None:
        number = len(self._sets)
        self._sets.append(grams)
        for gram in grams:
            self._by_gram.setdefault(gram, []).append(number)

    def has_near_match(self, grams: frozenset[str]) -> bool:
        rarest = sorted(grams, key=lambda gram: (len(self._by_gram.get(gram, ())), gram))
        needed = int(_THRESHOLD * len(grams))
        near: set[int] = set()
        for gram in rarest[: len(grams) - needed + 1]:
            near.update(self._by_gram.get(gram, ()))
        return any(
            len(grams & self._sets[number]) >= _THRESHOLD * len(grams | self._sets[number])
            for number in near
        )


def _grams(text: str) -> frozenset[str]:
    """Return the character 5-grams of a normalized text; a shorter text is one gram."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return frozenset(normal[i : i + _GRAM] for i in range(max(1, len(normal) - _GRAM + 1)))
