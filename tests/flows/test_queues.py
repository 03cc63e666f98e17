"""A queue that no worker serves is reported after a minute, once, and so is its end."""

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import WorkQueueStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Scheduled

from tasks import queues, shards
from tasks.queues import QueueWatch, unserved
from tasks.shards import Shard

POLLED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Client:
    """Prefect with one queue and the runs that wait in it."""

    def __init__(self, status=WorkQueueStatus.NOT_READY, last_polled=None):
        self.status, self.last_polled = status, last_polled
        self.states, self.reads = {}, 0

    def read_work_queue_by_name(self, name, *, work_pool_name):
        assert (name, work_pool_name) == ("gpu", "trans-peft")
        if self.status is None:
            raise ObjectNotFound(Exception("404"))
        return SimpleNamespace(status=self.status, last_polled=self.last_polled)

    def read_flow_runs(self, *, flow_run_filter, limit):
        self.reads += 1
        wanted = flow_run_filter.id.any_
        assert len(wanted) <= limit == 200
        return [run(self.states[key], run_id=key) for key in wanted if key in self.states]


def run(state=None, due_s=90.0, run_id=None):
    return SimpleNamespace(
        id=run_id or uuid4(),
        name="judge small/v2",
        state=state or Scheduled(),
        start_time=None,
        created=datetime.now(UTC) - timedelta(seconds=due_s),
        work_queue_name="gpu",
        work_pool_name="trans-peft",
    )


@pytest.mark.parametrize(
    ("status", "polled", "found"),
    [
        (WorkQueueStatus.NOT_READY, None, "no worker has ever polled it; runs that wait: 1"),
        (WorkQueueStatus.NOT_READY, POLLED, "the last poll was at 2026-01-02 03:04:05 UTC"),
        (WorkQueueStatus.PAUSED, POLLED, "the queue is paused"),
        (None, None, "there is no such queue"),
    ],
)
def test_the_reason_is_named(status, polled, found):
    text = unserved([run()], Client(status, polled))
    assert text.startswith("no worker serves the queue gpu of the work pool trans-peft")
    assert f"found:    {found}" in text
    assert "do:       " in text


def test_a_served_queue_and_no_waiting_run_are_no_problem():
    assert unserved([run()], Client(WorkQueueStatus.READY, POLLED)) == ""
    assert unserved([], Client()) == ""


def test_it_is_reported_once_after_a_minute_and_again_when_it_ends():
    now, seen, client = [0.0], [], Client()
    watch = QueueWatch(seen.append, lambda: now[0])
    for now[0] in range(0, 60, 2):
        watch.check([run()], client)
    assert seen == []
    for now[0] in range(60, 120, 2):
        watch.check([run()], client)
    assert [text[:16] for text in seen] == ["no worker serves"]
    client.status = WorkQueueStatus.READY
    for now[0] in range(120, 180, 2):
        watch.check([run()], client)
    assert seen[1:] == [""]


@pytest.fixture
def client(monkeypatch):
    """Prefect in `wait`. `at` is called after each poll with the time in seconds."""
    client, now = Client(), [0.0]
    client.at = lambda now: None

    def sleep(seconds):
        now[0] += seconds
        client.at(now[0])

    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    monkeypatch.setattr(shards.time, "sleep", sleep)
    monkeypatch.setattr(shards, "_now", lambda: POLLED + timedelta(seconds=now[0]))
    client.completed = lambda: Completed(timestamp=shards._now())
    client.watch = lambda tell: QueueWatch(tell, lambda: now[0])
    monkeypatch.setattr(shards, "get_run_logger", lambda: SimpleNamespace(info=lambda *_: None))
    monkeypatch.setattr(shards, "gpu_slot_count", lambda: 32)
    client.now = now
    return client


def waiting_shards(client, count):
    found = [Shard(uuid4(), ()) for _ in range(count)]
    client.states |= {shard.run_id: Scheduled() for shard in found}
    return found


def test_a_wait_ends_when_enough_shards_have_ended_and_costs_one_request_a_poll(client):
    some = waiting_shards(client, 150)

    def end_two(now):
        ended = some[int(now) - 2 : int(now)]
        client.states |= {shard.run_id: client.completed() for shard in ended}

    client.at = end_two
    name, ended = shards.wait({"small": some}, client.watch(print))
    assert (name, len(ended)) == ("small", 32)
    assert client.reads == 16 + 1


def test_a_wait_ends_a_minute_after_the_first_shard_if_fewer_have_ended(client):
    first, second, *_ = some = waiting_shards(client, 10)

    def end(now):
        if now == 100:
            client.states[first.run_id] = client.completed()
        if now == 150:
            client.states[second.run_id] = client.completed()

    client.at = end
    _, ended = shards.wait({"small": some}, client.watch(print))
    assert (client.now[0], len(ended)) == (160.0, 2)


def test_the_minute_of_a_group_begins_when_its_shard_ended_whatever_other_groups_do(client):
    """A run that reads another family for 50 s returns to a family after 10 s."""
    large, small = waiting_shards(client, 3), waiting_shards(client, 10)

    def end(now):
        client.states |= {shard.run_id: client.completed() for shard in large}

    client.states[small[0].run_id] = client.completed()
    client.at = end
    groups = {"large": large, "small": small}
    assert shards.wait(groups, client.watch(print))[0] == "large"
    client.now[0] += 50
    del groups["large"]
    name, ended = shards.wait(groups, client.watch(print))
    assert (name, len(ended), client.now[0]) == ("small", 1, 60.0)


def test_a_deleted_run_counts_as_cancelled(client):
    kept, deleted = waiting_shards(client, 2)
    client.states[kept.run_id] = client.completed()
    del client.states[deleted.run_id]
    _, ended = shards.wait({"small": [kept, deleted]}, client.watch(print))
    assert [(one.state_name, one.is_cancelled) for one in ended] == [
        ("Completed", False), ("deleted", True),
    ]  # fmt: skip


def test_a_reconcile_that_waits_reports_it_and_goes_on_waiting(client):
    (shard,) = waiting_shards(client, 1)
    now, seen = client.now, []

    def end(now):
        if now > 100:
            client.states[shard.run_id] = client.completed()

    client.at = end
    name, (ended,) = shards.wait(
        {"small": [shard]}, client.watch(lambda t: seen.append((now[0], t)))
    )
    assert (name, ended.state_name) == ("small", "Completed")
    assert [at for at, _ in seen] == [60.0]


def test_one_watch_reports_over_several_waits(client):
    """A wait may be shorter than a minute."""
    shards_, seen = waiting_shards(client, 3), []
    watch = client.watch(lambda text: seen.append((client.now[0], bool(text))))
    for number, one in enumerate(shards_):

        def end(now, number=number, one=one):
            if now >= 40 * (number + 1):
                client.states[one.run_id] = client.completed()

        client.at = end
        shards.wait({"small": [one]}, watch)
    assert seen == [(60.0, True)]


@pytest.mark.parametrize(("due_s", "is_reported"), [(90, True), (5, False)])
def test_shards_of_other_runs_are_checked_when_they_have_waited_for_a_minute(
    monkeypatch, due_s, is_reported
):
    client = Client()
    waiting = Shard(uuid4(), (), is_waiting=True)
    client.read_flow_runs = lambda **_: [run(due_s=due_s, run_id=waiting.run_id)]
    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    assert bool(shards.why_unserved([Shard(uuid4(), ()), waiting])) is is_reported
    assert shards.why_unserved([Shard(uuid4(), ())]) == ""
    assert queues.UNSERVED_AFTER_S == 60


def test_a_shard_whose_run_was_deleted_is_not_checked_and_not_withdrawn(monkeypatch):
    client = Client()
    deleted, waiting = (Shard(uuid4(), (), is_waiting=True) for _ in range(2))
    client.states[waiting.run_id] = Scheduled()
    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    assert "no worker serves" in shards.why_unserved([deleted, waiting])
    shards.cancel_shard(deleted)
