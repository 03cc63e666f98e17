"""Run all missing cells of an experiment on this machine, one after the other."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trans_peft.domain.experiment import PlannedTraining
from trans_peft.errors import TransPeftError
from trans_peft.experiment.analyses import FamilyAnalysis, analyse_families, current
from trans_peft.experiment.cells import Score, bare_scores, is_complete, keys, scores, selected
from trans_peft.experiment.disk import check_disk, disk
from trans_peft.experiment.outline import outline
from trans_peft.experiment.prepare import Prepared
from trans_peft.experiment.report import Report, write_report
from trans_peft.experiment.score_file import ScoreFile
from trans_peft.lifecycle.progress import ProgressCallback, WorkProgress
from trans_peft.ports import Platform
from trans_peft.training.events import Event

__all__ = ["Watch", "report_on", "run", "with_selected_rates"]


@dataclass(frozen=True)
class Watch:
    """Callbacks for the progress of an experiment.

    Attributes:
        on_trainings: called when a training is complete, with the estimate of the remaining time.
        on_event: called with each event of a training.
        on_progress: called after each batch of an evaluation and each text of an analysis.
    """

    on_trainings: ProgressCallback
    on_event: Callable[[Event], None]
    on_progress: ProgressCallback


def run(
    prepared: Prepared,
    platform: Platform,
    found: ScoreFile[Score],
    analyses: ScoreFile[FamilyAnalysis],
    watch: Watch,
    *,
    is_quick: bool = False,
) -> None:
    """Run what the files lack: the trainings of the selection first, the analyses last.

    Raises StoreError, before anything runs, if the adapters do not fit on the disk.
    """
    start = with_selected_rates(prepared, found)
    selection = start.experiment.selection_trainings()
    trainings = selection + start.experiment.trainings()
    missing = [planned for planned in trainings if not is_complete(planned, start, found)]
    check_disk(disk(missing, start, platform), platform.work_dir)
    for score in bare_scores(
        prepared, platform, found, on_progress=watch.on_progress, is_quick=is_quick
    ):
        found.append(score)
    started_s, done = time.monotonic(), 0

    def train(of: Prepared, trainings: Iterable[PlannedTraining]) -> None:
        nonlocal done
        for planned in trainings:
            if is_complete(planned, of, found):
                continue
            with _naming(planned):
                for score in scores(
                    planned,
                    of,
                    platform,
                    found,
                    on_event=watch.on_event,
                    on_progress=watch.on_progress,
                    is_quick=is_quick,
                ):
                    found.append(score)
            done += 1
            total = max(len(missing), done)
            eta_s = (time.monotonic() - started_s) / done * (total - done)
            watch.on_trainings(WorkProgress("experiment", done, total, "trainings", eta_s))

    train(start, selection)
    chosen = with_selected_rates(prepared, found)
    assert chosen.experiment.selection is None
    train(chosen, chosen.experiment.trainings())
    for analysis in analyse_families(
        chosen, platform, analyses, on_progress=watch.on_progress, is_quick=is_quick
    ):
        analyses.append(analysis)


@contextmanager
def _naming(planned: PlannedTraining) -> Iterator[None]:
    """State in errors of the block which training they are about."""
    try:
        yield
    except TransPeftError as error:
        raise type(error)(f"{planned}: {error}") from error


def with_selected_rates(prepared: Prepared, found: Iterable[Score]) -> Prepared:
    """Return the experiment with its selected rates, or unchanged if they are not known yet."""
    if prepared.experiment.selection is None:
        return prepared
    rates = selected(prepared, found)
    if rates is None:
        return prepared
    return replace(prepared, experiment=prepared.experiment.with_rates(rates))


def report_on(
    prepared: Prepared,
    platform: Platform,
    found: Iterable[Score],
    analyses: Iterable[FamilyAnalysis],
    folder: Path,
    *,
    is_quick: bool = False,
) -> Report:
    """Write the report on the scores and analyses that exist.

    The files may have others, of earlier versions of the bases, the data or the experiment.
    """
    stored = tuple(found)
    chosen = with_selected_rates(prepared, stored)
    trainings = prepared.experiment.selection_trainings() + chosen.experiment.trainings()
    wanted = keys(prepared, trainings) | keys(prepared, ())
    own = tuple(score for score in stored if score.key in wanted)
    plan = outline(prepared.experiment, chosen, platform, own)
    return write_report(
        prepared.experiment,
        chosen.experiment,
        plan,
        own,
        current(chosen, analyses),
        folder,
        is_quick=is_quick,
    )
