"""What a task logs of the progress of its work."""

import logging

import pytest

from tasks import progress
from trans_peft.lifecycle.progress import WorkProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "get_run_logger", lambda: logging.getLogger("progress"))
    return now


def test_the_first_and_the_last_report_of_each_work_are_logged(clock, caplog):
    caplog.set_level(logging.INFO)
    show = progress.work_progress()
    for description in ("answers", "class", "class on v2"):
        for done in (1, 2, 3, 4):
            show(WorkProgress(description, done, 4, "items", None))
            clock[0] += 0.1
    assert [record.getMessage() for record in caplog.records] == [
        f"{description}: {done} of 4 items"
        for description in ("answers", "class", "class on v2")
        for done in (1, 4)
    ]


def test_a_report_in_between_is_logged_every_five_seconds(clock, caplog):
    caplog.set_level(logging.INFO)
    show = progress.work_progress()
    for done in range(1, 13):
        show(WorkProgress("answers", done, 100, "items", None))
        clock[0] += 1.0
    shown = [record.getMessage() for record in caplog.records]
    assert shown == [f"answers: {done} of 100 items" for done in (1, 6, 11)]
