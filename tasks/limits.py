"""Concurrency limits: GPU slots, one writer per adapter, one ingestion per upload."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from trans_peft.domain.conventions import GPU_LIMIT
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import InvalidSpecError

__all__ = ["adapter_lock", "gpu_slot_count", "gpu_slots", "upload_lock"]

_LEASE_S = 60.0
"""After a holder is killed, its slot is free within this time. Prefect renews no shorter lease."""


@contextmanager
def gpu_slots(count: int = 1) -> Iterator[None]:
    """Hold slots of the concurrency limit `gpu` (`prefect gcl create gpu --limit N`), one per GPU.

    InvalidSpecError if the limit is lower than `count`, so that the run would wait for ever.
    """
    with ExitStack() as stack:
        slots = concurrency(GPU_LIMIT, occupy=count, lease_duration=_LEASE_S, strict=True)
        try:
            stack.enter_context(slots)
        except ConcurrencySlotAcquisitionError as error:
            if _status(error) != httpx.codes.UNPROCESSABLE_ENTITY:
                raise
            raise InvalidSpecError(
                f"this run cannot get {count} GPU slots",
                expected=f"at least {count} slots of Prefect's concurrency limit {GPU_LIMIT}",
                found="fewer slots, or an inactive limit",
                do="set GPU_SLOTS to the number of GPUs of all workers together and run "
                "`python -m infra.stack.prefect_objects`, or lower `processes` in the recipe",
            ) from error
        yield


def gpu_slot_count() -> int:
    """Return the GPU slots of all workers together; 1 if the limit does not exist."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit
        except ObjectNotFound:  # the runs that need a slot report it
            return 1


@contextmanager
def adapter_lock(adapter: str) -> Iterator[None]:
    """Hold the lock for writing versions and verdicts of an adapter.

    MLflow has no compare-and-set: without the lock, two shards could register the same version
    twice. If that happens after a lease has expired, the lowest number counts.
    """
    with _lock(f"adapter:{adapter}"):
        yield


@contextmanager
def upload_lock(uri: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock for ingesting an upload. Without `wait`, yield False if another run holds it.

    Two ingestions at once do no harm, but read every byte twice. False means that Prefect reported
    the lock as taken. If Prefect does not respond, the error is raised, so that the upload is not
    skipped by mistake.
    """
    held = True
    with ExitStack() as stack:
        try:
            name = f"upload:{content_sha256(uri)[:16]}"
            stack.enter_context(_lock(name, max_retries=None if wait else 0))
        except ConcurrencySlotAcquisitionError as error:
            if _status(error) != httpx.codes.LOCKED:
                raise
            held = False
        yield held


@contextmanager
def _lock(name: str, *, max_retries: int | None = None) -> Iterator[None]:
    """Hold a concurrency limit of one, created if it is missing.

    Raises ConcurrencySlotAcquisitionError.
    """
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):  # by another run
        client.upsert_global_concurrency_limit_by_name(name, 1)
    with concurrency(
        name,
        occupy=1,
        max_retries=max_retries,
        lease_duration=_LEASE_S,
        strict=True,
        # Otherwise one lost lease cancels the thread, and with it a shard of many adapters. Two
        # holders do no harm: registry and catalog keep the first of two equal entries.
        raise_on_lease_renewal_failure=False,
    ):
        yield


def _status(error: ConcurrencySlotAcquisitionError) -> int | None:
    """Return the HTTP status with which Prefect refused the slots. None: it did not respond."""
    cause = error.__cause__
    return cause.response.status_code if isinstance(cause, httpx.HTTPStatusError) else None
