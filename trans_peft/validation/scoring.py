"""When an answer is right: named rules that a suite chooses from.

A rule gives an answer a degree from 0 to 100 against the reference. Exact rules know only 0 and
100; graded ones need the suite's `threshold`, at or above which an answer counts as right, because
the gate compares items that are right or wrong. A new rule is one row of `RULES`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trans_peft.domain.evaluation import Suite
from trans_peft.errors import InvalidSpecError

__all__ = ["RULES", "Rule", "chrf", "exact_match", "marker"]

_CHRF_ORDER = 6
_CHRF_BETA = 2.0


def exact_match(answer: str, reference: str) -> float:
    """Return 100 if both are the same text, white space around them left aside, else 0."""
    return 100.0 if answer.strip() == reference.strip() else 0.0


def chrf(answer: str, reference: str) -> float:
    """Return chrF of one answer, 0 to 100: character n-grams up to 6, recall weighted twice.

    M. Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015, as sacrebleu
    computes it for a sentence (white space removed, orders longer than a text left out).
    """
    texts = ["".join(text.split()) for text in (answer, reference)]
    precisions, recalls = [], []
    for order in range(1, min(_CHRF_ORDER, *map(len, texts)) + 1):
        given, wanted = (_ngrams(text, order) for text in texts)
        shared = (given & wanted).total()
        precisions.append(shared / given.total())
        recalls.append(shared / wanted.total())
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weight = _CHRF_BETA**2
    return 100.0 * (1 + weight) * precision * recall / (weight * precision + recall)


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))


@dataclass(frozen=True)
class Rule:
    """A way to mark an answer: `degree(answer, reference)` in 0 to 100, graded or all-or-none."""

    degree: Callable[[str, str], float]
    graded: bool = False


RULES: Mapping[str, Rule] = {
    "exact_match": Rule(exact_match),
    "chrf": Rule(chrf, graded=True),
}


def marker(suite: Suite) -> Callable[[str, str], bool]:
    """Return `is_right(answer, reference)` as the suite asks for it.

    InvalidSpecError for a rule that is not there, a graded rule without a threshold and an exact
    one with it.
    """
    rule = RULES.get(suite.scoring)
    if rule is None:
        raise InvalidSpecError(
            f"suite {suite.name!r} asks for a scoring rule that is not there",
            expected=f"one of {', '.join(RULES)}",
            found=repr(suite.scoring),
        )
    threshold = suite.threshold
    if rule.graded and (threshold is None or not 0 < threshold <= 100):
        raise InvalidSpecError(
            f"suite {suite.name!r}: {suite.scoring} gives a degree, so it needs a threshold",
            expected="threshold in (0, 100]: at or above it an answer is right",
            found=threshold,
        )
    if not rule.graded and threshold is not None:
        raise InvalidSpecError(
            f"suite {suite.name!r}: {suite.scoring} is right or wrong and takes no threshold",
            found=f"threshold={threshold}",
            do="leave the threshold out",
        )
    least = 100.0 if threshold is None else threshold
    return lambda answer, reference: rule.degree(answer, reference) >= least
