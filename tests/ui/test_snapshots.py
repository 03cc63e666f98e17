"""Reading in the background: who waits, what is shown after a failure, what is not read."""

import threading
import time
from dataclasses import replace

import pytest

from tests.ui.fleets import FAMILY, ExampleFleet
from trans_peft.errors import NotFoundError, StoreError
from trans_peft.ui.snapshots import Cached, Snapshots


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_only_the_first_request_reads(clock):
    reads = iter(range(10))
    cached = Cached(lambda: next(reads), clock)
    clock.now = 1000.0
    assert [cached.get() for _ in range(3)] == [0, 0, 0]


def test_it_is_due_only_if_it_was_requested_and_is_old(clock):
    cached = Cached(lambda: 1, clock)
    assert not cached.is_due(30)  # no request asked for it
    cached.get()
    cached.get()
    clock.now = 29.0
    assert not cached.is_due(30)
    clock.now = 30.0
    assert cached.is_due(30)
    cached.refresh()
    clock.now = 90.0
    assert not cached.is_due(30)  # not requested since
    cached.get()
    assert cached.is_due(30)


def test_after_a_failed_refresh_the_older_value_stays(clock):
    answers = ["old", StoreError("away"), "new"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cached = Cached(read, clock)
    assert cached.get() == "old"
    cached.refresh()
    assert cached.get() == "old"
    assert str(cached.failure) == "away"
    cached.refresh()
    assert cached.get() == "new"
    assert cached.failure is None


def test_a_failed_first_read_is_not_repeated_at_once(clock):
    reads = []

    def read():
        reads.append(clock.now)
        raise StoreError("away")

    cached = Cached(read, clock)
    for clock.now in (0.0, 1.0, 2.0, 4.0):
        with pytest.raises(StoreError):
            cached.get()
    assert reads == [0.0, 4.0]


def test_requests_at_the_same_time_share_one_first_read():
    reads, barrier = [], threading.Barrier(8)

    def read():
        reads.append(1)
        time.sleep(0.05)
        return len(reads)

    cached, found = Cached(read), []

    def get():
        barrier.wait()
        found.append(cached.get())

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(reads), found) == (1, [1] * 8)


@pytest.fixture
def fleet(tmp_path):
    fleet = ExampleFleet(tmp_path)
    fleet.add_base("v1")
    fleet.train("chat", "v1")
    return fleet


class SlowRegistry:
    """A registry whose reads wait until a test lets them."""

    def __init__(self, registry):
        self._registry = registry
        self.may_read = threading.Event()
        self.may_read.set()
        self.waits = threading.Event()
        self.reads = 0

    def __getattr__(self, name):
        return getattr(self._registry, name)

    def fleet(self, family):
        self.reads += 1
        if not self.may_read.is_set():
            self.waits.set()
        assert self.may_read.wait(10)
        return self._registry.fleet(family)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_does_not_wait_for_a_read_in_the_background(fleet):
    registry = SlowRegistry(fleet.platform.registry)
    snapshots = Snapshots(replace(fleet.platform, registry=registry), refresh_s=0.05)
    snapshots.start()
    try:
        assert [a.name for a in snapshots.get(FAMILY).fleet.adapters] == ["chat"]
        registry.may_read.clear()
        fleet.train("code", "v1")
        time.sleep(0.1)
        old = snapshots.get(FAMILY)  # old enough to be read again
        assert registry.waits.wait(10)
        assert snapshots.get(FAMILY) is old
        registry.may_read.set()
        wait_until(lambda: len(snapshots.get(FAMILY).fleet.adapters) == 2)
    finally:
        registry.may_read.set()
        snapshots.stop()


def test_the_thread_reads_every_family_once_and_then_none_that_nobody_opens(fleet):
    registry = SlowRegistry(fleet.platform.registry)
    snapshots = Snapshots(replace(fleet.platform, registry=registry), refresh_s=0.02)
    snapshots.start()
    try:
        wait_until(lambda: snapshots.last(FAMILY) is not None)
        time.sleep(0.2)
        assert registry.reads == 1
    finally:
        snapshots.stop()


def test_an_unknown_family_leaves_nothing_behind(fleet):
    snapshots = Snapshots(fleet.platform, refresh_s=30)
    for number in range(3):
        with pytest.raises(NotFoundError):
            snapshots.get(f"other-{number}")
    assert snapshots._families == {}


def test_a_registry_that_comes_back_is_read(fleet):
    class Catalog:
        away = True

        def __getattr__(self, name):
            if self.away:
                raise StoreError("away")
            return getattr(fleet.platform.catalog, name)

    catalog = Catalog()
    with pytest.raises(StoreError):
        Snapshots(replace(fleet.platform, catalog=catalog), 30).families()
    catalog.away = False
    assert Snapshots(replace(fleet.platform, catalog=catalog), 30).families() == (FAMILY,)


def test_a_new_family_is_read_after_the_list_was_requested(fleet):
    registry = SlowRegistry(fleet.platform.registry)
    snapshots = Snapshots(replace(fleet.platform, registry=registry), refresh_s=0.05)
    snapshots.start()
    try:
        wait_until(lambda: snapshots.last(FAMILY) is not None)
        fleet.platform.catalog.register_manually("other", "s3://bases/other/v1")
        wait_until(lambda: "other" in snapshots.families())
        wait_until(lambda: snapshots.last("other") is not None)
        reads = registry.reads
        for _ in range(10):
            snapshots.families()
            time.sleep(0.02)
        assert registry.reads == reads == 2  # each family once
    finally:
        snapshots.stop()


def test_a_family_that_cannot_be_read_is_not_tried_again_for_the_list(fleet):
    class Broken:
        reads = 0

        def fleet(self, family):
            self.reads += 1
            raise StoreError("away")

    registry = Broken()
    snapshots = Snapshots(replace(fleet.platform, registry=registry), refresh_s=0.02)
    snapshots.start()
    try:
        wait_until(lambda: snapshots.failure(FAMILY) is not None)
        for _ in range(10):
            assert snapshots.families() == (FAMILY,)
            time.sleep(0.02)
        assert registry.reads == 1
    finally:
        snapshots.stop()
