"""The process in which math-verify compares answers; `mathematics` starts it.

math-verify accepts some wrong answers: it treats a point or an interval as equal to a list of the
same numbers, a percentage as equal to the number before its sign, and all empty intervals as equal.
Here such pairs are unequal, or are compared by value.
"""

import logging
import re
from itertools import product
from typing import Any

from trans_peft.isolation.limited_process import serve
from trans_peft.validation.rules.notation import counts_words, plain

_MEMORY_BYTES = 4 * 2**30
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_WORDS = re.compile(r"(?<![\\A-Za-z{_^])[A-Za-z]{3,}|\b[ap]\.?m\b", re.I)
_CURRENCY = re.compile("\\\\[$]|[\u00a3\u00a5\u20a9\u20aa\u20ac\u20b9\u20bd]")
_RANGE = re.compile("\\d+\\s*[\u2012-\u2015]\\s*\\d+")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NOT_EQUAL = re.compile(r"\\neq?\b|\\not\s*=|\u2260")
_EMPTY = re.compile(r"\\(?:emptyset|varnothing)|\\\{\s*\\\}")


def main() -> None:
    """Compare pairs of an answer and its reference until standard input ends."""
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limit is off

    def equal(question: list[str]) -> bool:
        if not _may_agree(*question):
            return False
        answer, reference = map(_parsed, question)
        return any(_same(*pair) for pair in product(reference, answer))

    serve(equal, memory_bytes=_MEMORY_BYTES)


def _may_agree(answer: str, reference: str) -> bool:
    """Whether two final answers can agree by the parts of them that math-verify does not compare.

    If both have words ("5 minutes", "Alice: 3"), one of them must have all words of the other. If
    both have a currency sign, it must be the same. Both or neither must have a "not equal" sign.
    Ranges with a dash ("5\u20136") must be the same.
    """
    if bool(_NOT_EQUAL.search(answer)) != bool(_NOT_EQUAL.search(reference)):
        return False
    if _RANGE.findall(answer) != _RANGE.findall(reference):
        return False
    currencies = [set(_CURRENCY.findall(text)) for text in (answer, reference)]
    if all(currencies) and currencies[0] != currencies[1]:
        return False
    first, second = (
        {word.casefold().removesuffix("s") for word in _WORDS.findall(plain(text))}
        for text in (answer, reference)
    )
    return not (first and second) or first <= second or second <= first


def _same(reference: Any, answer: Any) -> bool:
    from math_verify import verify

    if not _comparable(_shape(reference), _shape(answer)):
        return False
    return bool(verify(reference, answer, timeout_seconds=None))


def _parsed(text: str) -> list[Any]:
    """Return what math-verify parses from a final answer.

    The answer is parsed as a formula, and also as text if it has words. Without dollar signs only
    the first number of a formula would be parsed. As a formula, "18 dollars" would be a product.
    """
    from math_verify import parse

    text = plain(text)
    read = parse(f"${text}$", parsing_timeout=None)
    if _WORD.search(text) and not counts_words(text) and len(_NUMBER.findall(text)) < 2:
        words = parse(text.replace("\\%", "%"), parsing_timeout=None)
        # Of a number with a percent sign, math-verify's text value is the number alone.
        read += [value for value in words if "%" not in text or not isinstance(value, str)]
    values = map(_with_percentages, read)
    return [value for value in values if not _is_empty(value) or _EMPTY.search(text)]


def _with_percentages(value: Any) -> Any:
    """Return the expression with 10 % as 1/10; math-verify leaves the factor 1/100 unevaluated."""
    from sympy import Basic, MatrixBase, Rational, UnevaluatedExpr

    if not isinstance(value, (Basic, MatrixBase)):
        return value
    percent = UnevaluatedExpr(Rational(1, 100))
    return value.xreplace({percent: Rational(1, 100)}) if value.has(percent) else value


def _is_empty(value: Any) -> bool:
    from sympy import S

    return value is S.EmptySet


def _shape(value: Any) -> Any:
    """Return the nesting of a value: unordered lists, ordered points and intervals, or neither.

    A list of one value has the shape of that value, an equation the shape of its right side.
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
