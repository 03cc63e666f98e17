"""Several adapters on one new base: one base load, one verdict after the other."""

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import transfer
from tasks.limits import gpu_slot
from tasks.policy import is_infrastructure_failure
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferTask


@flow(name="transfer-shard", flow_run_name="judge {family}")
def transfer_shard(family: str, shard: tuple[TransferTask, ...], policy: GatePolicy) -> State:
    """Judge each adapter of the shard; one that fails is recorded and stops nobody else.

    What is no longer wanted when its turn comes is passed over. Where a service, a disk or a right
    was missing, nothing is recorded: no attempt is charged, and the next reconcile starts it again.
    """
    logger = get_run_logger()
    failed, unanswered, passed_over = [], [], []
    with gpu_slot():
        for work in shard:
            state = transfer.transfer_adapter(family, work, policy, return_state=True)
            if state.is_completed():
                outcome = state.result()
                if outcome is None:
                    passed_over.append(work.adapter)
                    logger.info("%s: no longer wanted", work)
                    continue
                logger.info("%s: %s. %s", work.adapter, outcome.verdict, outcome.judgement.reason)
            elif is_infrastructure_failure(state):
                unanswered.append(f"{work.adapter}: {state.message}")
            else:
                reason = str(state.message)
                record = transfer.record_failure(family, work, policy, reason, return_state=True)
                if record.is_completed():
                    failed.append(work.adapter)
                else:
                    unanswered.append(
                        f"{work.adapter}: {reason}; this attempt is not counted, because it could "
                        f"not be recorded: {record.message}"
                    )
    if failed or unanswered:
        words = [f"{len(failed)} of {len(shard)} failed: {', '.join(failed)}"] if failed else []
        return Failed(message="\n".join([*words, *unanswered]))
    judged = f"{len(shard) - len(passed_over)} adapters judged"
    more = f", {len(passed_over)} no longer wanted" if passed_over else ""
    return Completed(message=judged + more)
