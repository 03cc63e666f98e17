"""The process in which math-verify compares answers; started by `mathematics`."""

import logging
import re
import resource
from contextlib import suppress
from typing import Any

from trans_peft.validation.rules.limited import serve

_MEMORY_BYTES = 4 * 2**30
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")


def main() -> None:
    """Answer questions, each an answer and its reference, until there are no more."""
    logging.disable(logging.CRITICAL)  # math-verify warns that nothing would limit its time
    from math_verify import verify

    with suppress(OSError, ValueError):  # not every system limits it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))

    def equal(question: list[str]) -> bool:
        answer, reference = map(_parsed, question)
        return bool(verify(reference, answer, timeout_seconds=None))

    serve(equal)


def _parsed(text: str) -> list[Any]:
    """Return what math-verify reads in a final answer: as a formula, and if it has words, as text.

    A formula without dollar signs would be read as its first number; a number with its unit
    ("18 dollars") would be read as a product of letters.
    """
    from math_verify import parse

    read = parse(f"${text}$", parsing_timeout=None)
    return read + parse(text, parsing_timeout=None) if _WORD.search(text) else read


if __name__ == "__main__":
    main()
