"""The table of scoring rules, which decide whether an answer is right.

A rule returns a score of 0 to 100 for an answer and its reference. With the suite's `threshold`, an
answer with at least that score is right. A graded rule without a threshold gives each item a
degree, and the gate compares means. Exact rules return only 0 and 100.

A suite names a rule, and after a colon the rule's parameter: `exact_match`, `regex:true|false`.
Both are part of the suite's hash. A rule whose scores change gets a new name, or another
value in `_SCORING_REVISIONS` of `trans_peft.domain.evaluation`, which is part of the hash too. To
add a rule, add a row to `RULES`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from trans_peft.domain.evaluation import Suite
from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.rules.entry_point import entry_point
from trans_peft.validation.rules.harness_match import harness_match
from trans_peft.validation.rules.mathematics import math_verify
from trans_peft.validation.rules.metamath import metamath_gsm8k, metamath_math
from trans_peft.validation.rules.multiple_choice import chosen
from trans_peft.validation.rules.paper import paper_gsm8k, paper_math
from trans_peft.validation.rules.program import code
from trans_peft.validation.rules.text import (
    bleu,
    chrf,
    exact_match,
    json_equal,
    label_f1,
    regex,
    rouge_l,
    unmarked,
)

__all__ = ["RULES", "Rule", "Score", "make_scorer"]

Score = Callable[[str, str], float]
"""`score(answer, reference)`, 0 to 100; DataError for a reference that no answer can match."""


@dataclass(frozen=True)
class Rule:
    """A scoring rule and its parameter.

    Attributes:
        bind: returns the rule for the parameter after the colon ("" without one).
        takes: describes that parameter; empty for a rule without one.
        may_omit_parameter: whether the parameter may be omitted.
        is_graded: whether the suite may have a threshold.
        runs_programs: whether `bind` also takes the sandbox guards that the worker may lack.
        is_literal: whether a right answer is the text of the reference, apart from white space
            around it. `prepare` then refuses references that decoding cannot produce.
    """

    bind: Callable[..., Score]
    takes: str = ""
    may_omit_parameter: bool = False
    is_graded: bool = False
    runs_programs: bool = False
    is_literal: bool = False


def _without_parameter(score: Score, *, is_graded: bool = False, is_literal: bool = False) -> Rule:
    return Rule(lambda _: score, is_graded=is_graded, is_literal=is_literal)


RULES: Mapping[str, Rule] = {
    "exact_match": _without_parameter(exact_match, is_literal=True),
    "regex": Rule(regex, takes="PATTERN"),
    "json_equal": _without_parameter(json_equal),
    "choice": Rule(chosen, takes="per_token or per_character", may_omit_parameter=True),
    "math_verify": Rule(math_verify, takes="MARKER", may_omit_parameter=True),
    "metamath_gsm8k": _without_parameter(metamath_gsm8k),
    "metamath_math": _without_parameter(metamath_math),
    "paper_gsm8k": _without_parameter(paper_gsm8k),
    "paper_math": _without_parameter(paper_math),
    "code": Rule(code, takes="pythonX.Y", runs_programs=True),
    "python": Rule(entry_point, takes="NAME==VERSION"),
    "bleu": _without_parameter(bleu, is_graded=True),
    "chrf": _without_parameter(chrf, is_graded=True),
    "rouge_l": _without_parameter(rouge_l, is_graded=True),
    "label_f1": _without_parameter(label_f1, is_graded=True),
    "harness_match": Rule(harness_match, takes="SETTINGS"),
    "judge": _without_parameter(unmarked, is_graded=True),
}


def make_scorer(suite: Suite, may_lack: Collection[str] = ()) -> Callable[[str, str], bool | float]:
    """Return the suite's `is_right(answer, reference)`.

    For a graded rule without a threshold, it returns the degree from 0.0 to 1.0.

    `may_lack` are the sandbox guards that may be missing on this worker; they come from the
    worker's operator, never from the suite.

    InvalidSpecError for an unknown rule, a missing or unexpected parameter, a threshold outside its
    range, and an exact rule with one. `is_right` raises DataError for a reference that no
    answer can match, whatever the answer is.
    """
    name, colon, parameter = suite.scoring.partition(":")
    rule = RULES.get(name)
    if rule is None:
        raise InvalidSpecError(
            f"suite {suite.name!r} has an unknown scoring rule",
            expected=f"one of {', '.join(RULES)}",
            found=excerpt(suite.scoring),
            do="correct `scoring` in the suite (docs/suites.md)",
        )
    if bool(parameter) != bool(colon) or (parameter and not rule.takes):
        raise InvalidSpecError(
            f"suite {suite.name!r}: invalid parameter of the scoring rule {name}",
            expected=_usage(name, rule),
            found=excerpt(suite.scoring),
            do="correct `scoring` in the suite (docs/suites.md)",
        )
    if rule.takes and not rule.may_omit_parameter and not parameter:
        raise InvalidSpecError(
            f"suite {suite.name!r}: {name} needs a parameter",
            expected=_usage(name, rule),
            found=excerpt(suite.scoring),
            do="correct `scoring` in the suite (docs/suites.md)",
        )
    threshold = suite.threshold
    if rule.is_graded and threshold is not None and not 0 < threshold <= 100:
        raise InvalidSpecError(
            f"suite {suite.name!r}: invalid threshold of the graded rule {name}",
            expected="threshold in (0, 100]: answers with at least that score are right; or none: "
            "the mean score is compared",
            found=threshold,
            do="correct `threshold` in the suite, or remove it",
        )
    if not rule.is_graded and threshold is not None:
        raise InvalidSpecError(
            f"suite {suite.name!r}: {name} is not a graded rule and takes no threshold",
            found=f"threshold={threshold}",
            do="remove the threshold",
        )
    score = rule.bind(parameter, may_lack) if rule.runs_programs else rule.bind(parameter)
    if rule.is_graded and threshold is None:
        return lambda answer, reference: min(max(score(answer, reference) / 100, 0.0), 1.0)
    minimum = 100.0 if threshold is None else threshold
    return lambda answer, reference: score(answer, reference) >= minimum


def _usage(name: str, rule: Rule) -> str:
    whole = f"{name}:{rule.takes}" if rule.takes else name
    return f"{name}, or {whole}" if rule.takes and rule.may_omit_parameter else whole
