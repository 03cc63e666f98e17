"""Who may do what at once: GPU slots, one writer per adapter, one reader per upload."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from trans_peft.domain.conventions import GPU_LIMIT
from trans_peft.domain.identity import content_sha256

__all__ = ["adapter_lock", "gpu_slot", "upload_lock"]

_LEASE_S = 60.0
"""A holder that was killed blocks nobody for longer: the shortest lease Prefect renews in time."""


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot of the concurrency limit `gpu` (`prefect gcl create gpu --limit N`)."""
    with concurrency(GPU_LIMIT, occupy=1, lease_duration=_LEASE_S, strict=True):
        yield


@contextmanager
def adapter_lock(adapter: str) -> Iterator[None]:
    """Hold the one right to write versions and verdicts of an adapter.

    MLflow has no compare-and-set: without the lock two shards could make the same version twice.
    (If it happens all the same, after a lease that ran out, the lowest version wins.)
    """
    with _alone(f"adapter:{adapter}"):
        yield


@contextmanager
def upload_lock(uri: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the one right to ingest an upload; without `wait`, False where another holds it.

    Ingesting twice at once changes nothing but reads every byte twice. Prefect has to answer that
    another holds it: a server that is slow or away must not look like one, or the upload would be
    passed over.
    """
    held = True
    with ExitStack() as stack:
        try:
            name = f"upload:{content_sha256(uri)[:16]}"
            stack.enter_context(_alone(name, max_retries=None if wait else 0))
        except ConcurrencySlotAcquisitionError as error:
            if not _is_taken(error):
                raise
            held = False
        yield held


@contextmanager
def _alone(name: str, *, max_retries: int | None = None) -> Iterator[None]:
    """Hold a limit of one, made where it is missing. ConcurrencySlotAcquisitionError."""
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):  # made meanwhile
        client.upsert_global_concurrency_limit_by_name(name, 1)
    with concurrency(name, occupy=1, max_retries=max_retries, lease_duration=_LEASE_S, strict=True):
        yield


def _is_taken(error: ConcurrencySlotAcquisitionError) -> bool:
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == (
        httpx.codes.LOCKED
    )
