"""Whether an adapter on its old base can be the teacher of its version on a new one."""

from collections.abc import Mapping, Sequence

from trans_peft.domain.evaluation import Evaluation, Suite
from trans_peft.domain.recovery import PromptsPolicy
from trans_peft.errors import (
    AccessError,
    BaseUnreadableError,
    ContentError,
    DataError,
    IntegrityError,
    NotFoundError,
)
from trans_peft.lifecycle.recovery.candidates import CandidateInputs
from trans_peft.lifecycle.recovery.readiness import why_no_prompts

__all__ = ["UNUSABLE", "why_no_teacher"]

UNUSABLE = (
    AccessError,
    BaseUnreadableError,
    ContentError,
    DataError,
    IntegrityError,
    NotFoundError,
)
"""Errors of the prompts and of the old base, after which the verdict so far remains."""


def why_no_teacher(inputs: CandidateInputs, policy: PromptsPolicy) -> str:
    """Return why the adapter on its old base cannot answer prompts as a teacher; empty if it can.

    Nothing gives prompts, or the adapter answers no suite better than by chance.
    """
    return why_no_prompts(inputs.source, policy) or _at_chance(
        inputs.source.suites, inputs.reference
    )


def _at_chance(suites: Sequence[Suite], reference: Mapping[str, Evaluation]) -> str:
    """Return a reason if the teacher answers no suite better than by chance."""
    scores = {
        suite.name: (reference[suite.name].score, suite.chance_points)
        for suite in suites
        if suite.name in reference and suite.chance_points is not None
    }
    if len(scores) < len(suites) or any(score > chance for score, chance in scores.values()):
        return ""
    shown = ", ".join(
        f"{name}: {score:.1f} of {chance:g}" for name, (score, chance) in scores.items()
    )
    return f"on its old base the adapter answers no better than by chance ({shown})"
