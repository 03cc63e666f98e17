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
import re
from contextlib import suppress
from fractions import Fraction

from trans_peft.errors import DataError
from trans_peft.validation.rules.mathematics import equal

__all__ = ["paper_gsm8k", "paper_math"]

_MARKER = "The answer is: "
_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_TOLERANCE = 1e-4
_BRACKETS = str.maketrans("", "", "{}()")


def paper_gsm8k(answer: str, reference: str) -> float:
    """Return 100 if the first number after the last "The answer is: ", rounded, is the reference's.

    Or a hundredth of it, or a hundred times as much.
    """
    wanted = _rounded_number(reference)
    if wanted is None:
        raise DataError(f"no number stands after {_MARKER!r} in the reference", found=reference)
    given = _rounded_number(answer)
    return 100.0 if given is not None and _close(float(given), float(wanted)) else 0.0


def paper_math(answer: str, reference: str) -> float:
    """Return 100 if the text after the last "The answer is: " equals the reference's, loosely."""
    wanted = _final(reference)
    if not wanted:
        raise DataError(f"nothing stands after {_MARKER!r} in the reference", found=reference)
    given = _final(answer)
    if given is None:
        return 0.0
    with suppress(IndexError, ValueError):  # then as they are
        given, wanted = _normal_form(given), _normal_form(wanted)
    return 100.0 if given == wanted or _math_equal(given, wanted) else 0.0


def _rounded_number(text: str) -> int | None:
    _, found, rest = text.rpartition(_MARKER)
    number = _NUMBER.search(rest.strip()) if found else None
    if number is None:
        return None
    above, _, below = number.group().replace(",", "").partition("/")
    try:
        if below and int(below):
            return round(float(Fraction(int(above), int(below))))
        return round(float(above))
    except (OverflowError, ValueError):
        return None


def _final(text: str) -> str | None:
    _, found, rest = text.rpartition(_MARKER)
    return rest.split(".\n")[0].strip().removesuffix(".").strip() if found else None


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


def _normal_form(text: str) -> str:
    """Return the text as Hendrycks' MATH release compares it (`math_equivalence.strip_string`).

    Raises ValueError or IndexError where that code fails.
    """
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
        ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _with_braces(text, "\\sqrt", arguments=1).replace(" ", "")
    text = _with_braces(text, "\\frac", arguments=2)
    if text == "0.5":
        text = "\\frac{1}{2}"
    above, *below = text.split("/")
    if len(below) != 1:
        return text
    whole = int(above), int(below[0])
    return f"\\frac{{{whole[0]}}}{{{whole[1]}}}" if text == f"{whole[0]}/{whole[1]}" else text


def _with_braces(text: str, command: str, *, arguments: int) -> str:
    """Return the text with the command's one-character arguments in braces: \\sqrt3, \\frac12."""
    before, *parts = text.split(command)
    done = before
    for part in parts:
        done += command
        if part[0] == "{":
            done += part
        elif arguments == 1:
            done += f"{{{part[0]}}}{part[1:]}"
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            done += f"{{{part[0]}}}{part[1:]}"
        else:
            done += f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return done
