"""MetaMath's scoring of GSM8K and MATH (`eval_gsm8k.py`, `eval_math.py` and `util.py`).

GSM8K: the first number after the last "The answer is: ", rounded to an integer, must equal the
reference's. MATH: the text after it, up to a full stop at the end of a line, must have the same
normal form as the reference's; the normal form is that of Hendrycks' MATH release
(`math_equivalence.py`).

An answer for which MetaMath's code raises an exception ("1/00") is wrong.
"""

import math
import re
import unicodedata
from fractions import Fraction

from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import DataError

__all__ = [
    "MARKER",
    "final_answer",
    "metamath_gsm8k",
    "metamath_math",
    "normal_form",
    "rounded_number",
]

MARKER = "The answer is: "
_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


def metamath_gsm8k(answer: str, reference: str) -> float:
    """Return 100 if the answer's number, rounded, equals the reference's integer, else 0."""
    _, found, rest = reference.rpartition(MARKER)
    try:
        expected = float(int(rest.replace(",", ""))) if found else None
    except (OverflowError, ValueError):
        expected = None
    if expected is None:
        raise DataError(f"the reference has no integer after {MARKER!r}", found=excerpt(reference))
    actual = rounded_number(answer)
    return 100.0 if actual is not None and float(actual) == expected else 0.0


def metamath_math(answer: str, reference: str) -> float:
    """Return 100 if the answer has the reference's normal form, else 0.

    If one of them has no normal form, the texts are compared.
    """
    _, _, expected = reference.rpartition(MARKER)
    if MARKER not in reference or not expected.strip():
        raise DataError(f"the reference has no text after {MARKER!r}", found=excerpt(reference))
    actual = final_answer(answer)
    if actual is None:
        return 0.0
    try:
        return 100.0 if normal_form(actual) == normal_form(expected) else 0.0
    except (IndexError, ValueError):
        return 100.0 if actual == expected else 0.0


def rounded_number(text: str) -> int | None:
    """Return the first number after the last marker, rounded half to even.

    None if there is no such number, or if MetaMath's code raises an exception.
    """
    _, found, rest = text.rpartition(MARKER)
    number = _NUMBER.search(rest.strip()) if found else None
    if number is None:
        return None
    above, slash, below = number.group().replace(",", "").partition("/")
    try:
        if not slash:
            return None if float(above) == math.inf else round(float(above))
        if not (_is_number(above) and _is_number(below)):
            return None
        if below == "0":
            return round(float(above))
        fraction = Fraction(number.group())
        return round(fraction.numerator / fraction.denominator)
    except (OverflowError, ValueError, ZeroDivisionError):
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return len(text) == 1 and unicodedata.numeric(text, None) is not None
    return True


def final_answer(text: str) -> str | None:
    """Return the text after the last marker, up to a full stop at a line's end, or None."""
    _, found, rest = text.rpartition(MARKER)
    return rest.split(".\n")[0].strip().removesuffix(".").strip() if found else None


def normal_form(text: str) -> str:
    """Return the normal form of Hendrycks' MATH release (`math_equivalence.strip_string`).

    Raises ValueError or IndexError if that code fails.
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
    """Return the text with one-character arguments of a command in braces (\\sqrt3, \\frac12)."""
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
