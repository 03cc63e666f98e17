"""The process in which math-verify compares answers; started by `mathematics`.

math-verify marks some wrong answers right: it compares a point or an interval with a list of the
same numbers, a percentage with the number in front of its sign, and intervals that hold no number
with each other. Such pairs are not compared here, or by their value.
"""

import logging
import re
from itertools import product
from typing import Any

from trans_peft.isolation.limited import serve
from trans_peft.validation.rules.notation import counts_words, plain

_MEMORY_BYTES = 4 * 2**30
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_EMPTY = re.compile(r"\\(?:emptyset|varnothing)|\\\{\s*\\\}")


def main() -> None:
    """Answer questions, each an answer and its reference, until there are no more."""
    logging.disable(logging.CRITICAL)  # math-verify warns that nothing would limit its time

    def equal(question: list[str]) -> bool:
        answer, reference = map(_parsed, question)
        return any(_same(*pair) for pair in product(reference, answer))

    serve(equal, memory_bytes=_MEMORY_BYTES)


def _same(reference: Any, answer: Any) -> bool:
    from math_verify import verify

    if not _comparable(_shape(reference), _shape(answer)):
        return False
    return bool(verify(reference, answer, timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    """Return what math-verify reads in a final answer: as a formula, and if it has words, as text.

    A formula without dollar signs would be read as its first number; a number with its unit
    ("18 dollars") would be read as a product of letters.
    """
    from math_verify import parse

    text = plain(text)
    read = parse(f"${text}$", parsing_timeout=None)
    if _WORD.search(text) and not counts_words(text):
        words = parse(text.replace("\\%", "%"), parsing_timeout=None)
        # The text that math-verify keeps of a number with a percent sign is the number alone.
        read += [value for value in words if "%" not in text or not isinstance(value, str)]
    values = map(_with_percentages, read)
    return [value for value in values if not _is_empty(value) or _EMPTY.search(text)]


def _with_percentages(value: Any) -> Any:
    """Return an expression in which 10 % is a tenth: math-verify keeps the hundredth apart."""
    from sympy import Basic, MatrixBase, Rational, UnevaluatedExpr

    if not isinstance(value, (Basic, MatrixBase)):
        return value
    percent = UnevaluatedExpr(Rational(1, 100))
    return value.xreplace({percent: Rational(1, 100)}) if value.has(percent) else value


def _is_empty(value: Any) -> bool:
    from sympy import S

    return value is S.EmptySet


def _shape(value: Any) -> Any:
    """Return how a value is made of others: a list in any order, a point or interval, or neither.

    A list of one is that one; of an equation the right side counts.
    """
    from sympy import Eq, FiniteSet, Interval, Tuple

    if isinstance(value, Eq):
        return _shape(value.rhs)
    if isinstance(value, FiniteSet):
        if any(isinstance(part, Eq) for part in value.args):
            return None  # x = 3, y = 4 may also be the point (3, 4)
        shapes = [_shape(part) for part in value.args]
        return shapes[0] if len(shapes) == 1 else ("list", sorted(shapes, key=repr))
    if isinstance(value, Interval):
        return ("ordered", [None, None])
    if isinstance(value, Tuple):
        return ("ordered", [_shape(part) for part in value.args])
    return None


def _comparable(first: Any, second: Any) -> bool:
    return first is None or second is None or first == second


if __name__ == "__main__":
    main()
