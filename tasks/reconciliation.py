"""What is missing, and what follows from the verdicts."""

from prefect import task

from tasks.composition import platform
from tasks.policy import RETRIES
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import FleetChanges, Plan
from trans_peft.lifecycle import reconcile

__all__ = ["base_families", "plan_fleet", "settle_fleet"]


@task(**RETRIES)
def base_families() -> tuple[str, ...]:
    """Return every base family in the catalog."""
    return platform().catalog.families()


@task(**RETRIES, task_run_name="plan {family}")
def plan_fleet(family: str, policy: GatePolicy) -> Plan:
    """Compare the desired state with the registry."""
    return reconcile.plan(reconcile.observe(family, platform()), policy)


@task(**RETRIES, task_run_name="settle {family}")
def settle_fleet(family: str, policy: GatePolicy) -> FleetChanges:
    """Write aliases by verdict, then move `serving`."""
    return reconcile.settle(reconcile.observe(family, platform()), policy, platform())
