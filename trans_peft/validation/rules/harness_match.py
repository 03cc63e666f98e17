"""The metric exact_match of lm-evaluation-harness, behind the filters of a task.

    harness_match:{"filter": [{"function": "regex", "regex_pattern": "#### (-?[0-9]+)"}],
                   "regexes_to_ignore": [","], "ignore_case": true}

Filters and options have the names and the effects that they have in the harness. Pinning a suite
with a task of the harness writes this rule (`trans_peft.validation.harness_rows`). Filters and
regular expressions run in a child process, `harness_match_process`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trans_peft.domain.bounds import MAX_PATTERN_LENGTH
from trans_peft.domain.excerpts import excerpt
from trans_peft.domain.field_checks import is_whole
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.isolation.limited_process import LimitedProcess
from trans_peft.validation.rules.text import COMPILE_LIMIT_S, CPU_LIMIT_S

__all__ = ["harness_match", "settings_problems"]

_matches = LimitedProcess("trans_peft.validation.rules.harness_match_process")

_FILTERS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "regex": {
        "regex_pattern": lambda value: _is_pattern(value),
        "group_select": is_whole,
        "fallback": lambda value: isinstance(value, str),
    },
    "remove_whitespace": {},
    "lowercase": {},
    "uppercase": {},
}
"""The filters, and the check of each of their settings."""

_SWITCHES = ("ignore_case", "ignore_punctuation", "ignore_numbers")


def harness_match(parameter: str) -> Callable[[str, str], float]:
    """Return the rule with these settings, a JSON object.

    A reference is a JSON list of texts. An answer is right if it equals one of them.
    InvalidSpecError for settings that are not supported, or a pattern that cannot be compiled
    within `COMPILE_LIMIT_S`. The rule raises EvaluationError if an answer takes more than
    `CPU_LIMIT_S`.
    """
    try:
        settings = parse_json(parameter)
    except ValueError as error:
        raise _refused(parameter, f"no JSON: {error}") from error
    problems = [*settings_problems(settings)]
    if not problems:
        found = _matches.call([settings, "", []], cpu_limit_s=COMPILE_LIMIT_S)
        if found is None:
            problems = [f"compiling its patterns takes more than {COMPILE_LIMIT_S} s"]
        elif isinstance(found, str):
            problems = [found]
    if problems:
        raise _refused(parameter, "; ".join(problems))

    def is_match(answer: str, reference: str) -> float:
        found = _matches.call([settings, answer, _texts(reference)], cpu_limit_s=CPU_LIMIT_S)
        if not isinstance(found, bool):
            raise EvaluationError(
                "the regular expressions of a task of lm-evaluation-harness take too long",
                expected=f"at most {CPU_LIMIT_S} s of processor time for an answer",
                found=f"more for the answer {excerpt(answer)}",
                do="judge by another task, or by another metric or filter of this one",
            )
        return 100.0 if found else 0.0

    return is_match


def settings_problems(settings: Any) -> Iterator[str]:
    """Yield why settings are not supported."""
    if not isinstance(settings, dict):
        yield "the settings are no object"
        return
    for name, value in settings.items():
        if name == "filter" and isinstance(value, list):
            for step in value:
                yield from _filter_problems(step)
        elif name == "regexes_to_ignore" and isinstance(value, list):
            yield from (f"no pattern: {excerpt(one)}" for one in value if not _is_pattern(one))
        elif name not in _SWITCHES or not isinstance(value, bool):
            yield f"{excerpt(name)} with the value {excerpt(str(value))} is not supported"


def _filter_problems(step: Any) -> Iterator[str]:
    function = step.get("function") if isinstance(step, dict) else None
    checks = _FILTERS.get(function) if isinstance(function, str) else None
    if checks is None:
        yield f"the filter {excerpt(str(step))} is not one of {', '.join(_FILTERS)}"
        return
    for name, value in step.items():
        if name != "function" and not (name in checks and checks[name](value)):
            yield f"the filter {function}: {excerpt(name)} may not be {excerpt(str(value))}"


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_PATTERN_LENGTH


def _texts(reference: str) -> list[str]:
    try:
        texts = json.loads(reference)
    except ValueError:
        texts = None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(
            "the reference is not valid for the scoring rule harness_match",
            expected="a JSON list of the texts of right answers",
            found=excerpt(reference),
        )
    return texts


def _refused(parameter: str, problem: str) -> InvalidSpecError:
    return InvalidSpecError(
        "the settings of the scoring rule harness_match cannot be used",
        expected="a JSON object with filter, regexes_to_ignore, "
        f"{', '.join(_SWITCHES)}; filters: {', '.join(_FILTERS)}",
        found=f"{excerpt(parameter)}: {problem}",
    )
