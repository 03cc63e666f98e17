"""Which existing run covers a notification, and when a run is created."""

import asyncio
import uuid
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import httpx
import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from infra.bridge.dispatcher import UnavailableError
from infra.bridge.notifications import Notification, NotificationKind
from infra.bridge.prefect_calls import PrefectCalls
from infra.bridge.run_starter import PrefectRunStarter, shorten_retry_after
from tasks.origin import Origin

PARAMETERS = {"family": None, "policy": {"alpha": 0.05}, "wait": False}


def run(family="smol", *, state=StateType.SCHEDULED, age_s=0, **other):
    changed = datetime.now(UTC) - timedelta(seconds=age_s)
    return SimpleNamespace(
        id=uuid.uuid4(),
        parameters={**PARAMETERS, "family": family, **other},
        state=SimpleNamespace(type=state, timestamp=changed),
        state_type=state,
    )


class Client:
    """The methods of Prefect's client that the starter uses, in memory."""

    def __init__(self, *due, error=None):
        self.due, self.error, self.made, self.tags = list(due), error, {}, []

    async def read_deployment_by_name(self, name):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(id=uuid.uuid4(), parameters=PARAMETERS)

    async def read_flow_runs(self, *, flow_run_filter, sort):
        return self.due

    async def create_flow_run_from_deployment(self, _, *, parameters, idempotency_key, tags):
        made = run(parameters["family"])
        self.tags.append(tags)
        return self.made.setdefault(idempotency_key, made)


AT = datetime(2026, 1, 1, tzinfo=UTC)


def notification(name, delivery_id):
    return Notification(NotificationKind.CHAMPION, name, delivery_id, "champion", AT)


def calls_to(client):
    return PrefectCalls(lambda: nullcontext(client))


def start_runs(client, wanted):
    """Start runs for a mapping of families to delivery ids."""
    notifications = {
        family: notification(family or "", delivery) for family, delivery in wanted.items()
    }
    return asyncio.run(PrefectRunStarter(calls_to(client)).start(notifications))


def start_run(client, family="smol", delivery_id="d1"):
    return start_runs(client, {family: delivery_id})[family]


@pytest.mark.parametrize("family", ["smol", None])
@pytest.mark.parametrize("state", [StateType.SCHEDULED, StateType.PENDING])
def test_a_run_of_the_family_or_of_all_families_that_has_not_begun_is_reused(family, state):
    waiting = run(family, state=state)
    client = Client(waiting)
    assert start_run(client).id == str(waiting.id)
    assert client.made == {}


@pytest.mark.parametrize(
    "other",
    [
        run("another"),
        run(dry_run=True),
        run(policy={"alpha": 0.2}),
        run(state=StateType.PENDING, age_s=61),
    ],
)
def test_other_runs_are_not_reused(other):
    client = Client(other)
    made = start_run(client)
    assert made.delivery_id == "d1"
    assert made.id != str(other.id)
    assert list(client.made) == ["notification-d1"]


def test_a_run_of_one_family_is_not_reused_for_all_families():
    assert start_run(Client(run("smol")), family=None).delivery_id


def test_a_repeated_delivery_finds_its_run_and_whether_that_has_begun():
    client = Client()
    first = start_run(client)
    assert not first.has_begun
    client.made["notification-d1"].state_type = StateType.COMPLETED
    again = start_run(client)
    assert (again.id, again.has_begun) == (first.id, True)


def test_four_families_at_once_get_a_run_each_and_five_share_one():
    client = Client()
    runs = start_runs(client, {f"f{n}": f"d{n}" for n in range(4)})
    assert [made.parameters["family"] for made in client.made.values()] == ["f0", "f1", "f2", "f3"]
    assert len({run.id for run in runs.values()}) == 4

    client = Client()
    runs = start_runs(client, {f"f{n}": f"d{n}" for n in range(5)})
    ((key, made),) = client.made.items()
    assert (key, made.parameters["family"]) == ("notification-d0", None)
    assert {run.id for run in runs.values()} == {str(made.id)}


def test_a_request_for_all_families_covers_a_request_for_one():
    client = Client()
    runs = start_runs(client, {"smol": "d1", None: "d2"})
    ((key, made),) = client.made.items()
    assert (key, made.parameters["family"]) == ("notification-d2", None)
    assert {run.id for run in runs.values()} == {str(made.id)}


def test_families_with_a_waiting_run_do_not_count_towards_a_shared_run():
    waiting = run("f0")
    client = Client(waiting)
    runs = start_runs(client, {f"f{n}": f"d{n}" for n in range(5)})
    assert runs["f0"].id == str(waiting.id)
    assert len(client.made) == 4


def test_a_key_that_was_used_for_one_family_does_not_cover_another():
    """A repeated delivery may be the first of many families."""
    client = Client()
    old = client.made["notification-d0"] = run("f0")
    runs = start_runs(client, {f"f{n}": f"d{n}" for n in range(5)})
    assert {(r.id, r.delivery_id, r.has_begun) for r in runs.values()} == {
        (str(old.id), "d0", True)
    }
    assert runs["f0"].answers(notification("f0", "d0"))
    assert not runs["f1"].answers(notification("f1", "d1"))


def test_a_run_is_tagged_with_its_notification():
    client = Client()
    start_run(client)
    assert client.tags == [["notification:d1", "notified:champion:2026-01-01T00:00:00+00:00"]]
    assert Origin.of_tags(client.tags[0]) == Origin("d1", "champion", AT)


def test_a_busy_server_gets_a_short_retry_after():
    busy, well = httpx.Response(503), httpx.Response(200)
    for response in (busy, well):
        asyncio.run(shorten_retry_after(response))
    assert (busy.headers.get("Retry-After"), well.headers.get("Retry-After")) == ("0.5", None)


def test_the_cause_is_in_the_error_without_credentials():
    class Down(Client):
        async def read_flow_runs(self, **_):
            raise httpx.ConnectError("no route to http://me:secret@prefect:4200/api\nat all")

    with pytest.raises(UnavailableError) as raised:
        start_run(Down())
    cause = "Prefect: ConnectError: no route to http://prefect:4200/api at all"
    assert str(raised.value) == cause
    assert len(str(UnavailableError.because("MLflow", OSError("x" * 9999)))) == 500


def test_prefect_is_unavailable_after_the_timeout():
    class Slow(Client):
        async def read_flow_runs(self, **_):
            await asyncio.sleep(5)

    with pytest.raises(UnavailableError, match="TimeoutError"):
        asyncio.run(
            PrefectRunStarter(calls_to(Slow()), timeout_s=0.05).start(
                {"smol": notification("smol", "d1")}
            )
        )


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("no"), ObjectNotFound(Exception("no")), OSError("no")]
)
def test_any_error_of_prefect_is_unavailable(error):
    with pytest.raises(UnavailableError, match="Prefect"):
        start_run(Client(error=error))
    assert asyncio.run(PrefectRunStarter(calls_to(Client(error=error))).is_reachable()) is False
