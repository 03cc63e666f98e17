"""Scoring rules for texts: exact match, BLEU, chrF, ROUGE-L, labels, regular expressions, JSON.

Each rule returns a score of 0 to 100 for an answer and its reference, and raises DataError for a
reference that no answer can match.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

from trans_peft.domain.bounds import MAX_PATTERN_LENGTH, MAX_REFERENCE_CHARACTERS
from trans_peft.domain.excerpts import excerpt
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.extras import explaining_missing_extras
from trans_peft.isolation.limited_process import LimitedProcess

if TYPE_CHECKING:
    from sacrebleu import BLEU, CHRF

__all__ = [
    "CPU_LIMIT_S",
    "bleu",
    "chrf",
    "exact_match",
    "json_equal",
    "label_f1",
    "regex",
    "rouge_l",
    "unmarked",
]

CPU_LIMIT_S = 5
"""Processor time in which a regular expression must have searched an answer and its reference."""

COMPILE_LIMIT_S = 1
"""Processor time in which a regular expression must have been compiled."""

_searches = LimitedProcess("trans_peft.validation.rules.regex_process")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")


def exact_match(answer: str, reference: str) -> float:
    """Return 100 if both are the same text apart from white space at both ends, else 0."""
    return 100.0 if answer.strip() == reference.strip() else 0.0


def unmarked(answer: str, reference: str) -> float:
    """Return NaN: a judge model marks the answers after all of them are written."""
    return math.nan


def bleu(answer: str, reference: str) -> float:
    """Return BLEU of one answer, 0 to 100: precision of its word n-grams, up to order 4.

    Source: K. Papineni et al., "BLEU: a method for automatic evaluation of machine translation",
    ACL 2002. Computed by sacrebleu as sentence BLEU: words as in WMT (`13a`), exponential
    smoothing, and no orders longer than the answer. The mean over answers is not corpus BLEU.
    """
    _check_length(reference)
    score = _bleu().sentence_score(answer, [reference])
    if not score.ref_len:
        raise DataError("the reference has no word for BLEU", found=excerpt(reference))
    return min(100.0, score.score)  # of equal texts, its floats give 100.00000000000004


def chrf(answer: str, reference: str) -> float:
    """Return chrF of one answer, 0 to 100: character n-grams up to order 6, recall weighted twice.

    Source: M. Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.
    Computed by sacrebleu: white space is removed, and orders longer than a text are left out.
    """
    _check_length(reference)
    if not reference.strip():
        raise DataError("the reference has no character for chrF", found=excerpt(reference))
    return _chrf().sentence_score(answer, [reference]).score


# Imported on first use: sacrebleu takes half a second.
@cache
def _bleu() -> "BLEU":
    with explaining_missing_extras():
        from sacrebleu import BLEU
    return BLEU(tokenize="13a", smooth_method="exp", effective_order=True)


@cache
def _chrf() -> "CHRF":
    with explaining_missing_extras():
        from sacrebleu import CHRF
    return CHRF(char_order=6, word_order=0, beta=2)


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L of one answer, 0 to 100: F1 of the longest common subsequence of words.

    Source: C.-Y. Lin, "ROUGE: a package for automatic evaluation of summaries", 2004. Equal to
    `rougeL` of the package rouge-score without a stemmer: words are runs of a-z and 0-9 in lower
    case. Use chrF for other alphabets. Decision 0135 says why rouge-score is not called.
    """
    with explaining_missing_extras():
        from rapidfuzz.distance import LCSseq
    _check_length(reference)
    actual, expected = (_ROUGE_WORD.findall(text.lower()) for text in (answer, reference))
    if not expected:
        raise DataError(
            "the reference has no word for ROUGE-L",
            expected="at least one run of the characters a-z and 0-9",
            found=excerpt(reference),
        )
    return 200.0 * LCSseq.similarity(actual, expected) / (len(actual) + len(expected))


def _check_length(reference: str) -> None:
    if len(reference) > MAX_REFERENCE_CHARACTERS:
        raise DataError(
            "the reference is too long for this scoring rule",
            expected=f"at most {MAX_REFERENCE_CHARACTERS} characters",
            found=f"{len(reference)} characters",
        )


def label_f1(answer: str, reference: str) -> float:
    """Return the F1, 0 to 100, of the labels in an answer against those in its reference.

    Commas and line breaks separate labels. Their order and repetitions do not count.
    """
    actual, expected = _labels(answer), _labels(reference)
    if not expected:
        raise DataError("the reference has no label", found=excerpt(reference))
    return 200.0 * len(actual & expected) / (len(actual) + len(expected))


def _labels(text: str) -> set[str]:
    return {label.strip() for label in re.split(r"[,\n]", text)} - {""}


def regex(pattern: str) -> Callable[[str, str], float]:
    """Return the rule that compares the pattern's first match in answer and reference.

    The first group of the matches is compared, or the whole matches if the pattern has no group.
    The pattern is compiled and searched in a child process. InvalidSpecError for a pattern that
    cannot be compiled or takes more than `COMPILE_LIMIT_S`. The rule raises EvaluationError if both
    searches together take more than `CPU_LIMIT_S`, as those of `(a+)+b` can.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        problem: object = f"{len(pattern)} characters, at most {MAX_PATTERN_LENGTH} are allowed"
    else:
        problem = _searches.call([pattern, []], cpu_limit_s=COMPILE_LIMIT_S)
        if problem is None:
            problem = f"compiling it takes more than {COMPILE_LIMIT_S} s of processor time"
    if isinstance(problem, str):
        raise InvalidSpecError(
            "the scoring rule's regular expression cannot be used",
            expected="regex:PATTERN, in the syntax of Python's re",
            found=f"{excerpt(pattern)}: {problem}",
        )

    def same_match(answer: str, reference: str) -> float:
        found = _searches.call([pattern, [reference, answer]], cpu_limit_s=CPU_LIMIT_S)
        if not isinstance(found, list):
            raise EvaluationError(
                f"the search for the scoring rule's regular expression {excerpt(pattern)} takes "
                "too long",
                expected=f"at most {CPU_LIMIT_S} s of processor time for an answer",
                found=f"more for the answer {excerpt(answer)}",
                do="write it without repetitions inside repetitions, such as (a+)+",
            )
        expected, actual = found
        if expected is None:
            raise DataError(
                f"the reference does not match {excerpt(pattern)}", found=excerpt(reference)
            )
        return 100.0 if actual == expected else 0.0

    return same_match


def json_equal(answer: str, reference: str) -> float:
    """Return 100 if both are JSON with equal values, else 0.

    The order of keys and white space do not count. 1 and 1.0 are equal, true and 1 are not. An
    answer with NaN, a repeated key or other text around the JSON is wrong.
    """
    try:
        expected = _typed(_json(reference))
    except (ValueError, ArithmeticError) as error:
        raise DataError(
            "the reference is not JSON", found=f"{excerpt(reference)}: {error}"
        ) from error
    try:
        return 100.0 if _typed(_json(answer)) == expected else 0.0
    except (ValueError, ArithmeticError):
        return 0.0


def _json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an object has a repeated key")
        return dict(pairs)

    # A float would round: 1e999 and 1e400 are both infinite, and 0.1 has more than one spelling.
    return parse_json(text, parse_constant=refuse, parse_float=Decimal, object_pairs_hook=once)


def _typed(value: Any) -> Any:
    """Return a copy of the value in which true and 1 are not equal."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return [_typed(item) for item in value] if isinstance(value, list) else value
