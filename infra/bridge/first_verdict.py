"""Measures the time from a notification to its first verdict, from Prefect's events.

Runs send an event for each verdict (`tasks/events.py`), which names the notification that caused
the run. The bridge polls these events every 15 s and observes the first verdict of each
notification. It does not count verdicts from before its own start. If several bridges run, each of
them counts all verdicts.

Every client with access to Prefect can send an event, so each field may have any value. An event
without a valid notification is skipped.
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
from infra.bridge.metrics import FailureSource, Metrics
from infra.bridge.prefect_calls import PrefectCalls
from tasks.origin import Origin
from trans_peft.domain.conventions import Event

__all__ = ["FirstVerdictMonitor"]

_READ_BACK = timedelta(days=1)
_MAX_DELAY = timedelta(minutes=10)
"""Longest time until an event is stored: runs send events in batches."""

_MAX_REMEMBERED = 10_000
_PAGE_EVENTS = 50
_MAX_PAGES = 200
_TIMEOUT_S = 60.0


class FirstVerdictMonitor:
    """Observes the first verdict of each notification once. `timeout_s` limits one poll."""

    def __init__(
        self,
        prefect: PrefectCalls,
        metrics: Metrics,
        failures: Failures,
        *,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._prefect = prefect
        self._metrics = metrics
        self._failures = failures
        self._timeout_s = timeout_s
        self._seen: dict[str, None] = {}  # deliveries that have a verdict, the latest last
        self._failed: dict[object, None] = {}  # ids of events that failed, each recorded once
        self._began = datetime.now(UTC)
        self._since = self._began - _READ_BACK

    async def poll(self) -> None:
        """Read the new events. Raises TimeoutError and the errors of Prefect's client.

        One poll reads at most 10,000 events, and the next one continues there. A window of events
        that cannot be read is read once more at most: the next poll starts 10 minutes back.
        """
        now = datetime.now(UTC)
        try:
            read_to = await self._prefect.call(
                lambda client: self._read(client, now), timeout_s=self._timeout_s
            )
        except (httpx.HTTPError, PrefectException, OSError):
            raise  # Prefect is not available: the next poll reads the same window
        except Exception:
            self._since = max(self._since, now - _MAX_DELAY)
            raise
        self._since = min(read_to, now - _MAX_DELAY)

    async def _read(self, client: PrefectClient, now: datetime) -> datetime:
        """Process the new events and return the time up to which all events were read."""
        pages = 0
        async for events in _pages(client, self._since, now):
            pages += 1
            for event in events:
                self._process(event)
            _shrink(self._seen)
            _shrink(self._failed)
            if pages == _MAX_PAGES and events:
                return max(events[-1].occurred, self._since + timedelta(microseconds=1))
        return now

    def _process(self, event: ReceivedEvent) -> None:
        try:
            self._observe(event)
        except Exception as error:
            if event.id not in self._failed:  # each poll reads it again
                self._failed[event.id] = None
                self._failures.record(FailureSource.EVENT, error, event=str(event.id)[:100])

    def _observe(self, event: ReceivedEvent) -> None:
        origin = Origin.of_payload(event.payload)
        if origin is None:
            return
        first = self._seen.pop(origin.delivery_id, self) is self
        self._seen[origin.delivery_id] = None
        if not first or event.occurred < self._began:
            return
        lag_s = event.occurred.timestamp() - origin.at.timestamp()
        self._metrics.first_verdict(origin.kind, lag_s)
        LOG.info(
            "first verdict",
            extra={
                "delivery": origin.delivery_id,
                "kind": origin.kind,
                "about": str(event.resource.id)[:300],
                "seconds": round(lag_s, 1),
            },
        )


async def _pages(
    client: PrefectClient, since: datetime, until: datetime
) -> AsyncIterator[Sequence[ReceivedEvent]]:
    event_filter = {
        "event": {"name": [Event.ADAPTER_JUDGED]},
        "occurred": {"since": since, "until": until},
        "order": "ASC",
    }
    page = await client.read_events(EventFilter.model_validate(event_filter), limit=_PAGE_EVENTS)
    yield page.events
    for _ in range(_MAX_PAGES - 1):
        if page.next_page is None:
            return
        page = await client.read_events_page(str(page.next_page))
        yield page.events


def _shrink(known: dict) -> None:
    while len(known) > _MAX_REMEMBERED:
        del known[next(iter(known))]
