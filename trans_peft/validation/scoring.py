"""When an answer is right: named rules that a suite chooses from.

A rule gives an answer a degree from 0 to 100 against the reference. Exact rules know only 0 and
100; graded ones need the suite's `threshold`, at or above which an answer counts as right, because
the gate compares items that are right or wrong. A suite names a rule, and after a colon what the
rule takes: `exact_match`, `regex:true|false`. All of it is part of the suite's hash. A rule that
comes to mark otherwise gets another name, or another number in `trans_peft.domain.evaluation`,
which is part of the hash too. A new rule is one row of `RULES`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from trans_peft.domain.evaluation import Suite
from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.rules.entry_point import entry_point
from trans_peft.validation.rules.mathematics import math_verify
from trans_peft.validation.rules.metamath import metamath_gsm8k, metamath_math
from trans_peft.validation.rules.multiple_choice import chosen
from trans_peft.validation.rules.paper import paper_gsm8k, paper_math
from trans_peft.validation.rules.program import code
from trans_peft.validation.rules.text import (
    chrf,
    exact_match,
    json_equal,
    label_f1,
    regex,
    rouge_l,
)

__all__ = ["RULES", "Degree", "Rule", "make_scorer"]

Degree = Callable[[str, str], float]
"""`degree(answer, reference)`, 0 to 100; DataError for a reference that nothing could equal."""


@dataclass(frozen=True)
class Rule:
    """A way to mark an answer: all-or-none or graded, and what it takes after a colon.

    Attributes:
        bind: returns the rule for the parameter after the colon.
        takes: describes that parameter; empty for a rule without one.
        optional: whether the parameter may be omitted.
        graded: whether the suite needs a threshold.
        sandboxed: whether `bind` also takes the sandbox guards that the worker may lack.
        literal: whether a right answer is the text of the reference, apart from white space around
            it. `prepare` then refuses references that decoding cannot produce.
    """

    bind: Callable[..., Degree]
    takes: str = ""
    optional: bool = False
    graded: bool = False
    sandboxed: bool = False
    literal: bool = False


def _plain(degree: Degree, *, graded: bool = False, literal: bool = False) -> Rule:
    return Rule(lambda _: degree, graded=graded, literal=literal)


RULES: Mapping[str, Rule] = {
    "exact_match": _plain(exact_match, literal=True),
    "regex": Rule(regex, takes="PATTERN"),
    "json_equal": _plain(json_equal),
    "choice": Rule(chosen, takes="per_token or per_character", optional=True),
    "math_verify": Rule(math_verify, takes="MARKER", optional=True),
    "metamath_gsm8k": _plain(metamath_gsm8k),
    "metamath_math": _plain(metamath_math),
    "paper_gsm8k": _plain(paper_gsm8k),
    "paper_math": _plain(paper_math),
    "code": Rule(code, takes="pythonX.Y", sandboxed=True),
    "python": Rule(entry_point, takes="NAME==VERSION"),
    "chrf": _plain(chrf, graded=True),
    "rouge_l": _plain(rouge_l, graded=True),
    "label_f1": _plain(label_f1, graded=True),
}


def make_scorer(suite: Suite, may_lack: Collection[str] = ()) -> Callable[[str, str], bool]:
    """Return `is_right(answer, reference)` as the suite asks for it.

    `may_lack` names the guards of the sandbox for programs that this worker may lack; it comes from
    the worker's operator and never from the suite.

    InvalidSpecError for a rule that is not there or does not get what it takes, a graded rule
    without a threshold and an exact one with it. `is_right` raises DataError for a reference that
    no answer could equal, whatever the answer.
    """
    name, colon, parameter = suite.scoring.partition(":")
    rule = RULES.get(name)
    if rule is None:
        raise InvalidSpecError(
            f"suite {suite.name!r} asks for a scoring rule that is not there",
            expected=f"one of {', '.join(RULES)}",
            found=excerpt(suite.scoring),
        )
    if bool(parameter) != bool(colon) or (parameter and not rule.takes):
        raise InvalidSpecError(
            f"suite {suite.name!r}: {name} is given what it does not take",
            expected=_usage(name, rule),
            found=excerpt(suite.scoring),
        )
    if rule.takes and not rule.optional and not parameter:
        raise InvalidSpecError(
            f"suite {suite.name!r}: {name} needs more than its name",
            expected=_usage(name, rule),
            found=excerpt(suite.scoring),
        )
    threshold = suite.threshold
    if rule.graded and (threshold is None or not 0 < threshold <= 100):
        raise InvalidSpecError(
            f"suite {suite.name!r}: {name} gives a degree, so it needs a threshold",
            expected="threshold in (0, 100]: at or above it an answer is right",
            found=threshold,
        )
    if not rule.graded and threshold is not None:
        raise InvalidSpecError(
            f"suite {suite.name!r}: {name} is right or wrong and takes no threshold",
            found=f"threshold={threshold}",
            do="leave the threshold out",
        )
    degree = rule.bind(parameter, may_lack) if rule.sandboxed else rule.bind(parameter)
    least = 100.0 if threshold is None else threshold
    return lambda answer, reference: degree(answer, reference) >= least


def _usage(name: str, rule: Rule) -> str:
    whole = f"{name}:{rule.takes}" if rule.takes else name
    return f"{name}, or {whole}" if rule.takes and rule.optional else whole
