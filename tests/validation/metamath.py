"""MetaMath's scoring of GSM8K and MATH, restated from `eval_gsm8k.py`, `eval_math.py`, `util.py`.

The comparison of `util.is_equiv` is that of Hendrycks' MATH release (`math_equivalence.py`). An
output for which MetaMath's code raises an exception is wrong.
"""

import math
import re
import unicodedata
from fractions import Fraction

MARKER = "The answer is: "


def gsm8k(output, reference):
    """The rounded number after the last marker equals the reference's."""
    wanted = int(reference.split(MARKER)[-1].replace(",", ""))
    try:
        given = number(output)
        return given is not None and float(given) == float(wanted)
    except (OverflowError, ValueError, ZeroDivisionError):
        return False


def number(completion):
    """`extract_answer_number`."""
    parts = completion.split(MARKER)
    if len(parts) < 2:
        return None
    match = re.search(r"[\-+]?\d*[\.,/]?\d+", parts[-1].strip())
    if not match:
        return None
    if "/" in match.group():
        numerator, denominator = match.group().split("/")[:2]
        if not (_is_number(denominator) and _is_number(numerator)):
            return None
        if denominator == "0":
            return round(float(numerator.replace(",", "")))
        fraction = Fraction(match.group().replace(",", ""))
        return round(float(fraction.numerator / fraction.denominator))
    if float(match.group().replace(",", "")) == math.inf:
        return None
    return round(float(match.group().replace(",", "")))


def _is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        pass
    try:
        unicodedata.numeric(text)
        return True
    except (TypeError, ValueError):
        return False


def math_problem(output, reference):
    """`process_results`: the final answer has the normal form of the reference's."""
    given = final(output)
    return given is not None and is_equiv(given, reference.split(MARKER)[-1])


def final(completion):
    """The text after the last marker, up to a full stop at a line's end."""
    parts = completion.split(MARKER)
    if len(parts) < 2:
        return None
    answer = parts[-1].split(".\n")[0].strip()
    return answer.removesuffix(".").strip()


def is_equiv(first, second):
    """Whether two answers have the same normal form, or the same text if one has none."""
    try:
        return _normal_form(first) == _normal_form(second)
    except (AssertionError, IndexError, ValueError):
        return first == second


def _normal_form(text):
    """`strip_string`."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if "\\text{ " in text:
        splits = text.split("\\text{ ")
        assert len(splits) == 2
        text = splits[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    if len(text.split("=")) == 2 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = _sqrt_with_braces(text).replace(" ", "")
    text = _frac_with_braces(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _slash_as_frac(text)


def _sqrt_with_braces(text):
    before, *behind = text.split("\\sqrt")
    return before + "".join(
        "\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in behind
    )


def _frac_with_braces(text):
    before, *behind = text.split("\\frac")
    for part in behind:
        before += "\\frac"
        if part[0] == "{":
            before += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            before += "{" + part[0] + "}" + part[1:]
        else:
            before += "{" + part[0] + "}{" + part[1] + "}" + part[2:]
    return before


def _slash_as_frac(text):
    if len(text.split("/")) != 2:
        return text
    above, below = (int(part) for part in text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
