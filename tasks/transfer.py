"""Tasks that transfer one adapter to one new base.

The functions import `trans_peft.lifecycle.transfer` themselves, because importing its statistics
(scipy) takes half a second. Most reconcile runs start no transfer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

from prefect import task
from prefect.client.schemas.objects import State

from tasks import events, lineage, metrics
from tasks.composition import platform
from tasks.deployed_policies import is_deployed
from tasks.limits import adapter_lock
from tasks.progress import work_progress
from tasks.retries import RETRIES
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.outcome import TransferOutcome, TransferTask
from trans_peft.lifecycle.parallel import in_parallel
from trans_peft.lifecycle.progress import WorkProgress
from trans_peft.lifecycle.reconcile import is_still_needed, observe_adapter

__all__ = ["evaluate_together", "record_failure", "transfer_adapter", "transfer_each"]

_run_ends = threading.Event()
"""Set when the run of the shard is terminated. Its threads would continue for hours otherwise."""


class _RunEndsError(BaseException):  # not an Exception: a training saves a checkpoint then
    """Raised in a thread of a terminated run. No part of the library handles it."""


@task(task_run_name="evaluate {transfer_tasks[0].base} in mixed batches")
def evaluate_together(
    transfer_tasks: tuple[TransferTask, ...], policy: GatePolicy, size: int | None = None
) -> dict[str, str]:
    """Store evaluations that the transfers need; return why adapters were left out, by name.

    At most `size` adapters are in memory at once.

    Without retries and locks: what is missing afterwards, each transfer evaluates itself.
    """
    from trans_peft.lifecycle.mixed_evaluation import evaluate_shard

    def observe(one: TransferTask) -> Fleet:
        return observe_adapter(one.adapter, one.base.family, platform())

    if not is_deployed(policy):
        return {}
    platform()  # before the threads
    seen = zip(transfer_tasks, in_parallel(observe, transfer_tasks), strict=True)
    needed = [(one, fleet) for one, fleet in seen if is_still_needed(one, fleet, policy)]
    return evaluate_shard(needed, policy, platform(), size=size, on_progress=work_progress())


@task(**RETRIES, task_run_name="transfer {transfer_task.adapter} to {transfer_task.base}")
def transfer_adapter(transfer_task: TransferTask, policy: GatePolicy) -> TransferOutcome | None:
    """Judge one adapter on a base and record the verdict; None if that is no longer needed.

    The check runs under the adapter's lock: if two shards have the same transfer, the
    second one finds it done.
    """
    from trans_peft.lifecycle.transfer import transfer

    with adapter_lock(transfer_task.adapter):
        fleet = observe_adapter(transfer_task.adapter, transfer_task.base.family, platform())
        if not _is_needed(transfer_task, fleet, policy):
            return None
        outcome = transfer(transfer_task, fleet, policy, platform(), on_progress=_stoppable())
    events.adapter_judged(outcome)
    metrics.adapter_judged(outcome)
    lineage.adapter_transferred(outcome)
    return outcome


def transfer_each(
    transfer_tasks: Sequence[TransferTask], policy: GatePolicy, one_by_one: bool
) -> Iterator[tuple[TransferTask, State]]:
    """Run `transfer_adapter` for each task; return the final states in the order of the tasks.

    Unless `one_by_one`, several run at once, as many as the flow's task runner allows.
    """
    _run_ends.clear()  # a process may run several shards, one after the other
    if one_by_one:
        for one in transfer_tasks:
            yield one, transfer_adapter(one, policy, return_state=True)
        return
    try:
        futures = [transfer_adapter.submit(one, policy) for one in transfer_tasks]
        for one, future in zip(transfer_tasks, futures, strict=True):
            future.wait()
            yield one, future.state
    except BaseException:
        _run_ends.set()
        raise


def _is_needed(transfer_task: TransferTask, fleet: Fleet, policy: GatePolicy) -> bool:
    """Return whether reconcile still plans the transfer: by this policy, and with this attempt."""
    return is_still_needed(transfer_task, fleet, policy) and is_deployed(policy)


def _stoppable() -> Callable[[WorkProgress], None]:
    """Return `work_progress()`, which also ends the transfer if its run is terminated."""
    show = work_progress()

    def reached(progress: WorkProgress) -> None:
        if _run_ends.is_set():
            raise _RunEndsError("the run of the shard was terminated")
        show(progress)

    return reached


@task(**RETRIES, task_run_name="record that {transfer_task.adapter} failed")
def record_failure(
    transfer_task: TransferTask, policy: GatePolicy, reason: str
) -> TransferOutcome | None:
    """Record a failed attempt; None if the transfer is no longer needed."""
    from trans_peft.lifecycle import transfer

    with adapter_lock(transfer_task.adapter):
        fleet = observe_adapter(transfer_task.adapter, transfer_task.base.family, platform())
        if not _is_needed(transfer_task, fleet, policy):
            return None
        outcome = transfer.record_failure(transfer_task, fleet, policy, platform(), reason=reason)
    events.adapter_judged(outcome)
    metrics.adapter_judged(outcome)
    return outcome
