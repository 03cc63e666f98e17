"""One adapter on one new base."""

from prefect import task

from tasks.composition import platform
from tasks.limits import adapter_lock
from tasks.policy import RETRIES
from tasks.progress import evaluation_progress
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferOutcome, Work
from trans_peft.lifecycle import transfer

__all__ = ["record_failure", "transfer_adapter"]


@task(**RETRIES, task_run_name="transfer {work.adapter} to {work.base_version}")
def transfer_adapter(family: str, work: Work, policy: GatePolicy) -> TransferOutcome:
    """Judge one adapter on the base and write the verdict at once."""
    with adapter_lock(work.adapter):
        return transfer.transfer(
            work, family, policy, platform(), on_progress=evaluation_progress()
        )


@task(**RETRIES, task_run_name="record that {work.adapter} failed")
def record_failure(family: str, work: Work, policy: GatePolicy, reason: str) -> TransferOutcome:
    """Write down that an attempt ended in an error."""
    return transfer.record_failure(work, family, policy, platform(), reason=reason)
