"""Flow `transfer-shard`: judge several adapters on one new base, which is loaded once."""

from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tasks import transfer
from tasks.limits import gpu_slots
from tasks.retries import is_infrastructure_failure
from tasks.worker import check_worker
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferTask

_FOUR_AT_ONCE = cast(TaskRunner[Any], ThreadPoolTaskRunner(max_workers=4))


@flow(name="transfer-shard", task_runner=_FOUR_AT_ONCE)
def transfer_shard(
    shard: tuple[TransferTask, ...],
    policy: GatePolicy,
    one_by_one: bool = False,
    size: int | None = None,
) -> State:
    """Judge the adapters of the shard. A failure affects one adapter only.

    Adapters that can share batches are evaluated first, `size` of them together. The transfers
    follow and use these evaluations; what is missing, each transfer evaluates itself. Up to four
    run concurrently: one uses the models, while the others read and write the registry.

    A transfer that is no longer needed is skipped. A failure of an adapter is recorded as one
    attempt. A failure of a service, a worker, an access right or a base version is not recorded as
    an attempt, and the next reconcile starts the transfer again.

    Args:
        shard: Transfers to the same base version.
        policy: Gate policy.
        one_by_one: Evaluate no two adapters in one batch, and run no two transfers at once, so that
            an adapter that ends the process is known.
        size: Maximum number of adapters that are evaluated together. None: all.
    """
    logger = get_run_logger()
    failed, skipped = [], []
    not_recorded: dict[str, list[str]] = {}  # adapters, by message: an outage concerns many
    warnings = check_worker()
    with gpu_slots():
        if len(shard) > 1 and not one_by_one:
            together = transfer.evaluate_together(shard, policy, size, return_state=True)
            if together.is_completed():
                for adapter, reason in together.result().items():
                    logger.info("%s is evaluated alone: %s", adapter, reason)
            else:
                logger.warning("all adapters are evaluated alone: %s", together.message)
        for task, state in transfer.transfer_each(shard, policy, one_by_one):
            if state.is_completed():
                outcome = state.result()
                if outcome is None:
                    skipped.append(task.adapter)
                    logger.info("%s: skipped, because it is no longer needed", task)
                    continue
                logger.info("%s: %s. %s", task.adapter, outcome.verdict, outcome.judgment.reason)
            elif is_infrastructure_failure(state):
                not_recorded.setdefault(str(state.message), []).append(task.adapter)
            else:
                reason = str(state.message)
                record = transfer.record_failure(task, policy, reason, return_state=True)
                if record.is_completed():
                    failed.append(task.adapter)
                else:
                    text = (
                        f"{reason}; this attempt is not counted, because it could not be recorded: "
                        f"{record.message}"
                    )
                    not_recorded.setdefault(text, []).append(task.adapter)
    if failed or not_recorded:
        lines = [f"{len(failed)} of {len(shard)} failed: {', '.join(failed)}"] if failed else []
        lines += [f"{', '.join(names)}: {message}" for message, names in not_recorded.items()]
        return Failed(message="\n".join([*lines, *warnings]))
    judged = f"{len(shard) - len(skipped)} adapters judged"
    more = f", {len(skipped)} no longer needed" if skipped else ""
    return Completed(message="\n".join([judged + more, *warnings]))
