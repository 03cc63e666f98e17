"""How tasks are divided into shards, which are withdrawn, and what counts when one is killed."""

import json
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.responses import SetStateStatus

from tasks import shards
from tasks.shards import (
    EndedShard,
    Shard,
    interrupted_transfers,
    missing,
    obsolete_shards,
    split_into_shards,
    unfinished_tasks,
)
from tasks.transfer import transfer_adapter
from trans_peft.domain.base import BaseRef
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.identity import json_value
from trans_peft.domain.outcome import Plan, Reason, TransferTask

V2, V3 = BaseRef("small", "v2", "2" * 64), BaseRef("small", "v3", "3" * 64)
TASKS = st.lists(
    st.builds(
        TransferTask,
        adapter=st.text("abc", min_size=1, max_size=3),
        source_number=st.just(1),
        base=st.sampled_from([V2, V3]),
        reason=st.just(Reason.NO_VERDICT),
    ),
    unique=True,
    max_size=20,
)


def task(adapter: str, base: BaseRef = V2, attempt: int = 1) -> TransferTask:
    return TransferTask(adapter, 1, base, Reason.NO_VERDICT, attempt)


def shard(*items: TransferTask, is_waiting: bool = True, **options: bool) -> Shard:
    return Shard(uuid4(), items, is_waiting, **options)


def plan(*items: TransferTask, awaited: BaseRef | None = None) -> Plan:
    return Plan("small", items, awaited=awaited)


A, B, C = task("a"), task("b"), task("c")
NEWER = task("a", V3)
CRASHED = EndedShard(
    "shard", (A, B, C), "Crashed",
    never_ran=False, is_cancelled=False, is_crashed=True, one_by_one=True,
)  # fmt: skip


@given(TASKS, st.integers(1, 5))
def test_each_transfer_is_in_one_shard_of_one_base(tasks, size):
    parts = split_into_shards(tasks, size)
    assert sorted(map(str, (item for part in parts for item in part))) == sorted(map(str, tasks))
    assert all(1 <= len(part) <= 8 * size for part in parts)
    assert all(len({item.base for item in part}) == 1 for part in parts)


@pytest.mark.parametrize(
    ("count", "seconds", "slots", "lengths"),
    [
        (40, None, 1, [16, 16, 8]),  # nothing is known
        (40, 60.0, 1, [16, 16, 8]),  # 16 minutes
        (40, 0.5, 1, [20, 20]),  # two for each slot
        (40, 0.5, 3, [16, 16, 8]),
        (1000, 0.5, 1, [128] * 7 + [104]),
        (1000, 10.0, 1, [60] * 16 + [40]),  # ten minutes
        (1000, 0.5, 16, [32] * 31 + [8]),
        (3, 0.5, 1, [3]),
        (40, 0.5, 0, [20, 20]),  # no slots: a person empties the pool
        (40, 0.0, 1, [16, 16, 8]),  # stored results say nothing about the others
    ],
)
def test_short_transfers_share_a_shard(count, seconds, slots, lengths):
    """All transfers but the first have no estimate, as in a plan of many."""
    first, *others = (task(f"a{number}") for number in range(count))
    tasks = [replace(first, estimated_seconds=seconds), *others]
    assert [len(part) for part in split_into_shards(tasks, 16, slots)] == lengths


def test_a_long_shard_names_how_many_adapters_are_evaluated_together(monkeypatch):
    started = []

    def run_deployment(name, parameters, **given):
        started.append(parameters)
        return SimpleNamespace(id=uuid4(), state=None)

    monkeypatch.setattr(shards, "run_deployment", run_deployment)
    for size in (2, 3):
        shards.start((A, B, C), GatePolicy(), size=size)
    assert [given.get("size") for given in started] == [2, None]  # None as older workers know it


@given(TASKS, st.data())
def test_a_task_in_a_shard_is_not_missing_even_if_its_estimate_changed(tasks, data):
    taken = data.draw(st.integers(0, len(tasks)))
    with_cost_estimates = [replace(item, estimated_seconds=3.0) for item in tasks[:taken]]
    assert missing(plan(*tasks), [shard(*with_cost_estimates)]) == tuple(tasks[taken:])


def test_a_transfer_in_an_outdated_shard_is_missing():
    assert missing(plan(A, B), [shard(A, is_outdated=True), shard(B)]) == (A,)


@pytest.mark.parametrize(
    ("planned", "waiting", "withdrawn"),
    [
        (plan(A, B), shard(A, B), False),
        (plan(A), shard(A, B), True),  # b was retired, or judged by another process
        (plan(task("a", attempt=2)), shard(A), True),
        (plan(), shard(A), True),
        (plan(NEWER, A), shard(A), True),  # a newer base comes first in the queue
        (plan(A, NEWER), shard(A), False),
        (plan(NEWER, A), shard(A, is_waiting=False), False),  # it checks again before each adapter
        (plan(), shard(A, is_waiting=False), False),
        (plan(A, awaited=V2), shard(A), True),  # started before the promotion
        (plan(A, awaited=V2), shard(A, is_urgent=True), False),
        (plan(A, awaited=V2), shard(A, is_waiting=False), False),
        (plan(A, awaited=V3), shard(A), False),
        (plan(A), shard(A, is_outdated=True), True),  # by a policy from before a change
        (plan(A), shard(A, is_outdated=True, is_waiting=False), False),  # it skips its transfers
    ],
)
def test_a_waiting_shard_is_withdrawn_if_it_is_not_needed_next(planned, waiting, withdrawn):
    assert obsolete_shards(planned, [waiting]) == ((waiting,) if withdrawn else ())


@pytest.mark.parametrize("is_urgent", [False, True])
def test_a_shard_of_a_promotion_is_scheduled_before_all_others(monkeypatch, is_urgent):
    started = []

    def run_deployment(name, **given):
        started.append(given)
        return SimpleNamespace(id=uuid4(), state=None)

    monkeypatch.setattr(shards, "run_deployment", run_deployment)
    assert shards.start((A, B), GatePolicy(), size=2, is_urgent=is_urgent).is_urgent is is_urgent
    (given,) = started
    run = SimpleNamespace(id=uuid4(), state=None, **given)
    (found,) = shards._shards([run], f"policy:{GatePolicy().sha256[:12]}")
    assert (found.is_urgent, found.is_outdated) == (is_urgent, False)
    (found,) = shards._shards([run], f"policy:{GatePolicy(label='june').sha256[:12]}")
    assert (found.is_urgent, found.is_outdated) == (is_urgent, True)
    if is_urgent:
        ahead = datetime.now(UTC) - given["scheduled_time"]
        assert timedelta(days=1) <= ahead < timedelta(days=1, minutes=5)
    else:
        assert given["scheduled_time"] is None  # now


def test_a_transfer_that_is_not_started_again_comes_before_no_shard():
    """Otherwise two runs that have given it up would withdraw each other's shards for ever."""
    assert obsolete_shards(plan(NEWER, A), [shard(A)], {NEWER.key: "its shard failed"}) == ()


def test_a_shard_is_kept_if_the_task_on_the_newer_base_is_active():
    assert obsolete_shards(plan(NEWER, A), [shard(NEWER), shard(A)]) == ()


@given(TASKS, st.integers(1, 5))
def test_no_shard_is_withdrawn_if_all_tasks_are_active(tasks, size):
    shards = [shard(*part) for part in split_into_shards(tasks, size)]
    assert obsolete_shards(plan(*tasks), shards) == ()


@given(TASKS.filter(len), st.data())
def test_only_the_current_transfer_of_a_crashed_shard_counts_as_an_attempt(tasks, data):
    on_base = split_into_shards(tasks, len(tasks))[0]
    done = data.draw(st.integers(0, len(on_base)))
    left = plan(*on_base[done:])
    crashed = replace(CRASHED, tasks=on_base)
    assert interrupted_transfers([crashed], left) == on_base[done : done + 1]
    for other in ({"is_crashed": False}, {"never_ran": True}):
        assert interrupted_transfers([replace(crashed, **other)], left) == ()


@pytest.mark.parametrize(
    ("ending", "left"),
    [
        ({}, ()),  # killed: the remaining tasks are started again
        ({"never_ran": True}, (B, C)),  # the worker could not start it
        (
            {"is_crashed": False, "is_cancelled": True, "state_name": "Cancelled"},
            (B, C),
        ),  # a person
        ({"is_crashed": False, "is_cancelled": True, "state_name": "Withdrawn"}, ()),  # a reconcile
        (
            {"is_crashed": False, "state_name": "Completed"},
            (B, C),
        ),  # not done, and not tried for ever
        ({"is_crashed": False, "state_name": "Failed"}, (B, C)),
    ],
    ids=["killed", "never ran", "cancelled", "withdrawn", "completed", "failed"],
)
def test_what_one_run_does_not_start_again(ending, left):
    assert unfinished_tasks([replace(CRASHED, **ending)], plan(B, C)) == left


@pytest.mark.parametrize(
    ("change", "charged"),
    [
        ({}, (A,)),
        ({"one_by_one": False}, ()),
        ({"one_by_one": False, "tasks": (A,)}, (A,)),
        ({"never_ran": True}, ()),
        ({"is_crashed": False}, ()),
    ],
)
def test_a_killed_shard_counts_against_one_adapter_only_if_that_one_is_known(change, charged):
    assert interrupted_transfers([replace(CRASHED, **change)], plan(A, B, C)) == charged


@pytest.mark.parametrize(
    ("parameters", "started", "found"),
    [
        ({"shard": (A, B)}, True, {A, B}),
        ({"shard": (A, B), "one_by_one": False}, True, {A, B}),
        ({"shard": (A, B), "one_by_one": True}, True, set()),
        ({"shard": (A, B)}, False, set()),
        ({"shard": (A,)}, True, set()),
        ({"shard": "odd"}, True, set()),
    ],
)
def test_the_adapters_of_a_crashed_run_are_suspects_if_they_shared_batches(
    monkeypatch, parameters, started, found
):
    run = SimpleNamespace(
        id=uuid4(),
        name="run",
        parameters=parameters,
        start_time=started or None,
        state=None,
        tags=[],
    )

    def read_flow_runs(*, flow_run_filter, limit, sort):
        assert flow_run_filter.state.type.any_ == [StateType.CRASHED]
        assert sort == "END_TIME_DESC"
        return [run]

    client = SimpleNamespace(read_flow_runs=read_flow_runs)
    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    monkeypatch.setattr(shards, "get_run_logger", lambda: SimpleNamespace(warning=lambda *_: None))
    assert shards.suspects("small", GatePolicy()) == {(task.adapter, task.base) for task in found}


@pytest.mark.parametrize(
    ("message", "was_killed"),
    [
        ("Flow run process exited with -9.", True),
        ("No heartbeat for 3 minutes.", True),
        ("Execution was aborted by a termination signal.", False),
        ("Execution was cancelled by the runtime environment.", False),
        ("The worker was stopped or killed during this run.", False),
    ],
)
def test_a_process_that_was_stopped_from_outside_is_charged_to_no_adapter(message, was_killed):
    ended = EndedShard("s", (A,), "Crashed", False, False, is_crashed=True, message=message)
    assert ended.was_killed is was_killed
    assert interrupted_transfers([ended], plan(A)) == ((A,) if was_killed else ())


@pytest.mark.parametrize("message", ["killed", "Execution was aborted by a termination signal."])
def test_the_adapters_of_a_shard_that_was_stopped_are_not_suspects(monkeypatch, message):
    crashed = SimpleNamespace(
        id=uuid4(),
        name="shard",
        tags=[],
        start_time=datetime.now(UTC),
        state=SimpleNamespace(message=message, is_scheduled=lambda: False),
        parameters={"shard": json_value((A, B))},
    )
    client = SimpleNamespace(read_flow_runs=lambda **given: [crashed])
    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    found = shards.suspects("small", GatePolicy())
    assert {adapter for adapter, _ in found} == ({"a", "b"} if message == "killed" else set())


@pytest.mark.parametrize(
    ("state", "answer", "withdrawn"),
    [
        (StateType.SCHEDULED, SetStateStatus.ACCEPT, True),
        (StateType.SCHEDULED, SetStateStatus.REJECT, False),  # it started meanwhile
        (StateType.RUNNING, None, False),
        (None, None, True),  # deleted
    ],
)
def test_only_a_shard_that_did_not_start_counts_as_withdrawn(monkeypatch, state, answer, withdrawn):
    one = shard(A)
    runs = [SimpleNamespace(id=one.run_id, state=State(type=state))] if state else []
    client = SimpleNamespace(
        read_flow_runs=lambda **given: runs,
        set_flow_run_state=lambda run_id, wanted: SimpleNamespace(status=answer),
    )
    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    assert shards.cancel_shard(one) is withdrawn


@pytest.mark.parametrize("ended", [0, 1, 144, 450])
def test_the_requests_for_a_new_attempt_do_not_grow_with_the_ended_ones(monkeypatch, ended):
    runs = {}

    def run_for(attempt):
        over = attempt < ended
        return SimpleNamespace(
            id=uuid4(), idempotency_key=None, state=SimpleNamespace(is_final=lambda: over)
        )

    def run_deployment(name, *, idempotency_key, **given):
        key, _, attempt = idempotency_key.rpartition(":")
        for number in range(ended):
            runs.setdefault(f"{key}:{number}", run_for(number))
        created.append(int(attempt))
        return runs.setdefault(idempotency_key, run_for(int(attempt)))

    def read_flow_runs(flow_run_filter, limit):
        wanted = flow_run_filter.idempotency_key.any_
        assert len(wanted) <= limit == 200
        return [SimpleNamespace(idempotency_key=key) for key in wanted if key in runs]

    created = []
    client = SimpleNamespace(read_flow_runs=read_flow_runs)
    monkeypatch.setattr(shards, "get_client", lambda sync_client: nullcontext(client))
    monkeypatch.setattr(shards, "run_deployment", run_deployment)
    shards.start((A,), GatePolicy(), size=16)
    assert created[-1] == ended
    assert len(created) <= 2 + ended // 200 + 1


def test_a_shard_fits_the_parameters_of_a_flow_run():
    tasks = [replace(task(f"a{number}"), estimated_seconds=0.01) for number in range(5_000)]
    parts = split_into_shards(tasks, 400)
    assert max(map(len, parts)) == 1_000
    assert len(json.dumps(json_value(parts[0]))) < 512 << 10


def test_a_killed_shard_was_working_on_the_first_transfer_that_did_not_end(monkeypatch):
    """The transfer of a failed because S3 was down, which counts as no attempt."""
    name = transfer_adapter.task_run_name
    assert name.format(transfer_task=A) == shards._task_run_name(A) == f"transfer a to {V2}"
    asked = []

    def read_task_runs(**given):
        asked.append((given["flow_run_filter"].id.any_, given["offset"]))
        others = [SimpleNamespace(name=f"fail of adapter {i}") for i in range(given["limit"])]
        return [SimpleNamespace(name=f"transfer a to {V2}")] if given["offset"] else others

    client, run_id = SimpleNamespace(read_task_runs=read_task_runs), uuid4()
    killed = EndedShard(
        "s", (A, B, C), "Crashed", False, False, is_crashed=True, message="-9", one_by_one=True
    )
    ended = shards._with_ended_tasks(killed, run_id, client)
    assert interrupted_transfers([ended], plan(A, B, C)) == (B,)
    assert interrupted_transfers([ended], plan(A)) == ()
    assert asked == [([run_id], 0), ([run_id], 200)]
    completed = replace(killed, is_crashed=False)
    assert shards._with_ended_tasks(completed, run_id, client) is completed
    assert len(asked) == 2
