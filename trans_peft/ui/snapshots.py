"""Values that are read from the registry once, kept in memory, and read again in the background.

Reading a family of 10,000 adapters takes seconds. A request therefore gets the last value that was
read, with its age, and waits only if there is none yet. A value that nobody requests is not read
again.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Generic, TypeVar

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.fleet import Fleet
from trans_peft.errors import NotFoundError, TransPeftError
from trans_peft.lifecycle.reconcile import observe
from trans_peft.ports import Platform
from trans_peft.ui.index import FleetIndex, build_index
from trans_peft.ui.progress import FleetProgress, progress_of

__all__ = ["Cached", "Snapshot", "Snapshots"]

T = TypeVar("T")
_FAILED_FOR_S = 3.0
"""For so long after a failed read without an older value, further requests get the same error."""


@dataclass(frozen=True)
class Snapshot:
    """One family as it was read.

    Attributes:
        fleet: The ready base versions and the live adapters.
        waiting: Base versions that ingestion has not made ready.
        index: The rows of the pages, computed once.
        progress: What the desired state lacks, computed once.
        read_at: When the read began.
        seconds: How long reading and indexing took.
    """

    fleet: Fleet
    waiting: tuple[BaseVersion, ...]
    index: FleetIndex
    progress: FleetProgress
    read_at: datetime
    seconds: float

    @property
    def age_s(self) -> float:
        """Seconds since the read began."""
        return (datetime.now(UTC) - self.read_at).total_seconds()


class Cached(Generic[T]):
    """One value that is read by a function, which only one thread calls at a time.

    Attributes:
        failure: The error of the last read, if it failed after an earlier one had succeeded.
    """

    def __init__(self, read: Callable[[], T], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._value: T | None = None
        self._read_at = self._failed_at = -float("inf")
        self._requested = False
        self.failure: TransPeftError | None = None

    def get(self) -> T:
        """Return the last value. Reads it if there is none, and raises the error of that read."""
        self._requested = True
        if self._value is None:
            with self._lock:
                if self._value is None:
                    if self.failure and self._clock() - self._failed_at < _FAILED_FOR_S:
                        raise self.failure
                    return self._update()
        return self._value

    @property
    def last(self) -> T | None:
        """The last value, without reading."""
        return self._value

    def is_due(self, refresh_s: float) -> bool:
        """Whether the value was requested, and is older than `refresh_s`."""
        return self._requested and self._clock() - self._read_at >= refresh_s

    def refresh(self) -> None:
        """Read the value. If that fails, the older value stays, and `failure` is set."""
        with self._lock:
            try:
                self._update()
            except NotFoundError:
                raise
            except TransPeftError:
                pass

    def _update(self) -> T:
        self._requested = False
        self._read_at = began = self._clock()
        try:
            value = self._read()
        except TransPeftError as error:
            self.failure, self._failed_at = error, self._clock()
            raise
        self._value, self.failure, self._read_at = value, None, began
        return value


class Snapshots:
    """The families of a platform, each read in the background while it is requested."""

    def __init__(self, platform: Platform, refresh_s: float) -> None:
        self._platform = platform
        self._refresh_s = refresh_s
        self._names = Cached(platform.catalog.families)
        self._families: dict[str, Cached[Snapshot]] = {}
        self._changing = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        """Start the background thread, which first reads every family once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after a read that is in progress."""
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout=5)

    def families(self) -> tuple[str, ...]:
        """Return the names of all families. StoreError if they were never read.

        Old names, and families that were never read, are read in the background.
        """
        names = self._names.get()
        if self._names.is_due(self._refresh_s) or not self._families.keys() >= {*names}:
            self._wake.set()
        return names

    def get(self, family: str) -> Snapshot:
        """Return a family as it was last read. The first call waits for a read.

        NotFoundError for an unknown family, StoreError if it was never read.
        """
        cached = self._families.get(family)
        if cached is None:
            cached = Cached(lambda: self._observe(family))
            with self._changing:
                cached = self._families.setdefault(family, cached)
        try:
            snapshot = cached.get()
        except NotFoundError:
            self._families.pop(family, None)
            raise
        self._wake_if_due(cached)
        return snapshot

    def last(self, family: str) -> Snapshot | None:
        """Return a family as it was last read, or None if it has not been read yet."""
        cached = self._families.get(family)
        return cached.last if cached else None

    def failure(self, family: str) -> TransPeftError | None:
        """Return the error of the last read of a family, if it failed."""
        cached = self._families.get(family)
        return cached.failure if cached else None

    def refresh(self) -> None:
        """Read everything that was requested and is older than the interval, and new families."""
        if self._names.is_due(self._refresh_s):
            self._names.refresh()
        self._read_new()
        for family, cached in list(self._families.items()):
            if cached.is_due(self._refresh_s) and not self._stopped:
                try:
                    cached.refresh()
                except NotFoundError:
                    self._families.pop(family, None)

    def _wake_if_due(self, cached: Cached) -> None:
        if cached.is_due(self._refresh_s):
            self._wake.set()

    def _run(self) -> None:
        self._logging_faults(self._names.get)
        self._logging_faults(self._read_new)
        while not self._stopped:
            self._wake.wait(self._refresh_s)
            self._wake.clear()
            self._logging_faults(self.refresh)

    def _read_new(self) -> None:
        """Read the known families that nothing has read, or has tried to read, before."""
        for family in self._names.last or ():
            if family not in self._families and not self._stopped:
                self._logging_faults(partial(self.get, family))

    def _logging_faults(self, read: Callable[[], object]) -> None:
        """Call a function; its errors go to the log, because they must not end the thread."""
        try:
            read()
        except TransPeftError as error:
            logging.getLogger(__name__).warning("a read in the background failed: %s", error)
        except Exception:
            logging.getLogger(__name__).exception("a read in the background failed")

    def _observe(self, family: str) -> Snapshot:
        began, read_at = time.monotonic(), datetime.now(UTC)
        waiting = tuple(b for b in self._platform.catalog.versions(family) if not b.ready)
        fleet = observe(family, self._platform)
        index = build_index(fleet)
        progress = progress_of(index)
        return Snapshot(fleet, waiting, index, progress, read_at, time.monotonic() - began)
