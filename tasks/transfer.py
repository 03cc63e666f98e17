"""One adapter on one new base.

The verb is imported where it is used: its statistics (scipy) take half a second, which reconcile,
for which most runs find nothing to do, should not wait for.
"""

from prefect import task

from tasks import events
from tasks.composition import platform
from tasks.limits import adapter_lock
from tasks.policy import RETRIES
from tasks.progress import evaluation_progress
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferOutcome, TransferTask
from trans_peft.lifecycle.reconcile import is_still_needed, observe_adapter

__all__ = ["record_failure", "transfer_adapter"]


@task(**RETRIES, task_run_name="transfer {work.adapter} to {work.base_version}")
def transfer_adapter(family: str, work: TransferTask, policy: GatePolicy) -> TransferOutcome | None:
    """Judge one adapter on the base and write the verdict at once; None: no longer wanted.

    Whether it is wanted is asked under the adapter's lock: of two shards with the same work the
    second finds it done.
    """
    from trans_peft.lifecycle.transfer import transfer

    with adapter_lock(work.adapter):
        fleet = observe_adapter(work.adapter, family, platform())
        if not is_still_needed(work, fleet, policy):
            return None
        outcome = transfer(work, fleet, policy, platform(), on_progress=evaluation_progress())
    events.adapter_judged(outcome)
    return outcome


@task(**RETRIES, task_run_name="record that {work.adapter} failed")
def record_failure(
    family: str, work: TransferTask, policy: GatePolicy, reason: str
) -> TransferOutcome | None:
    """Write down that an attempt ended in an error; None: somebody did, or it is not wanted."""
    from trans_peft.lifecycle import transfer

    with adapter_lock(work.adapter):
        fleet = observe_adapter(work.adapter, family, platform())
        if not is_still_needed(work, fleet, policy):
            return None
        outcome = transfer.record_failure(work, fleet, policy, platform(), reason=reason)
    events.adapter_judged(outcome)
    return outcome
