"""Choice by log-likelihood: right is who finds the completion likelier than all other choices.

`trans_peft.validation.decoding.likelihoods` finds which choice that is; the rule says by which
measure, and marks it.
"""

from collections.abc import Callable
from enum import StrEnum

from trans_peft.errors import InvalidSpecError

__all__ = ["Measure", "chosen"]


class Measure(StrEnum):
    """What is compared between the choices of an item."""

    SUM = ""
    """The log-likelihood of the whole choice; lm-evaluation-harness' `acc`."""
    PER_TOKEN = "per_token"  # noqa: S105
    """Its mean over the choice's tokens."""
    PER_CHARACTER = "per_character"
    """Its mean over the choice's characters, white space around them left aside; `acc_norm`."""


def chosen(measure: str) -> Callable[[str, str], float]:
    """Return the rule: 100 where the answer is the reference, to the letter, else 0."""
    if measure not in [known.value for known in Measure]:
        raise InvalidSpecError(
            "choices cannot be compared like that",
            expected="choice, choice:per_token or choice:per_character",
            found=f"choice:{measure}",
        )
    return lambda answer, reference: 100.0 if answer == reference else 0.0
