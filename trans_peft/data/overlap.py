"""Remove prompts that repeat each other, or that are items of a suite, exactly or nearly.

Two prompts are near matches if the Jaccard similarity of their character 5-grams is at least 0.8,
after case and white space were normalized (Lee et al. 2022 use the same threshold to deduplicate
training data).
"""

import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["NearMatches", "distinct_from", "near_matches", "normalized", "similarity"]

_GRAM = 5
_THRESHOLD = 0.8
_MAX_ITEMS = 50

T = TypeVar("T")


def similarity(first: str, second: str) -> float:
    """Return the Jaccard similarity of the character 5-grams of two texts, from 0 to 1.

    >>> similarity("def area(r):", "def  Area(r):")
    1.0
    """
    one, two = _grams(normalized(first)), _grams(normalized(second))
    return len(one & two) / len(one | two)


def distinct_from(
    candidates: Iterable[T],
    items: Iterable[str],
    *,
    text: Callable[[T], str],
    limit: int | None = None,
) -> list[T]:
    """Return the first `limit` candidates that match no text of `items` and no earlier candidate.

    `text` returns a candidate's text. Words that all candidates, or all items, begin and end with
    are not compared: prompts from one template would otherwise all match each other, and would not
    match items of another template. The order is kept. Time grows with the number of texts that
    share 5-grams, not with the number of pairs.
    """
    pairs = [(candidate, normalized(text(candidate))) for candidate in candidates]
    normal_items = [normalized(item) for item in items]
    templates = [_shared_words([normal for _, normal in pairs]), _shared_words(normal_items)]
    index = _Index()
    for item in normal_items:
        index.add(_grams(_without(templates, item)))
    kept: list[T] = []
    for candidate, normal in pairs:
        if len(kept) == limit:
            break
        grams = _grams(_without(templates, normal))
        if not index.has_near_match(grams):
            index.add(grams)
            kept.append(candidate)
    return kept


class NearMatches(NamedTuple):
    """Numbers of texts and of items that match each other exactly or nearly."""

    texts: int
    items: int


def near_matches(texts: Sequence[str], items: Sequence[str]) -> NearMatches:
    """Count the texts that nearly match an item, and the items that a text nearly matches.

    Both may be rendered with a template. Whole words that all texts, or all items, begin and end
    with are therefore removed, from the texts and from the items alike. Equal prompts stay equal,
    and are always found. An item that differs from a text is only compared with it if the two
    share one of the text's rarest 5-grams, and at most 50 items have that 5-gram. This bounds the
    comparisons of a text, also if a template could not be removed. Other near matches are not
    found. Memory grows with the items only.
    """
    normal_texts, normal_items = ([normalized(text) for text in side] for side in (texts, items))
    templates = [_shared_words(normal_texts), _shared_words(normal_items)]
    index = _Index(max_items=_MAX_ITEMS)
    equal: dict[str, list[int]] = {}
    for number, item in enumerate(_without(templates, normal) for normal in normal_items):
        equal.setdefault(item, []).append(number)
        index.add(_grams(item))
    matching_texts, matched_items = 0, set[int]()
    known: dict[str, set[int]] = {}  # training data repeats prompts
    for text in (_without(templates, normal) for normal in normal_texts):
        if text not in known:
            known[text] = {*equal.get(text, ()), *index.near_matches(_grams(text))}
        matching_texts += bool(known[text])
        matched_items |= known[text]
    return NearMatches(matching_texts, len(matched_items))


def _shared_words(texts: list[str]) -> tuple[str, str]:
    """Return the whole words that all texts begin and end with."""
    before, after = _shared(texts)
    return before[: before.rfind(" ") + 1], after[after.find(" ") :] if " " in after else ""


def _without(templates: Sequence[tuple[str, str]], text: str) -> str:
    """Return a text without the longest beginning and the longest end that are a template's."""
    before = max((start for start, _ in templates if text.startswith(start)), key=len, default="")
    text = text.removeprefix(before)
    after = max((end for _, end in templates if text.endswith(end)), key=len, default="")
    return text.removesuffix(after)


class _Index:
    """Sets of 5-grams, found by their rarest members.

    Two sets with a similarity of at least t share more than a fraction t of each. So a match must
    contain one of the first n - ceil(t * n) + 1 grams of a set of n, in any fixed order (prefix
    filter, Chaudhuri et al. 2006). Grams that more than `max_items` sets have are not looked up.
    """

    def __init__(self, max_items: float = math.inf) -> None:
        self._max_items = max_items
        self._sets: list[frozenset[str]] = []
        self._by_gram: dict[str, list[int]] = {}

    def add(self, grams: frozenset[str]) -> None:
        number = len(self._sets)
        self._sets.append(grams)
        for gram in grams:
            self._by_gram.setdefault(gram, []).append(number)

    def has_near_match(self, grams: frozenset[str]) -> bool:
        return bool(self.near_matches(grams))

    def near_matches(self, grams: frozenset[str]) -> list[int]:
        """Return the numbers of the sets that nearly match, in the order of adding."""
        rarest = sorted(grams, key=lambda gram: (len(self._by_gram.get(gram, ())), gram))
        needed = int(_THRESHOLD * len(grams))
        near: set[int] = set()
        for gram in rarest[: len(grams) - needed + 1]:
            having = self._by_gram.get(gram, ())
            if len(having) > self._max_items:
                break  # so do all that follow
            near.update(having)
        return [
            number
            for number in sorted(near)
            if len(grams & self._sets[number]) >= _THRESHOLD * len(grams | self._sets[number])
        ]


def _shared(texts: list[str]) -> tuple[str, str]:
    """Return what all texts begin and end with; nothing for a single text."""
    if len(texts) < 2:
        return "", ""
    # Characters, not components of a path.
    before = os.path.commonprefix(texts)  # noqa: RUF071
    ends = [text.removeprefix(before)[::-1] for text in texts]
    return before, os.path.commonprefix(ends)[::-1]  # noqa: RUF071


def normalized(text: str) -> str:
    """Return a text with normalized case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _grams(text: str) -> frozenset[str]:
    """Return the character 5-grams of a text; a shorter text is one gram."""
    return frozenset(text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1)))
