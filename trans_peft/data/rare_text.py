"""Recognize texts that repeat rare parts of other texts, such as a name or a number of one row.

A language model that was trained on texts can repeat them (Carlini et al. 2021). A part that many
texts share tells nothing about one of them; a part of one text may be private.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

__all__ = ["RareText"]

_LENGTH = 16
_SHARED_BY = 3


class RareText:
    """The parts of 16 characters that occur in fewer than three of the texts.

    Case and white space are normalized. A text shorter than 16 characters is one part.

    >>> known = ["my card is 4929 1234 5678", "my card is lost today", "my card is blue and old"]
    >>> RareText(known).occurs_in("so my card is 4929 1234 5678?")
    True
    >>> RareText(known).occurs_in("my card is 5500 0000")
    False
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts = Counter(part for text in texts for part in set(_parts(text)))
        self._rare = {part for part, count in counts.items() if count < _SHARED_BY}

    def occurs_in(self, text: str) -> bool:
        """Whether a rare part occurs in the text."""
        return any(part in self._rare for part in _parts(text))


def _parts(text: str) -> Iterator[str]:
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return (normal[i : i + _LENGTH] for i in range(max(1, len(normal) - _LENGTH + 1)))
