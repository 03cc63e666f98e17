"""The process that filters and compares answers; `harness_match` starts it.

Restates `lm_eval.filters` and `exact_match` of `lm_eval.api.metrics` (lm-evaluation-harness 0.4),
so that a worker needs no harness.
"""

import re
import string
from collections.abc import Mapping
from typing import Any

from trans_peft.isolation.limited_process import serve

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


def main() -> None:
    """Compare answers until standard input ends.

    A question is the settings, an answer and the texts of right answers. The result is whether the
    answer is one of them. If a pattern cannot be compiled, it is the error's text.
    """

    def match(question: tuple[Mapping[str, Any], str, list[str]]) -> bool | str:
        settings, answer, right = question
        try:
            for step in settings.get("filter", []):
                answer = filtered(answer, step)
            found = compared(answer, settings)
        except (re.error, OverflowError, RecursionError) as error:
            return str(error)
        return found in [compared(text, settings) for text in right]

    serve(match)


def filtered(text: str, step: Mapping[str, Any]) -> str:
    """Return what a filter makes of a text."""
    match step["function"]:
        case "regex":
            return _extracted(text, step)
        case "remove_whitespace":
            return text.strip()
        case "lowercase":
            return text.lower()
        case _:
            return text.upper()


def _extracted(text: str, step: Mapping[str, Any]) -> str:
    """Return the selected match: its first group that is not empty, or the whole match."""
    fallback = str(step.get("fallback", "[invalid]"))
    found = re.findall(step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"), text)
    try:
        match = found[step.get("group_select", 0)]
    except IndexError:
        return fallback
    if isinstance(match, tuple):
        match = next(filter(None, match), fallback)
    return str(match.strip())


def compared(text: str, settings: Mapping[str, Any]) -> str:
    """Return the part of a text that exact_match compares."""
    for pattern in settings.get("regexes_to_ignore", []):
        text = re.sub(pattern, "", text)
    if settings.get("ignore_case"):
        text = text.lower()
    if settings.get("ignore_punctuation"):
        text = text.translate(_PUNCTUATION)
    if settings.get("ignore_numbers"):
        text = text.translate(_DIGITS)
    return text


if __name__ == "__main__":
    main()
