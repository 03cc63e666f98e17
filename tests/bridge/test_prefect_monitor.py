"""The gauges of Prefect's state, from a client in memory that applies the filters."""

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.bridge.metrics import Metrics
from infra.bridge.prefect_calls import PrefectCalls
from infra.bridge.prefect_monitor import QUEUES, PrefectMonitor
from infra.stack import prefect_objects


def ago(seconds):
    return datetime.now(UTC) - timedelta(seconds=seconds)


def run(flow, queue, state, *, due_s=0.0, ended_s=0.0, created_s=1e6):
    return SimpleNamespace(
        flow=flow,
        queue=queue,
        state=state,
        expected_start_time=ago(due_s),
        end_time=ago(ended_s),
        created=ago(created_s),
    )


class Client:
    def __init__(self, *runs, polled=None, workers=()):
        self.runs, self.polled, self.workers = runs, polled or {}, workers

    async def read_work_queues(self, work_pool_name):
        return [SimpleNamespace(name=n, last_polled=at) for n, at in self.polled.items()]

    async def read_workers_for_work_pool(self, name):
        return [SimpleNamespace(status=status) for status in self.workers]

    async def count_flow_runs(self, **filters):
        return len(self.select(**filters))

    async def read_flow_runs(self, *, sort, limit, **filters):
        found = self.select(**filters)
        if sort == "END_TIME_DESC":
            return sorted(found, key=lambda run: run.end_time, reverse=True)[:limit]
        return sorted(found, key=lambda run: run.expected_start_time)[:limit]

    def select(self, *, flow_run_filter, flow_filter=None, work_queue_filter=None, **_):
        due = flow_run_filter.expected_start_time
        return [
            run
            for run in self.runs
            if run.state in flow_run_filter.state.type.any_
            and (flow_filter is None or run.flow in flow_filter.name.any_)
            and (work_queue_filter is None or run.queue in work_queue_filter.name.any_)
            and (due is None or run.expected_start_time <= due.before_)
        ]


def gauges(client, metrics=None):
    metrics = metrics or Metrics()
    monitor = PrefectMonitor(PrefectCalls(lambda: nullcontext(client)), metrics)
    asyncio.run(monitor.poll())
    return shown(metrics)


def shown(metrics):
    return {
        (sample.name.removeprefix("trans_peft_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_the_queues_are_those_of_the_pool():
    assert set(QUEUES) == set(prefect_objects.QUEUES)


def test_what_waits_and_runs_is_counted_by_queue():
    found = gauges(
        Client(
            run("transfer-shard", "gpu", "SCHEDULED", due_s=90),
            run("transfer-shard", "gpu", "PENDING", due_s=30),
            run("transfer-shard", "gpu", "RUNNING", due_s=900),
            run("train-adapter", "gpu", "SCHEDULED", due_s=-600),  # for later
            run("reconcile", "control", "RUNNING"),
            run("reconcile", "control", "COMPLETED", ended_s=700),
            run("reconcile", "control", "COMPLETED", ended_s=100),
            run("reconcile", "control", "FAILED", ended_s=50),
            polled={"control": ago(2), "gpu": None, "default": None},
            workers=("ONLINE", "OFFLINE"),
        )
    )
    assert found["queue_runs", "gpu", "waiting"] == 2
    assert found["queue_runs", "gpu", "running"] == 1
    assert found["queue_runs", "control", "waiting"] == 0
    assert found["queue_runs", "control", "running"] == 1
    assert found["queue_age_seconds", "gpu"] == pytest.approx(90, abs=30)
    assert found["queue_age_seconds", "control"] == 0
    assert found["queue_poll_age_seconds", "control"] == pytest.approx(2, abs=30)
    assert found["queue_poll_age_seconds", "gpu"] == float("inf")
    assert ("queue_poll_age_seconds", "default") not in found
    assert (found["shards", "waiting"], found["shards", "running"]) == (2, 1)
    assert found["workers_online",] == 1
    ends = "reconcile_end_timestamp_seconds"
    assert found[ends, "completed"] == pytest.approx(ago(100).timestamp(), abs=20)
    assert found[ends, "failed"] == pytest.approx(ago(50).timestamp(), abs=20)
    assert (ends, "crashed") not in found
    assert found["prefect_up",] == 1


def test_without_an_answer_prefect_is_down_and_the_last_numbers_stay():
    metrics = Metrics()
    gauges(Client(workers=("ONLINE",)), metrics)
    broken = Client()
    broken.read_work_queues = None
    with pytest.raises(TypeError):
        gauges(broken, metrics)
    assert (shown(metrics)["prefect_up",], shown(metrics)["workers_online",]) == (0, 1)


def test_a_shard_of_a_promotion_has_waited_since_it_was_created():
    """It is scheduled for an earlier time, so that it goes first."""
    urgent = run("transfer-shard", "gpu", "SCHEDULED", due_s=86_400 + 50, created_s=50)
    found = gauges(Client(urgent))
    assert found["queue_age_seconds", "gpu"] == pytest.approx(50, abs=30)
