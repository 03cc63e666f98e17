"""Which run answers a hint: the rule, on runs as Prefect describes them."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import httpx
import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from infra.bridge.desk import UnavailableError
from infra.bridge.starter import PrefectStarter

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
    """As much of Prefect's client as the starter asks, in memory."""

    def __init__(self, *due, error=None):
        self.due, self.error, self.made, self.asked = list(due), error, {}, 0

    async def read_deployment_by_name(self, name):
        await asyncio.sleep(0.002)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(id=uuid.uuid4(), parameters=PARAMETERS)

    async def read_flow_runs(self, *, flow_run_filter, sort):
        self.asked += 1
        await asyncio.sleep(0.002)
        return self.due

    async def create_flow_run_from_deployment(self, _, *, parameters, idempotency_key, tags):
        made = run(parameters["family"])
        return self.made.setdefault(idempotency_key, made)


def started(client, family="smol", delivery_id="d1"):
    return asyncio.run(PrefectStarter(client).start(family, delivery_id))


@pytest.mark.parametrize("family", ["smol", None])
@pytest.mark.parametrize("state", [StateType.SCHEDULED, StateType.PENDING])
def test_a_run_of_the_family_or_of_all_that_has_not_begun_answers(family, state):
    waiting = run(family, state=state)
    client = Client(waiting)
    assert started(client).id == str(waiting.id)
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
def test_no_other_run_answers(other):
    client = Client(other)
    made = started(client)
    assert made.made
    assert made.id != str(other.id)
    assert list(client.made) == ["hint-d1"]


def test_a_run_of_one_family_does_not_answer_for_all():
    assert started(Client(run("smol")), family=None).made


def test_the_same_delivery_again_is_the_same_run_and_begun_once_it_began():
    client = Client()
    first = started(client)
    assert not first.begun
    client.made["hint-d1"].state_type = StateType.COMPLETED
    again = started(client)
    assert (again.id, again.begun) == (first.id, True)


def test_families_that_ask_at_once_share_a_look():
    client = Client()

    async def burst():
        starter = PrefectStarter(client)
        return await asyncio.gather(*(starter.start(f"f{n}", f"d{n}") for n in range(50)))

    assert len({run.id for run in asyncio.run(burst())}) == 50
    assert client.asked == 1


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("no"), ObjectNotFound(Exception("no")), OSError("no")]
)
def test_whatever_keeps_prefect_from_answering_is_unavailable(error):
    with pytest.raises(UnavailableError, match="Prefect"):
        started(Client(error=error))
    assert asyncio.run(PrefectStarter(Client(error=error)).reachable()) is False
