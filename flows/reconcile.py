"""Every live adapter gets a verdict on every base that may serve; then the verdicts take effect."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import ingestion, reconciliation, reporting, shards, transfer
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import Plan


@flow(name="reconcile")
def reconcile(
    policy: GatePolicy, shard_size: int, family: str | None = None, dry_run: bool = False
) -> State:
    """Compare what should be known about a family (None: all) with the registry; do the rest.

    Run twice, the second run finds nothing to do. `dry_run` shows the plan and changes nothing.
    """
    problems = [] if dry_run else _ingest_pending()
    for name in [family] if family else reconciliation.base_families():
        plan = reconciliation.plan_fleet(name, policy)
        reporting.publish_plan(plan)
        if not dry_run:
            problems += _judge(plan, policy, shard_size)
            changes = reconciliation.settle_fleet(name, policy)
            reporting.publish_fleet(name, changes)
            problems += [changes.waiting] if changes.waiting else []
    if problems:
        return Failed(message="; ".join(problems))
    return Completed(message="nothing is missing" if not dry_run else "planned, nothing changed")


def _ingest_pending() -> list[str]:
    """Make ready what shows up unasked; a refused upload stops nobody else."""
    states = [
        (upload, ingestion.ingest_base(upload, return_state=True))
        for upload in ingestion.find_pending()
    ]
    return [f"{upload}: {state.message}" for upload, state in states if not state.is_completed()]


def _judge(plan: Plan, policy: GatePolicy, shard_size: int) -> list[str]:
    """Work a plan off, in rounds: what a killed shard left undone stands in the next plan."""
    while plan.work:
        started = [
            shards.start(plan.family, shard, policy) for shard in shards.cut(plan.work, shard_size)
        ]
        ended = [shards.wait(run) for run in started]
        plan = reconciliation.plan_fleet(plan.family, policy)
        broken = [run for run in ended if run.never_ran or run.cancelled]
        if broken:
            return [f"shard {run.name}: {run.state_name}, left for the next run" for run in broken]
        for lost in shards.in_flight(ended, plan):
            transfer.record_failure(plan.family, lost, policy, reason="its process was killed")
            plan = reconciliation.plan_fleet(plan.family, policy)
    return [f"parked for a person: {work}" for work in plan.parked] + list(plan.unreadable)
