"""Send the requests for many adapters in parallel."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_parallel"]

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 8
"""MLflow's client keeps at most ten connections to a server."""


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the results in the order of the items.

    The function sends requests to MLflow or S3 and waits for them most of the time. The first error
    is raised, after the calls that have started; the others do not start.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(function, items)]
