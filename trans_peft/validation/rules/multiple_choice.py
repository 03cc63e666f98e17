"""Multiple choice by log-likelihood: the likeliest choice is the model's answer.

`trans_peft.validation.decoding.likelihoods` computes the log-likelihoods. This module defines the
measures by which they are compared, and the scoring rule.
"""

from collections.abc import Callable
from enum import StrEnum

from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import InvalidSpecError

__all__ = ["Measure", "chosen"]


class Measure(StrEnum):
    """What is compared between the choices of an item (the values are names in a suite)."""

    SUM = ""
    """Log-likelihood of the whole choice; `acc` of lm-evaluation-harness."""
    PER_TOKEN = "per_token"  # noqa: S105
    """Mean log-likelihood of the choice's tokens."""
    PER_CHARACTER = "per_character"
    """Log-likelihood per character, without white space at both ends; `acc_norm`."""


def chosen(measure: str) -> Callable[[str, str], float]:
    """Return the rule that compares the chosen text with the reference, character by character.

    InvalidSpecError for an unknown measure.
    """
    if measure not in [known.value for known in Measure]:
        raise InvalidSpecError(
            "unknown variant of the scoring rule choice",
            expected="choice, choice:per_token or choice:per_character",
            found=excerpt(f"choice:{measure}"),
            do="correct `scoring` in the suite (docs/suites.md)",
        )
    return lambda answer, reference: 100.0 if answer == reference else 0.0
