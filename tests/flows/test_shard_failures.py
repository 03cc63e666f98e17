"""Which failures of a shard count as attempts of an adapter, and which are retried."""

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Completed, Failed

from flows import transfer_shard as module
from tasks import limits
from tasks.retries import RETRIES, is_infrastructure_failure
from tests.edges.examples import draft, outcome, peft_folder
from tests.flows.test_shards import A, B, C
from tests.lifecycle.fleet import POLICY
from trans_peft.errors import (
    AccessError,
    BaseUnreadableError,
    EvaluationError,
    IntegrityError,
    NotFoundError,
    StoreError,
    WorkerError,
    translating_full_disk_errors,
)

REQUEST = httpx.Request("GET", "http://prefect/api")


def answered(status):
    response = httpx.Response(status, request=REQUEST)
    return httpx.HTTPStatusError("as the test says", request=REQUEST, response=response)


def no_slot(cause):
    error = ConcurrencySlotAcquisitionError("no slot")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "infrastructure", "again"),
    [
        (StoreError("S3 cannot be reached"), True, True),
        (AccessError("S3 denies access"), True, False),
        (BaseUnreadableError("its fingerprint is missing"), True, False),
        (WorkerError("older code"), True, False),
        (ConnectionResetError(), True, True),
        (TimeoutError(), True, True),
        (httpx.ConnectError("refused"), True, True),
        (answered(500), True, True),
        (ConcurrencySlotAcquisitionError("no lock"), True, True),
        (answered(409), False, False),
        (EvaluationError("logits are not finite"), False, False),
        (NotFoundError("no such file"), False, False),
        (IntegrityError("other bytes"), False, False),
        (MemoryError(), False, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_which_errors_are_retried_and_which_count_as_attempts(error, infrastructure, again):
    state = Failed(data=error)
    assert is_infrastructure_failure(state) is infrastructure
    assert RETRIES["retry_condition_fn"](None, None, state) is again


def test_a_full_disk_is_an_infrastructure_failure():
    with (
        pytest.raises(StoreError, match=r"the disk of /scratch is full\n  expected: .*\n  found: "),
        translating_full_disk_errors("/scratch"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError), translating_full_disk_errors("/scratch"):
        raise PermissionError(13, "Permission denied")


@pytest.fixture
def shard(monkeypatch, tmp_path):
    """Run a shard of A, B and C with these errors; return its state and the counted adapters."""
    passed = outcome(draft("chat", "small", peft_folder(tmp_path / "peft")))
    passed = replace(passed, training=None)

    def run(errors, not_recorded=None, together=None, warnings=()):
        charged = []

        def record_failure(task, policy, reason, return_state):
            if error := (not_recorded or {}).get(task.adapter):
                return Failed(data=error, message=f"{error}")
            charged.append(task.adapter)
            return Completed(data=None)

        def transfer_each(tasks, policy, one_by_one):
            for task in tasks:
                error = errors.get(task.adapter)
                failed = Failed(data=error, message=f"{error}")
                yield task, Completed(data=passed) if error is None else failed

        fakes = SimpleNamespace(
            evaluate_together=lambda *given, return_state: together or Completed(data={}),
            transfer_each=transfer_each,
            record_failure=record_failure,
        )
        monkeypatch.setattr(module, "transfer", fakes)
        monkeypatch.setattr(module, "gpu_slots", nullcontext)
        monkeypatch.setattr(module, "check_worker", lambda: warnings)
        monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("shard"))
        return module.transfer_shard.fn((A, B, C), POLICY), charged

    return run


def test_a_message_is_written_once_for_all_adapters(shard):
    outage = StoreError("S3 cannot be reached")
    state, _ = shard({"a": outage, "b": outage, "c": StoreError("other")})
    assert state.message == "a, b: S3 cannot be reached\nc: other"


def test_an_outage_counts_as_no_attempt_and_is_reported(shard):
    state, charged = shard({"a": StoreError("S3 cannot be reached"), "b": AccessError("locked")})
    assert (state.name, charged) == ("Failed", [])
    assert state.message == "a: S3 cannot be reached\nb: locked"


@pytest.mark.parametrize(
    ("errors", "name"), [({}, "Completed"), ({"a": StoreError("S3")}, "Failed")]
)
def test_warnings_about_the_worker_end_the_message(shard, errors, name):
    state, _ = shard(errors, warnings=("the clock of this worker is wrong",))
    assert state.name == name
    assert state.message.splitlines()[-1] == "the clock of this worker is wrong"


def test_a_failing_adapter_is_counted_beside_an_outage(shard):
    state, charged = shard({"a": EvaluationError("nan"), "c": StoreError("S3 cannot be reached")})
    assert (state.name, charged) == ("Failed", ["a"])
    assert state.message == "1 of 3 failed: a\nc: S3 cannot be reached"


def test_a_failure_that_cannot_be_recorded_stops_no_other_adapter(shard):
    broken = EvaluationError("nan")
    state, charged = shard({"a": broken, "b": broken}, {"a": NotFoundError("no base v2")})
    assert (state.name, charged) == ("Failed", ["b"])
    assert state.message == (
        "1 of 3 failed: b\na: nan; this attempt is not counted, because it could not be recorded: "
        "no base v2"
    )


def test_a_shard_without_errors_is_completed(shard):
    state, charged = shard({})
    assert (state.name, state.message, charged) == ("Completed", "3 adapters judged", [])


@pytest.mark.parametrize(
    ("together", "logged"),
    [
        (Completed(data={"a": "the method OFT"}), "a is evaluated alone: the method OFT"),
        (Failed(message="no memory"), "all adapters are evaluated alone: no memory"),
    ],
)
def test_adapters_without_mixed_batches_are_judged_alone(shard, caplog, together, logged):
    with caplog.at_level("INFO"):
        state, charged = shard({}, together=together)
    assert (state.name, state.message, charged) == ("Completed", "3 adapters judged", [])
    assert logged in caplog.messages


def test_a_limit_that_another_run_creates_at_the_same_time_is_used(monkeypatch):
    class Prefect:
        def upsert_global_concurrency_limit_by_name(self, name, limit):
            raise ObjectAlreadyExists(None)

    taken = []
    monkeypatch.setattr(limits, "get_client", lambda **_: nullcontext(Prefect()))
    monkeypatch.setattr(limits, "concurrency", lambda name, **_: nullcontext(taken.append(name)))
    with limits.adapter_lock("chat"):
        assert taken == ["adapter:chat"]


@pytest.fixture
def prefect_answers(monkeypatch):
    """Let Prefect refuse a slot with this error."""

    def answer(error):
        @contextmanager
        def concurrency(name, **_):
            raise error
            yield

        client = SimpleNamespace(upsert_global_concurrency_limit_by_name=lambda name, limit: None)
        monkeypatch.setattr(limits, "get_client", lambda **_: nullcontext(client))
        monkeypatch.setattr(limits, "concurrency", concurrency)

    return answer


def test_an_upload_that_another_run_ingests_is_skipped(prefect_answers):
    prefect_answers(no_slot(answered(423)))
    with limits.upload_lock("s3://bases/smol/v2", wait=False) as held:
        assert not held


@pytest.mark.parametrize("error", [no_slot(answered(503)), no_slot(httpx.ReadTimeout("slow"))])
def test_a_prefect_that_does_not_respond_is_an_error_and_no_taken_lock(prefect_answers, error):
    prefect_answers(error)
    with (
        pytest.raises(ConcurrencySlotAcquisitionError),
        limits.upload_lock("s3://bases/smol/v2", wait=False),
    ):
        pass
