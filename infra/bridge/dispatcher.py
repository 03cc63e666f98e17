"""One hint, one answer: what it is about is looked up, then a run started or a waiting one found.

Hints that wait together share a call. One call for runs is at work at a time; whoever comes
meanwhile waits for the next, which begins after all of them arrived and therefore sees what they
are about. A burst of a thousand hints is a few calls, whatever families it is about, and Prefect
never has more than one of them to answer. Two bridges at once start at most a run each.
"""

import asyncio
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

_LOOK_UPS = 8
_PROBE_S = 5.0
_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class UnavailableError(Exception):
    """What has to be asked does not answer now: the sender should try again."""


class DispatchOutcome(StrEnum):
    """What became of a hint."""

    STARTED = "started"  # a run was made for it
    WAITING = "waiting"  # a run that has not started yet will see what it is about
    IGNORED = "nothing"
    REJECTED = "never"
    REFUSED = "refused"  # the sender, or the way it was sent
    UNAVAILABLE = "unavailable"
    FAILED = "failed"  # an error of the bridge itself


@dataclass(frozen=True)
class Run:
    """A reconcile run that exists: made under a delivery's id, or (`delivery_id` empty) found.

    `begun`: it was made for an earlier attempt of that delivery, and reads the registry or has read
    it, or was for another family. That answers the delivery again, and nobody else.
    """

    id: str
    delivery_id: str = ""
    begun: bool = False

    def answers(self, notification: Notification) -> bool:
        """Whether the hint may be answered with this run."""
        return not self.begun or self.delivery_id == notification.delivery_id


@dataclass(frozen=True)
class DispatchResult:
    """What the sender is told. `run_id` is empty where nothing had to run."""

    outcome: DispatchOutcome
    run_id: str = ""


class Registry(Protocol):
    """Who knows the registered models."""

    def family(self, notification: Notification) -> str | None:
        """Return the base family that the hint is about; None if it means nothing.

        UnavailableError. Blocking: it is called in a thread.
        """


class RunStarter(Protocol):
    """Who starts reconcile."""

    async def start(self, wanted: Mapping[str | None, Notification]) -> Mapping[str | None, Run]:
        """Return a run for each family (None: all) that has read nothing yet. UnavailableError.

        The hints are the first of each family; one of them gives a run that is made its key.
        """

    async def reachable(self) -> bool:
        """Whether a run could be started now."""


class SingleFlight(Generic[_Key, _Value]):
    """Calls by key, one at a time for each; who comes meanwhile shares the next one."""

    def __init__(self) -> None:
        self._next: dict[_Key, asyncio.Task[_Value]] = {}
        self._last: dict[_Key, asyncio.Task[_Value]] = {}

    async def call(
        self, key: _Key, function: Callable[[], Awaitable[_Value]]
    ) -> tuple[_Value, bool]:
        """Return what the call gave, and whether `function` was the one that was called.

        Who stops waiting stops nobody else.
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
    """Answers hints. `patience_s`: how long a sender waits before it is told to try again.

    MLflow and SeaweedFS hang up after 30 s.
    """

    def __init__(
        self, registry: Registry, run_starter: RunStarter, *, patience_s: float = 28.0
    ) -> None:
        self._registry = registry
        self._starter = run_starter
        self._patience_s = patience_s
        self._families: SingleFlight[tuple[NotificationKind, str, str], str | None] = SingleFlight()
        self._wanted: dict[str | None, Notification] = {}
        self._runs: SingleFlight[None, Mapping[str | None, Run]] = SingleFlight()
        # Threads of its own: while MLflow hangs, the queue still needs those of the event loop.
        self._threads = ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="registry")
        self._readiness = Readiness(run_starter.reachable, patience_s=min(_PROBE_S, patience_s))

    async def answer(self, notification: Notification) -> DispatchResult:
        """Return once the run that the hint asks for exists. UnavailableError."""
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._answer(notification)
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {self._patience_s:g} s") from error

    async def reachable(self) -> bool:
        """Whether hints would be answered now, as of the last two seconds."""
        return await self._readiness.now()

    async def _answer(self, notification: Notification) -> DispatchResult:
        family = None  # an upload's manifest is read by ingestion, which names its family
        if notification.kind not in (NotificationKind.UPLOAD, NotificationKind.START_UP):
            about = (notification.kind, notification.name, notification.alias)
            family, _ = await self._families.call(about, lambda: self._family(notification))
            if family is None:
                return DispatchResult(DispatchOutcome.IGNORED)
        while True:
            self._wanted.setdefault(family, notification)
            runs, _ = await self._runs.call(None, self._start)
            run = runs[family]
            if run.answers(notification):
                ours = run.delivery_id == notification.delivery_id
                return DispatchResult(
                    DispatchOutcome.STARTED if ours else DispatchOutcome.WAITING, run.id
                )

    async def _family(self, notification: Notification) -> str | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._registry.family, notification)

    async def _start(self) -> Mapping[str | None, Run]:
        wanted, self._wanted = self._wanted, {}  # who comes from now on waits for the next call
        return await self._starter.start(wanted)
