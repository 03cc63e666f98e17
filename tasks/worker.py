"""Checks of this worker before a run on a GPU starts: its GPUs, its code and its clock."""

import hashlib
import time
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path

import httpx
from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client

import trans_peft
from tasks.settings import settings
from trans_peft.isolation import prepare
from trans_peft.text.chat import CHAT_IMPORTS

__all__ = ["check_clock", "check_worker", "clock_difference", "code_difference", "code_tag"]

_MAX_CLOCK_S = 30.0
"""Clocks that differ by less are not reported. The header `Date` has whole seconds."""

_TAG = "code:"


def check_worker() -> tuple[str, ...]:
    """Check this worker, and return warnings, which are also written to the log.

    The process that will render prompts starts meanwhile.

    Raises WorkerError if PyTorch sees fewer GPUs than `TRANS_PEFT_GPUS`.
    """
    prepare(CHAT_IMPORTS)
    if wanted := settings().gpus:
        from trans_peft.models import check_gpus

        check_gpus(wanted)
    with get_client(sync_client=True) as client:
        warnings = tuple(filter(None, (code_difference(), clock_difference(client))))
    for warning in warnings:
        get_run_logger().warning("%s", warning)
    return warnings


@cache
def code_tag() -> str:
    """Return the tag `code:HASH` with the hash of the Python files of `trans_peft` on this worker.

    Runs that reconcile starts have the tag of its worker.
    """
    folder = Path(trans_peft.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return f"{_TAG}{digest.hexdigest()[:12]}"


def code_difference() -> str:
    """Return that the current run has other code than the run that started it; empty if not."""
    expected = sorted(tag for tag in runtime.flow_run.tags or () if tag.startswith(_TAG))
    if not expected or code_tag() in expected:
        return ""
    return (
        "this worker has other code than the worker of the run that started this run\n"
        f"  expected: {', '.join(expected)}\n"
        f"  found:    {code_tag()}\n"
        "  do:       update the older checkout or image (docs/operations.md)"
    )


def check_clock() -> str:
    """Return `clock_difference` with a client of its own.

    Reconcile schedules shards by its clock: with one that is ahead, they would start late.
    """
    with get_client(sync_client=True) as client:
        return clock_difference(client)


def clock_difference(client: SyncPrefectClient) -> str:
    """Return that the clocks of this worker and of Prefect's server differ; empty if not."""
    try:
        before_s = time.time()
        response = client.hello()
        after_s = time.time()
        server_s = parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (httpx.HTTPError, KeyError, ValueError):  # a proxy may remove or change the header
        return ""
    # The server read its clock between `before_s` and `after_s`, and left out parts of a second.
    ahead_s = max(before_s - server_s - 1, 0.0) - max(server_s - after_s, 0.0)
    if abs(ahead_s) < _MAX_CLOCK_S:
        return ""
    return (
        "the clock of this worker is wrong\n"
        "  expected: the time of Prefect's server\n"
        f"  found:    {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}\n"
        "  do:       synchronize the clocks of the worker and of the server (NTP)"
    )
