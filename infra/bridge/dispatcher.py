"""Dispatches a notification: looks up its family, then finds a waiting run or starts one.

Concurrent notifications share calls. One call to Prefect is in progress at a time. Notifications
that arrive meanwhile wait for the next call, which begins after all of them arrived and therefore
reads their changes. A thousand notifications at once cause a few calls, however many families they
concern. Two bridges that run at the same time start at most one run each.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from infra.bridge.notifications import Notification, NotificationKind
from infra.bridge.readiness import Readiness

__all__ = [
    "DispatchOutcome",
    "DispatchResult",
    "Dispatcher",
    "Registry",
    "Run",
    "RunStarter",
    "SingleFlight",
    "UnavailableError",
]

_LOOK_UP_THREADS = 8
_MAX_CAUSE_CHARACTERS = 500
_CREDENTIALS = re.compile(r"//[^/@\s]+@")
_PROBE_S = 5.0
_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class UnavailableError(Exception):
    """MLflow, Prefect or the queue does not answer. The sender should try again."""

    @classmethod
    def because(cls, server: str, error: Exception) -> "UnavailableError":
        """Return the error of a server with its cause on one line, without user and password."""
        text = " ".join(f"{server}: {type(error).__name__}: {error}".split())
        return cls(_CREDENTIALS.sub("//", text)[:_MAX_CAUSE_CHARACTERS])


class DispatchOutcome(StrEnum):
    """Result of one notification."""

    STARTED = "started"  # a run was created for it
    WAITING = "waiting"  # a run that has not begun yet will read its change
    IGNORED = "ignored"  # valid, and needs no run
    REJECTED = "rejected"  # can never be valid
    REFUSED = "refused"  # not authenticated, or not readable as a request
    UNAVAILABLE = "unavailable"
    FAILED = "failed"  # an error of the bridge itself


@dataclass(frozen=True)
class Run:
    """A reconcile run that exists in Prefect.

    Attributes:
        id: id of the flow run.
        delivery_id: delivery that the run was created for; empty if the run was found waiting.
        has_begun: an earlier attempt of the same delivery created the run, and the run may have
            read the registry already. It then answers that delivery only.
    """

    id: str
    delivery_id: str = ""
    has_begun: bool = False

    def answers(self, notification: Notification) -> bool:
        """Whether this run covers the notification."""
        return not self.has_begun or self.delivery_id == notification.delivery_id


@dataclass(frozen=True)
class DispatchResult:
    """Response to the sender. `run_id` is empty if no run was needed."""

    outcome: DispatchOutcome
    run_id: str = ""


class Registry(Protocol):
    """Looks up registered models."""

    def family(self, notification: Notification) -> str | None:
        """Return the base family that the notification concerns; None if it concerns none.

        Blocking: called in a thread. UnavailableError.
        """


class RunStarter(Protocol):
    """Starts reconcile."""

    async def start(self, requested: Mapping[str | None, Notification]) -> Mapping[str | None, Run]:
        """Return a run for each family (None: all families) that has not read the registry yet.

        `requested` holds the first notification of each family. A run that is created gets one of
        them as its idempotency key. UnavailableError.
        """

    async def is_reachable(self) -> bool:
        """Whether a run could be started now."""


class SingleFlight(Generic[_Key, _Value]):
    """Runs one call at a time for each key. Callers that arrive meanwhile share the next call."""

    def __init__(self) -> None:
        self._next: dict[_Key, asyncio.Task[_Value]] = {}
        self._last: dict[_Key, asyncio.Task[_Value]] = {}

    async def call(
        self, key: _Key, function: Callable[[], Awaitable[_Value]]
    ) -> tuple[_Value, bool]:
        """Return the result of the call, and whether it was `function` that was called.

        Cancelling one caller does not cancel the call.
        """
        first = key not in self._next
        if first:
            before = self._last.get(key)
            task = asyncio.create_task(self._run(key, before, function))
            self._next[key] = self._last[key] = task
        return await asyncio.shield(self._next[key]), first

    async def _run(
        self,
        key: _Key,
        before: "asyncio.Task[_Value] | None",
        function: Callable[[], Awaitable[_Value]],
    ) -> _Value:
        if before is not None:
            await asyncio.wait([before])
        task = self._next.pop(key)
        try:
            return await function()
        finally:
            if self._last.get(key) is task:
                del self._last[key]


class Dispatcher:
    """Finds or starts the run for each notification.

    `timeout_s` is how long one notification may take before the sender has to try again. The
    default is below the 30 s after which MLflow and SeaweedFS close the connection.
    """

    def __init__(
        self, registry: Registry, run_starter: RunStarter, *, timeout_s: float = 28.0
    ) -> None:
        self._registry = registry
        self._starter = run_starter
        self._timeout_s = timeout_s
        self._families: SingleFlight[tuple[NotificationKind, str, str], str | None] = SingleFlight()
        self._requested: dict[str | None, Notification] = {}
        self._runs: SingleFlight[None, Mapping[str | None, Run]] = SingleFlight()
        # A separate pool: while MLflow hangs, the queue still needs the event loop's own threads.
        self._threads = ThreadPoolExecutor(_LOOK_UP_THREADS, thread_name_prefix="registry")
        self._readiness = Readiness(run_starter.is_reachable, timeout_s=min(_PROBE_S, timeout_s))

    async def dispatch(self, notification: Notification) -> DispatchResult:
        """Return once the run for the notification exists. UnavailableError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._dispatch(notification)
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {self._timeout_s:g} s") from error

    async def is_ready(self) -> bool:
        """Whether notifications can be dispatched, as probed within the last two seconds."""
        return await self._readiness.now()

    async def _dispatch(self, notification: Notification) -> DispatchResult:
        family = None  # of an upload: ingestion reads the family from the manifest
        if notification.kind not in (NotificationKind.UPLOAD, NotificationKind.START_UP):
            about = (notification.kind, notification.name, notification.alias)
            family, _ = await self._families.call(about, lambda: self._family(notification))
            if family is None:
                return DispatchResult(DispatchOutcome.IGNORED)
        while True:
            self._requested.setdefault(family, notification)
            runs, _ = await self._runs.call(None, self._start)
            run = runs[family]
            if run.answers(notification):
                created = run.delivery_id == notification.delivery_id
                return DispatchResult(
                    DispatchOutcome.STARTED if created else DispatchOutcome.WAITING, run.id
                )

    async def _family(self, notification: Notification) -> str | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._registry.family, notification)

    async def _start(self) -> Mapping[str | None, Run]:
        # Notifications that arrive from here on wait for the next call.
        requested, self._requested = self._requested, {}
        return await self._starter.start(requested)
