"""How long it takes from a hint to its first verdict: asked of Prefect's events, now and then.

The bridge sees no verdict. `tasks/events.py` tells each one to Prefect, with the hint that its run
goes back to; the first for a hint is counted here. Verdicts that were told while no bridge ran are
not counted, and of several bridges each counts all.
"""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.events.filters import EventFilter
from prefect.events.schemas.events import ReceivedEvent
from prefect.exceptions import PrefectException

from infra.bridge.logs import LOG
from infra.bridge.metrics import Metrics
from tasks.origin import Origin

__all__ = ["Verdicts", "watch"]

_JUDGED = "trans-peft.adapter.judged"
_KNOWN_AT_START = timedelta(days=1)
_LATE = timedelta(minutes=10)
"""How long after it happened an event may be stored: a run sends them in batches."""

_MOST_HINTS = 10_000
_PAGE = 50


class Verdicts:
    """Notes the first verdict of each hint once."""

    def __init__(self, client: PrefectClient, metrics: Metrics) -> None:
        self._client = client
        self._metrics = metrics
        self._answered: dict[str, None] = {}  # hints that have a verdict, the latest heard of last
        self._began = datetime.now(UTC)
        self._since = self._began - _KNOWN_AT_START

    async def look(self) -> None:
        """Ask for what is new. httpx.HTTPError, PrefectException."""
        now = datetime.now(UTC)
        for event in await self._told(self._since, now):
            found = Origin.of_payload(event.payload)
            if found is None:
                continue
            first = self._answered.pop(found.delivery_id, self) is self
            self._answered[found.delivery_id] = None
            if first and event.occurred >= self._began:
                lag_s = event.occurred.timestamp() - found.at.timestamp()
                self._metrics.first_verdict(found.kind, lag_s)
                LOG.info(
                    "first verdict",
                    extra={
                        "delivery": found.delivery_id,
                        "kind": found.kind,
                        "about": event.resource.id,
                        "seconds": round(lag_s, 1),
                    },
                )
        while len(self._answered) > _MOST_HINTS:
            del self._answered[next(iter(self._answered))]
        self._since = now - _LATE

    async def _told(self, since: datetime, until: datetime) -> list[ReceivedEvent]:
        wanted = {
            "event": {"name": [_JUDGED]},
            "occurred": {"since": since, "until": until},
            "order": "ASC",
        }
        page = await self._client.read_events(EventFilter.model_validate(wanted), limit=_PAGE)
        told = list(page.events)
        while page.next_page is not None:
            page = await self._client.read_events_page(str(page.next_page))
            told += page.events
        return told


async def watch(verdicts: Verdicts, *, every_s: float = 15.0) -> None:
    """Look for ever; a Prefect that does not answer is asked again."""
    while True:
        try:
            await verdicts.look()
        except (httpx.HTTPError, PrefectException, OSError) as error:
            LOG.warning("no events from Prefect", extra={"why": type(error).__name__})
        await asyncio.sleep(every_s)
