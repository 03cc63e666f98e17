"""Requests for many adapters in parallel."""

import threading
import time

import pytest

from trans_peft.errors import StoreError
from trans_peft.lifecycle.parallel import in_parallel


def test_results_are_in_the_order_of_the_items():
    def slower_at_first(item):
        time.sleep(0.02 if item < 4 else 0)
        return item * item

    assert in_parallel(slower_at_first, range(50)) == [item * item for item in range(50)]
    assert in_parallel(slower_at_first, []) == []


def test_calls_overlap():
    both = threading.Barrier(2)
    assert in_parallel(lambda item: both.wait(timeout=10) in (0, 1), "ab") == [True, True]


def test_after_an_error_no_further_call_starts():
    started = []

    def failing(item):
        started.append(item)
        time.sleep(0.02)
        raise StoreError(f"{item} failed")

    with pytest.raises(StoreError, match="0 failed"):
        in_parallel(failing, range(1000))
    assert len(started) < 100
