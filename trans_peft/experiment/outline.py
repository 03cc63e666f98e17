"""What an experiment would do: its cells, GPU hours, disk, and differences from the paper."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import fmean

from trans_peft.domain.experiment import Experiment, PlannedTraining
from trans_peft.experiment.cells import Score, is_complete
from trans_peft.experiment.deviations import deviations
from trans_peft.experiment.disk import Disk, disk
from trans_peft.experiment.prepare import Prepared
from trans_peft.ports import Platform

__all__ = ["Outline", "Row", "outline"]


@dataclass(frozen=True)
class Row:
    """One planned training.

    Attributes:
        training: the training.
        is_known: whether all of its scores exist. None: unknown, because a base or data cannot be
            read on this machine.
    """

    training: PlannedTraining
    is_known: bool | None


@dataclass(frozen=True)
class Outline:
    """The plan of an experiment.

    Attributes:
        rows: the trainings, those of the selection first. If there are some, its first candidate
            takes the place of the rates to select in the others.
        deviations: differences from the paper.
        gpu_hours: estimate for the missing trainings and evaluations; None: unknown.
        disk: bytes on the disk; None if a base or data cannot be read here.
        notes: what is unknown, and why; suites with training rows.
    """

    rows: tuple[Row, ...]
    deviations: tuple[str, ...]
    gpu_hours: float | None
    disk: Disk | None
    notes: tuple[str, ...]

    @property
    def missing(self) -> int:
        """Number of trainings that are not known to be complete."""
        return sum(not row.is_known for row in self.rows)


def outline(
    experiment: Experiment,
    prepared: Prepared | None,
    platform: Platform,
    scores: Collection[Score],
    notes: Iterable[str] = (),
) -> Outline:
    """Return the plan. `prepared` is None if a base or data cannot be read on this machine."""
    known = frozenset(score.key for score in scores)
    trainings = (*experiment.selection_trainings(), *experiment.trainings())
    rows = tuple(
        Row(planned, None if prepared is None else is_complete(planned, prepared, known))
        for planned in trainings
    )
    missing = [row.training for row in rows if not row.is_known]
    found = [] if prepared is None else [str(one) for one in prepared.leakage if one.rows]
    hours, unknown = _gpu_hours(missing, experiment, scores)
    return Outline(
        rows,
        deviations(experiment),
        hours,
        None if prepared is None else disk(missing, prepared, platform),
        (*notes, *found, *unknown),
    )


def _gpu_hours(
    missing: Iterable[PlannedTraining], experiment: Experiment, scores: Collection[Score]
) -> tuple[float | None, list[str]]:
    """Return the hours of trainings with their evaluations, and what is unknown.

    Measured hours of the same family and method take the place of those of the file. None if the
    hours of trainings are unknown.
    """
    cost, total, unknown = experiment.cost, 0.0, set()

    def length(steps: int | None) -> float:
        """Return the length of a training, as a multiple of the usual one."""
        return 1 if steps is None else steps / (experiment.training.optimizer.steps or steps)

    for planned in missing:
        like = [s for s in scores if (s.family, s.method) == (planned.family, planned.method)]
        measured = [s.gpu_seconds / length(s.steps) / 3600 for s in like if s.gpu_seconds]
        training = fmean(measured) if measured else cost.training_gpu_hours
        seconds: dict[str, list[float]] = {}
        for score in like:
            seconds.setdefault(score.suite, []).append(score.score_seconds)
        evaluation = (
            sum(map(fmean, seconds.values())) / 3600 if seconds else cost.evaluation_gpu_hours
        )
        if training is None:
            unknown.add("the GPU hours of a training are unknown: give cost.training_gpu_hours")
        if evaluation is None:
            unknown.add(
                "GPU hours are without evaluations, which are unknown: give "
                "cost.evaluation_gpu_hours"
            )
        total += (training or 0.0) * length(planned.steps) + (evaluation or 0.0) * len(
            planned.scored_on
        )
    is_known = not any("of a training" in text for text in unknown)
    return total if is_known else None, sorted(unknown)
