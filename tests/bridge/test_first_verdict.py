"""From a notification to its first verdict: tags of runs, events of verdicts, the metric."""

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.events import Event

from infra.bridge.first_verdict import FirstVerdictMonitor
from infra.bridge.loops import Failures
from infra.bridge.metrics import Metrics
from infra.bridge.prefect_calls import PrefectCalls
from tasks import events, origin, shards
from tasks.origin import Origin
from tests.edges.examples import draft, outcome, peft_folder
from trans_peft.domain.base import BaseRef
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.outcome import Reason, TransferTask

NOW = datetime.now(UTC)
NOTIFICATION = Origin("d-1", "upload", NOW - timedelta(seconds=40))


@pytest.fixture
def sent_events(monkeypatch):
    """The events that a run with the tags of `NOTIFICATION` sends."""
    sent = []
    monkeypatch.setattr(
        events, "emit_event", lambda event, **rest: sent.append(Event(event=event, **rest))
    )
    monkeypatch.setattr(origin, "runtime", running([*NOTIFICATION.tags, "family:smol"]))
    return sent


def running(tags):
    return SimpleNamespace(flow_run=SimpleNamespace(tags=tags))


class Client:
    """Prefect's events, two to a page."""

    def __init__(self, *stored):
        self.stored = list(stored)

    async def read_events(self, wanted, limit):
        found = [event for event in self.stored if wanted.includes(event)]
        self._rest = sorted(found, key=lambda event: event.occurred)
        return await self.read_events_page("the first")

    async def read_events_page(self, _):
        page, self._rest = self._rest[:2], self._rest[2:]
        return SimpleNamespace(events=page, next_page="http://p/next" if self._rest else None)


def judged(notification="d-1", *, lag_s=40, ago_s=0):
    at = datetime.now(UTC) - timedelta(seconds=ago_s)
    return Event(
        event="trans-peft.adapter.judged",
        resource={"prefect.resource.id": "trans-peft.adapter.chat"},
        payload=Origin(notification, "upload", at - timedelta(seconds=lag_s)).payload
        if notification
        else {},
        occurred=at,
    )


def lags(metrics):
    """Return how many verdicts were first, and the sum of their lags in seconds."""
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines())
    name = "trans_peft_first_verdict_lag_seconds"
    count, total = (lines.get(f'{name}_{what}{{kind="upload"}}', 0) for what in ("count", "sum"))
    return float(count), round(float(total))


def monitor_of(client, metrics):
    return FirstVerdictMonitor(
        PrefectCalls(lambda: nullcontext(client)), metrics, Failures(metrics)
    )


def polled(*stored, again=()):
    """Poll events that came shortly after the start, then poll again with more of them."""

    async def scenario():
        client, metrics = Client(*stored), Metrics()
        verdicts = monitor_of(client, metrics)
        verdicts._began -= timedelta(minutes=10)
        await verdicts.poll()
        client.stored += again
        await verdicts.poll()
        return lags(metrics)

    return asyncio.run(scenario())


def test_tags_and_payload_are_parsed_back():
    assert (
        Origin.of_tags(NOTIFICATION.tags) == Origin.of_payload(NOTIFICATION.payload) == NOTIFICATION
    )
    assert Origin.of_tags(
        ["notification:a:b=c", "notified:start-up:2026-01-01T00:00:00+00:00"]
    ) == Origin("a:b=c", "start-up", datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    "tags",
    [
        [],
        ["family:x"],
        ["notification:d"],
        ["notification:d", "notified:x"],
        ["notification:", NOTIFICATION.tags[1]],
    ],
)
def test_incomplete_tags_are_no_origin(tags):
    assert Origin.of_tags(tags) is None


def test_a_run_passes_on_the_tags_of_its_notification_only(sent_events):
    assert origin.inherited_tags() == NOTIFICATION.tags


def test_a_shard_inherits_the_notification_of_the_run_that_started_it(sent_events, monkeypatch):
    started = []
    made = SimpleNamespace(id=uuid4(), state=None)
    monkeypatch.setattr(shards, "run_deployment", lambda name, **rest: started.append(rest) or made)
    base = BaseRef("smol", "v2", "2" * 64)
    shards.start((TransferTask("chat", 1, base, Reason.NO_VERDICT),), GatePolicy(), size=16)
    (run,) = started
    assert run["flow_run_name"] == "judge smol/v2"
    assert {*NOTIFICATION.tags, "family:smol"} < {*run["tags"]}
    assert Origin.of_tags(run["tags"]) == NOTIFICATION


def test_a_run_outside_of_prefect_has_no_origin():
    assert origin.origin() is None
    assert origin.inherited_tags() == []


def test_an_event_names_the_notification_that_caused_its_run(sent_events, tmp_path):
    source = draft("chat", "smol", peft_folder(tmp_path / "peft"))
    events.adapter_judged(outcome(source, Verdict.PASSED, new_number=2))
    events.base_refused("smol/3", "s3://b/x", "why")
    assert [Origin.of_payload(event.payload) for event in sent_events] == [
        NOTIFICATION,
        NOTIFICATION,
    ]


def test_the_event_that_a_run_sends_is_the_one_that_is_counted(sent_events, tmp_path):
    source = draft("chat", "smol", peft_folder(tmp_path / "peft"))
    events.adapter_judged(outcome(source, Verdict.PASSED, new_number=2))
    count, lag_s = polled(*sent_events)
    assert count == 1
    assert lag_s >= 40


def test_the_first_verdict_of_each_notification_is_counted_once():
    stored = [judged(ago_s=2, lag_s=38), judged(ago_s=0, lag_s=40), judged("d-2", ago_s=1)]
    late = [judged(ago_s=3, lag_s=37), judged("d-3", ago_s=0, lag_s=7)]
    assert polled(*stored) == (2, 38 + 40)
    assert polled(*stored, again=late) == (3, 38 + 40 + 7)


def test_verdicts_from_before_the_bridge_started_are_not_counted():
    assert polled(judged(ago_s=3600), judged(ago_s=0)) == (0, 0)


def test_a_verdict_without_a_notification_is_not_counted():
    assert polled(judged(notification=None)) == (0, 0)
