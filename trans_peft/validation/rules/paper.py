"""How the paper's own code marks GSM8K and MATH (gccnlp/Trans-PEFT @f4a065f, `math_infer`).

It reads answers as MetaMath does and compares them more loosely than math-verify: numbers within a
ten-thousandth, and also a hundred times too large or too small; GSM8K's after rounding to whole
numbers. The comparison itself (`grader.math_equal`) is not in the authors' repository; it is that
of microsoft/ToRA, which others restate alike.

Where this differs: what is neither number, interval nor the same normal form is compared by
math-verify, while `math_equal` evaluates a model's answer as Python. And an answer whose
normalisation fails ("x/y") is wrong unless it is the same text, as in MetaMath's own code; the
authors' compares it with itself there, which makes it right whatever the reference.
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
    """Return 100 if the first number after the last "The answer is: ", rounded, is the reference's.

    Or a hundredth of it, or a hundred times as much.
    """
    wanted = rounded_number(reference)
    if wanted is None:
        raise DataError(
            f"no number stands after {MARKER!r} in the reference", found=excerpt(reference)
        )
    given = rounded_number(answer)
    return 100.0 if given is not None and _close(float(given), float(wanted)) else 0.0


def paper_math(answer: str, reference: str) -> float:
    """Return 100 if the text after the last "The answer is: " equals the reference's, loosely."""
    wanted = final_answer(reference)
    if not wanted:
        raise DataError(
            f"nothing stands after {MARKER!r} in the reference", found=excerpt(reference)
        )
    given = final_answer(answer)
    if given is None:
        return 0.0
    with suppress(IndexError, ValueError):  # then as they are
        given, wanted = normal_form(given), normal_form(wanted)
    return 100.0 if given == wanted or _math_equal(given, wanted) else 0.0


def _close(given: float, wanted: float) -> bool:
    return any(
        math.isclose(wanted * factor, given, rel_tol=_TOLERANCE) for factor in (0.01, 1, 100)
    )


def _math_equal(given: str, wanted: str) -> bool:
    numbers = _number(given), _number(wanted)
    if numbers[0] is not None and numbers[1] is not None:
        return _close(numbers[0], numbers[1])
    if not given:
        return False
    stripped = [given, wanted]
    if (given[0], given[-1], wanted[0]) not in {("[", "]", "("), ("(", ")", "[")} and (
        given[0] + given[-1] in ("[]", "()")
    ):
        stripped = [text.strip("[]()") for text in stripped]
    first, second = (text.translate(_BRACKETS) for text in stripped)
    if first == second:
        return True
    ends = given[0] + given[-1]
    if ends in ("()", "[]", "(]", "[)") and ends == wanted[0] + wanted[-1]:
        pairs = given[1:-1].split(","), wanted[1:-1].split(",")
        if len(pairs[0]) == len(pairs[1]) and all(map(_math_equal, *pairs)):
            return True
    return equal(given, wanted)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
