"""How long it takes from a hint to its first verdict, read from Prefect's events every 15 s.

The bridge sees no verdict itself. `tasks/events.py` sends an event for each one, which names the
hint that its run goes back to. The first verdict of each hint is counted here. Verdicts that were
reached while no bridge ran are not counted, and of several bridges each counts all of them.

Anybody with access to Prefect can send an event, so every field of one may have any value. An event
without a well-formed hint counts as one without a hint.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.events.filters import EventFilter
from prefect.events.schemas.events import ReceivedEvent
from prefect.exceptions import PrefectException

from infra.bridge.logs import LOG
from infra.bridge.loops import Failures
from infra.bridge.metrics import Metrics, Place
from infra.bridge.prefect_calls import PrefectCalls
from tasks.origin import Origin
from trans_peft.domain.conventions import Event

__all__ = ["Verdicts"]

_KNOWN_AT_START = timedelta(days=1)
_LATE = timedelta(minutes=10)
"""How long after it happened an event may be stored: a run sends them in batches."""

_MOST_HINTS = 10_000
_PAGE = 50
_MOST_PAGES = 200
_PATIENCE_S = 60.0


class Verdicts:
    """Counts the first verdict of each hint once. `patience_s`: for one look."""

    def __init__(
        self,
        prefect: PrefectCalls,
        metrics: Metrics,
        failures: Failures,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._prefect = prefect
        self._metrics = metrics
        self._failures = failures
        self._patience_s = patience_s
        self._answered: dict[str, None] = {}  # hints that have a verdict, the latest seen last
        self._odd: dict[object, None] = {}  # ids of events that failed, noted once
        self._began = datetime.now(UTC)
        self._since = self._began - _KNOWN_AT_START

    async def look(self) -> None:
        """Read the new events. Raises what Prefect's client raises, and TimeoutError.

        At most 10,000 events are read at a time; the next look goes on from there. An answer that
        cannot be read is asked for once more at most: the next look starts 10 minutes back.
        """
        now = datetime.now(UTC)
        try:
            read_to = await self._prefect.call(
                lambda client: self._read(client, now), patience_s=self._patience_s
            )
        except (httpx.HTTPError, PrefectException, OSError):
            raise  # Prefect is away: nothing of this window was missed yet
        except Exception:
            self._since = max(self._since, now - _LATE)
            raise
        self._since = min(read_to, now - _LATE)

    async def _read(self, client: PrefectClient, now: datetime) -> datetime:
        """Count what is new and return the time up to which everything was read."""
        pages = 0
        async for events in _pages(client, self._since, now):
            pages += 1
            for event in events:
                self._take(event)
            _shrink(self._answered)
            _shrink(self._odd)
            if pages == _MOST_PAGES and events:
                return max(events[-1].occurred, self._since + timedelta(microseconds=1))
        return now

    def _take(self, event: ReceivedEvent) -> None:
        try:
            self._count(event)
        except Exception as error:
            if event.id not in self._odd:  # each look reads it again
                self._odd[event.id] = None
                self._failures.note(Place.EVENT, error, event=str(event.id)[:100])

    def _count(self, event: ReceivedEvent) -> None:
        found = Origin.of_payload(event.payload)
        if found is None:
            return
        first = self._answered.pop(found.delivery_id, self) is self
        self._answered[found.delivery_id] = None
        if not first or event.occurred < self._began:
            return
        lag_s = event.occurred.timestamp() - found.at.timestamp()
        self._metrics.first_verdict(found.kind, lag_s)
        LOG.info(
            "first verdict",
            extra={
                "delivery": found.delivery_id,
                "kind": found.kind,
                "about": str(event.resource.id)[:300],
                "seconds": round(lag_s, 1),
            },
        )


async def _pages(
    client: PrefectClient, since: datetime, until: datetime
) -> AsyncIterator[Sequence[ReceivedEvent]]:
    wanted = {
        "event": {"name": [Event.ADAPTER_JUDGED]},
        "occurred": {"since": since, "until": until},
        "order": "ASC",
    }
    page = await client.read_events(EventFilter.model_validate(wanted), limit=_PAGE)
    yield page.events
    for _ in range(_MOST_PAGES - 1):
        if page.next_page is None:
            return
        page = await client.read_events_page(str(page.next_page))
        yield page.events


def _shrink(known: dict) -> None:
    while len(known) > _MOST_HINTS:
        del known[next(iter(known))]
