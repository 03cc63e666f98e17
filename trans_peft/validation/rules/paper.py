"""The paper's scoring of GSM8K and MATH (gccnlp/Trans-PEFT @f4a065f, `math_infer`).

Answers are parsed as in MetaMath and compared more loosely than with math-verify: numbers are equal
within a relative difference of 1e-4, and also if one is a hundred times the other. Numbers of GSM8K
are rounded to integers first. The comparison (`grader.math_equal`) is missing in the authors'
repository; this is the one of microsoft/ToRA.

Two differences from the authors' code:

- Answers that are neither numbers nor intervals and differ in their normal form are compared by
  math-verify, because `math_equal` evaluates the model's answer as Python.
- An answer without a normal form ("x/y") is wrong unless the texts are equal, as in MetaMath. The
  authors' code compares it with itself, so it is always right there.
"""

import math
from contextlib import suppress

from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import DataError
from trans_peft.validation.rules.mathematics import equal
from trans_peft.validation.rules.metamath import (
    MARKER,
    final_answer,
    normal_form,
    rounded_number,
)

__all__ = ["paper_gsm8k", "paper_math"]

_TOLERANCE = 1e-4
_BRACKETS = str.maketrans("", "", "{}()")


def paper_gsm8k(answer: str, reference: str) -> float:
    """Return 100 if the rounded number after "The answer is: " equals the reference's, else 0.

    A hundredth of the reference, and a hundred times the reference, count as equal.
    """
    expected = rounded_number(reference)
    if expected is None:
        raise DataError(f"the reference has no number after {MARKER!r}", found=excerpt(reference))
    actual = rounded_number(answer)
    return 100.0 if actual is not None and _close(float(actual), float(expected)) else 0.0


def paper_math(answer: str, reference: str) -> float:
    """Return 100 if the text after the last "The answer is: " equals the reference's, else 0."""
    expected = final_answer(reference)
    if not expected:
        raise DataError(f"the reference has no text after {MARKER!r}", found=excerpt(reference))
    actual = final_answer(answer)
    if actual is None:
        return 0.0
    with suppress(IndexError, ValueError):  # without a normal form, the texts are compared
        actual, expected = normal_form(actual), normal_form(expected)
    return 100.0 if actual == expected or _math_equal(actual, expected) else 0.0


def _close(actual: float, expected: float) -> bool:
    return any(
        math.isclose(expected * factor, actual, rel_tol=_TOLERANCE) for factor in (0.01, 1, 100)
    )


def _math_equal(actual: str, expected: str) -> bool:
    numbers = _number(actual), _number(expected)
    if numbers[0] is not None and numbers[1] is not None:
        return _close(numbers[0], numbers[1])
    if not actual:
        return False
    stripped = [actual, expected]
    if (actual[0], actual[-1], expected[0]) not in {("[", "]", "("), ("(", ")", "[")} and (
        actual[0] + actual[-1] in ("[]", "()")
    ):
        stripped = [text.strip("[]()") for text in stripped]
    first, second = (text.translate(_BRACKETS) for text in stripped)
    if first == second:
        return True
    ends = actual[0] + actual[-1]
    if ends in ("()", "[]", "(]", "[)") and ends == expected[0] + expected[-1]:
        pairs = actual[1:-1].split(","), expected[1:-1].split(",")
        if len(pairs[0]) == len(pairs[1]) and all(map(_math_equal, *pairs)):
            return True
    return equal(actual, expected)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
