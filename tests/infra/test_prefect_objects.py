"""The objects that a Prefect server needs, on a server in this process."""

import asyncio
import shutil
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Running, Scheduled
from prefect.testing.utilities import prefect_test_harness

from infra.stack.interrupted import WORKER, crash_interrupted_runs
from infra.stack.job_template import kubernetes_job_template
from infra.stack.prefect_objects import START_AUTOMATION, ZOMBIE_AUTOMATION, register
from tasks.limits import gpu_slots
from trans_peft.domain.conventions import GPU_LIMIT, WORK_POOL
from trans_peft.errors import InvalidSpecError

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"

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


def test_a_run_takes_as_many_slots_as_it_has_processes():
    async def used():
        async with get_client() as client:
            return (await client.read_global_concurrency_limit_by_name(GPU_LIMIT)).active_slots

    async def registered():
        async with get_client() as client:
            await register(client, gpu_slots=4)

    asyncio.run(registered())
    with gpu_slots(3):
        assert asyncio.run(used()) == 3
        with gpu_slots():
            assert asyncio.run(used()) == 4
    assert asyncio.run(used()) == 0
    with pytest.raises(InvalidSpecError, match="cannot get 5 GPU slots"), gpu_slots(5):
        pass


def test_a_kubernetes_pool_gets_the_template_and_its_patches(tmp_path):
    folder = tmp_path / "template"
    folder.mkdir()
    shutil.copy(KUBERNETES / "base" / "base-job-template.json", folder)
    shutil.copy(KUBERNETES / "components" / "cache" / "cache.patch.json", folder)
    template = kubernetes_job_template(folder, "registry.example.com/worker:1")

    async def registered():
        async with get_client() as client:
            with suppress(ObjectNotFound):
                await client.delete_work_pool(WORK_POOL)
            await register(client, 1, template)
            first = await client.read_work_pool(WORK_POOL)
            await client.update_work_pool(WORK_POOL, WorkPoolUpdate(base_job_template={}))
            await register(client, 1, template)
            return first, await client.read_work_pool(WORK_POOL)

    first, second = asyncio.run(registered())
    assert first.type == "kubernetes"
    assert first.base_job_template == second.base_job_template == template
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "registry.example.com/worker:1"
    assert {"name": "state", "persistentVolumeClaim": {"claimName": "state"}} in pod["volumes"]
    assert "state_size" not in template["variables"]["properties"]


def test_runs_are_not_marked_as_interrupted_while_a_worker_of_another_host_is_online():
    server = get_current_settings().api.url.removesuffix("/api")
    stack = SimpleNamespace(
        prefect_client=lambda timeout_s: httpx.Client(base_url=server, timeout=timeout_s)
    )

    @flow
    def work() -> None:
        pass

    async def run_after_restart(other_worker):
        async with get_client() as client:
            await register(client, gpu_slots=1)
            run = await client.create_flow_run(
                work, state=Running(), work_pool_name=WORK_POOL, work_queue_name="gpu"
            )
            await client.send_worker_heartbeat(WORK_POOL, WORKER)
            if other_worker:
                await client.send_worker_heartbeat(WORK_POOL, other_worker)
            await asyncio.to_thread(crash_interrupted_runs, stack)
            return (await client.read_flow_run(run.id)).state_name

    assert asyncio.run(run_after_restart(None)) == "Crashed"
    assert asyncio.run(run_after_restart("ProcessWorker of another host")) == "Running"


def test_the_runs_of_a_queue_start_in_the_order_of_their_scheduled_times():
    """Shards of a promotion rely on it (`tasks.shards.start`)."""

    @flow
    def work() -> None:
        pass

    async def order(hours):
        async with get_client() as client:
            await register(client, gpu_slots=8)
            for ago in hours:
                scheduled = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=ago))
                await client.create_flow_run(
                    work,
                    name=f"{ago}",
                    state=scheduled,
                    work_pool_name=WORK_POOL,
                    work_queue_name="gpu",
                )
            found = await client.get_scheduled_flow_runs_for_work_pool(
                WORK_POOL, work_queue_names=["gpu"], scheduled_before=datetime.now(UTC)
            )
            return [one.flow_run.name for one in found]

    assert asyncio.run(order([1, 24, 0, 30])) == ["30", "24", "1", "0"]
