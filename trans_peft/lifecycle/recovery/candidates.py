"""A candidate for an adapter's version on a new base, and what is needed to make one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryPolicy, RecoveryStrategy
from trans_peft.lifecycle.progress import ProgressCallback, progress_reporter
from trans_peft.ports import Platform

__all__ = ["Candidate", "CandidateInputs", "recipe_on"]


@dataclass(frozen=True)
class Candidate:
    """Weights that may become the adapter's version on the new base.

    Attributes:
        strategy: The strategy that made the weights.
        folder: Returns the PEFT folder with the weights.
        weights_sha256: The hash of the weights.
        note: The settings that were used, such as the scale factor or the number of steps.
    """

    strategy: RecoveryStrategy
    folder: Callable[[], Path]
    weights_sha256: str
    note: str = ""


@dataclass(frozen=True)
class CandidateInputs:
    """What a strategy needs to make a candidate for `base`.

    Attributes:
        source: The adapter version that is transferred.
        folder: Returns the PEFT folder of `source`.
        base: The new base version.
        trained_on: The base version that `source` was trained on.
        reference: The evaluations of `source` on `trained_on`, by suite name.
        recovery: The settings of the strategies.
        platform: The platform. Training runs below its work folder.
        scratch: A folder for other candidates.
        on_progress: Called with the progress of a training, and of a teacher's answers before it.
    """

    source: AdapterVersion
    folder: Callable[[], Path]
    base: BaseVersion
    trained_on: BaseVersion
    reference: Mapping[str, Evaluation]
    recovery: RecoveryPolicy
    platform: Platform
    scratch: Path
    on_progress: ProgressCallback | None = None

    def reporter(
        self, work: str, unit: str, *, base: BaseVersion | None = None
    ) -> Callable[[int, int], None]:
        """Return a function that reports (units done, units in total) of a part of the work.

        `base` is where the work is done. None: on the new base.
        """
        description = f"{self.source.adapter}: {work} on {(base or self.base).version}"
        return progress_reporter(self.on_progress, description, unit)


def recipe_on(recipe: TrainingRecipe, base: BaseVersion) -> TrainingRecipe:
    """Return the recipe that trains the same adapter on another base."""
    return replace(recipe, base_version=base.version)
