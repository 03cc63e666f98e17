"""Progress of a task: log lines, and a progress bar on the page of its flow run."""

import time
from collections.abc import Callable
from typing import cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from trans_peft.lifecycle.progress import WorkProgress
from trans_peft.training.events import Event, TrainingMetrics

__all__ = ["training_progress", "work_progress"]

_EVERY_S = 5.0


def training_progress(adapter: str) -> Callable[[Event], None]:
    """Return a callback that logs training events and updates a progress bar."""
    logger = get_run_logger()
    description = f"training {adapter}"
    bar = cast(UUID, create_progress_artifact(progress=0.0, description=description))
    last = 0.0

    def show(event: Event) -> None:
        nonlocal last
        if isinstance(event, TrainingMetrics):
            if time.monotonic() - last < _EVERY_S and event.step < event.total_steps:
                return
            last = time.monotonic()
            update_progress_artifact(bar, progress=100.0 * event.step / event.total_steps)
        logger.info("%s", event)

    return show


def work_progress() -> Callable[[WorkProgress], None]:
    """Return a callback that logs progress every few seconds, and when other work begins."""
    logger = get_run_logger()
    last, work = 0.0, ""

    def show(reached: WorkProgress) -> None:
        nonlocal last, work
        is_new = reached.description != work
        if is_new or time.monotonic() - last >= _EVERY_S or reached.done == reached.total:
            last, work = time.monotonic(), reached.description
            logger.info("%s", reached)

    return show
