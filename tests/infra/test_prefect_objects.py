"""The objects that a Prefect server needs, on a server in this process."""

import asyncio
from datetime import timedelta

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from infra.stack.prefect_objects import START_AUTOMATION, ZOMBIE_AUTOMATION, register

pytestmark = [pytest.mark.servers, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def server():
    with prefect_test_harness(server_startup_timeout=240):
        yield


def test_registering_again_updates_an_automation_only_if_it_differs(monkeypatch):
    """An update forgets the heartbeats that the server has seen."""
    older = ZOMBIE_AUTOMATION.model_copy(deep=True)
    older.trigger.within = timedelta(seconds=90)
    older.actions[0].message = "The run sent no heartbeat for 90 s."

    async def registered():
        async with get_client() as client:
            updates = []
            update = client.update_automation

            async def recorded(automation_id, automation):
                updates.append(automation.trigger.within)
                await update(automation_id, automation)

            monkeypatch.setattr(client, "update_automation", recorded)
            await client.create_automation(older)
            for _ in range(2):
                await register(client, gpu_slots=1)
            return (
                updates,
                await client.read_automations_by_name(ZOMBIE_AUTOMATION.name),
                await client.read_automations_by_name(START_AUTOMATION.name),
            )

    updates, (found,), (start,) = asyncio.run(registered())
    assert updates == [ZOMBIE_AUTOMATION.trigger.within]
    assert found.trigger == ZOMBIE_AUTOMATION.trigger
    assert found.actions == ZOMBIE_AUTOMATION.actions
    assert start.trigger == START_AUTOMATION.trigger
