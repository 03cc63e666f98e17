"""A run that is terminated does not wait for the transfers in its threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tasks import transfer
from tests.flows.test_shards import A, B
from tests.lifecycle.fleet import POLICY
from trans_peft.lifecycle.progress import WorkProgress


def test_a_terminated_run_ends_its_transfers_at_their_next_step(monkeypatch):
    monkeypatch.setattr(transfer, "_run_ends", threading.Event())
    monkeypatch.setattr(transfer, "work_progress", lambda: lambda progress: None)

    def compute():
        reached = transfer._stoppable()
        for done in range(10_000):
            reached(WorkProgress("items", done, 10_000, "items", None))
            time.sleep(0.01)

    def terminated():
        raise KeyboardInterrupt

    with ThreadPoolExecutor(2) as pool:
        threads = []

        def submit(task, policy):
            threads.append(pool.submit(compute))
            return SimpleNamespace(wait=terminated)

        monkeypatch.setattr(transfer, "transfer_adapter", SimpleNamespace(submit=submit))
        with pytest.raises(KeyboardInterrupt):
            list(transfer.transfer_each((A, B), POLICY, one_by_one=False))
        errors = [thread.exception(timeout=30) for thread in threads]
    assert [type(error) for error in errors] == [transfer._RunEndsError] * 2
