"""One adapter on one new base."""

from prefect import task

from tasks import events
from tasks.composition import platform
from tasks.limits import adapter_lock
from tasks.policy import RETRIES
from tasks.progress import evaluation_progress
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferOutcome, Work
from trans_peft.lifecycle import transfer
from trans_peft.lifecycle.reconcile import is_wanted

__all__ = ["record_failure", "transfer_adapter"]


@task(**RETRIES, task_run_name="transfer {work.adapter} to {work.base_version}")
def transfer_adapter(family: str, work: Work, policy: GatePolicy) -> TransferOutcome | None:
    """Judge one adapter on the base and write the verdict at once; None: no longer wanted.

    Whether it is wanted is asked under the adapter's lock: of two shards with the same work the
    second finds it done.
    """
    with adapter_lock(work.adapter):
        if not is_wanted(work, family, policy, platform()):
            return None
        outcome = transfer.transfer(
            work, family, policy, platform(), on_progress=evaluation_progress()
        )
    events.adapter_judged(outcome)
    return outcome


@task(**RETRIES, task_run_name="record that {work.adapter} failed")
def record_failure(
    family: str, work: Work, policy: GatePolicy, reason: str
) -> TransferOutcome | None:
    """Write down that an attempt ended in an error; None: somebody did, or it is not wanted."""
    with adapter_lock(work.adapter):
        if not is_wanted(work, family, policy, platform()):
            return None
        outcome = transfer.record_failure(work, family, policy, platform(), reason=reason)
    events.adapter_judged(outcome)
    return outcome
