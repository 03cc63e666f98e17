"""Recognize texts that repeat rare parts of other texts, such as a name or a number of one row.

A language model that was trained on texts can repeat them (Carlini et al. 2021). A part that many
texts share does not identify one of them; a part of one text may be private.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate

from trans_peft.data.overlap import normalized

__all__ = ["SHARED_BY", "RareText"]

SHARED_BY = 3
"""A part that this many texts have is not rare."""

_LENGTH = 24
_IDENTIFIER = re.compile(r"[\w.+-]*[\d@][\w.@+-]*")
_NUMBERS = re.compile(r"\d+(?:(?:,(?=\d)|[ .()/'\u2019_\-\u2010-\u2015]){0,3}\d+)*")
"""Groups of digits that may be one number, or numbers beside each other. A list has a comma and a
space between its numbers."""
_LEAST = 6  # characters of an identifier, or digits of a number
_MOST_GROUPS = 8  # of digits in a number


class RareText:
    """The parts of texts that occur in fewer than three of them.

    A part is a run of 24 characters, a shorter whole text, a number of six or more digits in any
    grouping, also beside other numbers, or a word of six or more characters with a digit or an @.
    Case and white space are normalized, and characters without a width are ignored.

    >>> known = ["my card is 4929-1234", "my card is lost today", "my card is blue and old"]
    >>> RareText(known).occurs_in("the number 4929-1234, please")
    True
    >>> RareText(known).occurs_in("my card is lost and gone")
    False
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts = Counter(part for text in texts for part in _parts(text))
        self._rare = {part for part, count in counts.items() if count < SHARED_BY}

    def occurs_in(self, text: str) -> bool:
        """Whether a rare part occurs in the text."""
        return not self._rare.isdisjoint(_parts(text))


def _parts(text: str) -> set[str]:
    normal = "".join(char for char in normalized(text) if unicodedata.category(char) != "Cf")
    runs = {normal[i : i + _LENGTH] for i in range(max(1, len(normal) - _LENGTH + 1))}
    words = {word.strip(".-+") for word in _IDENTIFIER.findall(normal)}
    numbers = {number for found in _NUMBERS.findall(normal) for number in _joined(found)}
    return runs | numbers | {word for word in words if len(word) >= _LEAST}


def _joined(numbers: str) -> Iterator[str]:
    """Yield each run of up to eight groups of digits as one number of at least six digits."""
    groups = re.findall(r"\d+", numbers)
    for first in range(len(groups)):
        for number in accumulate(groups[first : first + _MOST_GROUPS]):
            if len(number) >= _LEAST:
                yield number
