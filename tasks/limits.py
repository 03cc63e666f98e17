"""Who may do what at once: GPU slots, one writer per adapter, one reader per upload."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from trans_peft.domain.identity import content_sha256

__all__ = ["adapter_lock", "gpu_slot", "upload_lock"]

_LEASE_S = 60.0
"""A holder that was killed blocks nobody for longer: the shortest lease Prefect renews in time."""


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot of the concurrency limit `gpu` (`prefect gcl create gpu --limit N`)."""
    with concurrency("gpu", occupy=1, lease_duration=_LEASE_S, strict=True):
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

    Ingesting twice at once changes nothing but reads every byte twice.
    """
    with ExitStack() as stack:
        try:
            name = f"upload:{content_sha256(uri)[:16]}"
            stack.enter_context(_alone(name, timeout_s=None if wait else 1.0))
        except TimeoutError:
            yield False
        else:
            yield True


@contextmanager
def _alone(name: str, *, timeout_s: float | None = None) -> Iterator[None]:
    """Hold a limit of one, made where it is missing. TimeoutError."""
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):  # made meanwhile
        client.upsert_global_concurrency_limit_by_name(name, 1)
    with concurrency(
        name, occupy=1, timeout_seconds=timeout_s, lease_duration=_LEASE_S, strict=True
    ):
        yield
