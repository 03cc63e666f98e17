"""Rewrite the numbers of a final answer in a notation that a LaTeX parser reads correctly.

A formula parser reads "1,234/1" as the list 1 and 234/1, ignores digits of other scripts, and reads
"10 thousand" as 10 with a unit. `plain` rewrites such numbers:

- digits, signs, separators and fractions of other scripts as ASCII or LaTeX (Arabic-Indic digits,
  full-width ones, one half as one character, the minus sign);
- thousands without separators, also inside a formula ("1,234/1", "1{,}234"), but not between
  brackets, where a comma separates ("(1,234)" is a point);
- currency signs and bold type left out, "1e3" as 1000, "3 1/2" as 3 and one half;
- "percent" as a percent sign, "thousand", "million" and "dozen" multiplied out, "minus" as a sign.
"""

import re
import unicodedata
from decimal import Decimal

__all__ = ["counts_words", "plain"]

_CURRENCIES = "\u00a3\u00a5\u20a9\u20aa\u20ac\u20b9\u20bd"
_SIGNS = {
    "\u066a": "%",  # Arabic percent sign
    "\u066b": ".",  # Arabic decimal separator
    "\u066c": ",",  # Arabic thousands separator
    "\u060c": ",",  # Arabic comma
    "\u2212": "-",  # minus sign
    "\u2044": "/",  # fraction slash
    "\u2215": "/",  # division slash
    "\u22c5": "\\cdot ",
    "\u00b7": "\\cdot ",
    "\u2030": "/1000",  # per mille
    "\u2031": "/10000",  # per ten thousand
    "\u221e": "\\infty ",
}
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\ufe63"
_DASH_AS_SIGN = re.compile(rf"(^|[(\[,=$+*/]\s*)[{_DASHES}](?=\s*[\d.\\$])")
_NARROW_SPACE_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:[\u00a0\u202f\u2009]|\\,)(?=\d{3}(?!\d))")
_BOLD = re.compile(r"\*\*(?=\S)([^*]+)(?<=\S)\*\*")
_EXPONENT = re.compile(r"(?<![\w.\\])(\d{1,20}(?:\.\d{1,20})?)[eE]([-+]?\d{1,2})(?![\w.])")
_MIXED_NUMBER = re.compile(r"(?<![\d.,/^_{\\])(\d+)\s+(\d+)/(\d+)(?![\d./])")
_ROOT = re.compile("\u221a\\s*(\\d+|[A-Za-z])")
_SAFE_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_IN_TEXT = r"\s*(?:\\(?:text|textnormal|mathrm|mbox)\{\s*)?"
_PERCENT = re.compile(rf"(?<=[\d}}]){_IN_TEXT}(?:per\s?cent|percentage|pct)\b\.?\s*\}}?", re.I)
_PERCENT_IN_TEXT = re.compile(r"\\(?:text|textnormal|mathrm|mbox)\{\s*\\?%\s*\}")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    rf"(?<![\d.,\\])(\d+(?:\.\d+)?){_IN_TEXT}({'|'.join(_SCALES)}|dozen)s?\b(?![-\s]*\d)", re.I
)
_MINUS = re.compile(r"^\s*(?:minus|negative)\s+(?=[\d.\\$])", re.I)
_COUNTING = re.compile(
    r"\b(?:hundreds?|thousands?|millions?|billions?|trillions?|dozens?|scores? of|half|halves|"
    r"thirds?|quarters?|fourths?|fifths?|tenths?|twice|thrice|double|triple|times|minus|negative|"
    r"plus|of|between|over|under|above|below|least|most|squared|cubed|factorial|than|not|no|root|power|percent|divided|multiplied)\b",
    re.I,
)


def plain(text: str) -> str:
    """Return a final answer with its numbers in ASCII digits, without thousands separators."""
    text = _ROOT.sub(r"\\sqrt{\1}", "".join(map(_in_latex, _mixed(_BOLD.sub(r"\1", text)))))
    text = _NARROW_SPACE_BETWEEN_DIGITS.sub("", _DASH_AS_SIGN.sub(r"\1-", text))
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", _EXPONENT.sub(_written_out, text))
    text = _without_thousands(_SAFE_SEPARATOR.sub("", text))
    text = _PERCENT_IN_TEXT.sub(r"\\%", _PERCENT.sub(r"\\% ", text))
    return _MINUS.sub("-", _SCALE.sub(_multiplied, text))


def counts_words(text: str) -> bool:
    """Return whether a word changes the value of a number: "half of 10" is not 10."""
    return bool(_COUNTING.search(text))


def _mixed(text: str) -> str:
    """Return the text with each run of superscript digits as one exponent."""
    return re.sub(
        "[\u207b\u00b9\u00b2\u00b3\u2070-\u2079]+",
        lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}",
        text,
    )


def _in_latex(sign: str) -> str:
    if sign.isascii():
        return sign
    if sign in _CURRENCIES:
        return ""
    if sign in _SIGNS:
        return _SIGNS[sign]
    if unicodedata.category(sign) == "Nd":
        return str(unicodedata.decimal(sign))
    if "\uff01" <= sign <= "\uff5e":  # full width
        return chr(ord(sign) - 0xFEE0)
    above, slash, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
    if slash and above.isdecimal() and below.isdecimal():
        return f"\\frac{{{above}}}{{{below}}}"
    return sign


def _without_thousands(text: str) -> str:
    """Remove thousands separators, except inside ( ), [ ] and \\{ \\}."""
    depth, parts, start = 0, list[str](), 0
    for found in re.finditer(r"\\?[()\[\]{}]", text):
        opening, closing = found[0] in ("(", "[", "\\{"), found[0] in (")", "]", "\\}")
        if not opening and not closing:
            continue
        stretch = text[start : found.start()]
        parts += [stretch if depth else _THOUSANDS.sub(_joined, stretch), found[0]]
        depth, start = max(0, depth + opening - closing), found.end()
    return "".join([*parts, text[start:] if depth else _THOUSANDS.sub(_joined, text[start:])])


def _joined(found: re.Match[str]) -> str:
    return found[0].replace(",", "")


def _written_out(found: re.Match[str]) -> str:
    return f"{Decimal(found[1]).scaleb(int(found[2])):f}"


def _multiplied(found: re.Match[str]) -> str:
    number, scale = Decimal(found[1]), found[2].lower()
    value = number * 12 if scale == "dozen" else number.scaleb(_SCALES[scale])
    opened = found[0].count("{") - found[0].count("}")
    return f"{value.normalize():f}" + ("\\text{" if opened else " ")
