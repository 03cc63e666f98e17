"""Who may do what at once: GPU slots, and one writer per adapter."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency

__all__ = ["adapter_lock", "gpu_slot"]

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
    name = f"adapter:{adapter}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, 1)
    with concurrency(name, occupy=1, lease_duration=_LEASE_S, strict=True):
        yield
