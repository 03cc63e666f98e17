"""What is missing, and what follows from the verdicts."""

from prefect import task

from tasks import events
from tasks.composition import platform
from tasks.policy import RETRIES
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import FleetChanges, Plan
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle import reconcile
from trans_peft.lifecycle.apply_verdicts import apply_verdicts

__all__ = ["apply_fleet_verdicts", "base_families", "plan_fleet", "set_aside"]


@task(**RETRIES)
def base_families() -> tuple[str, ...]:
    """Return every base family in the catalog."""
    return platform().catalog.families()


@task(**RETRIES)
def set_aside() -> tuple[str, ...]:
    """Return what stands in the registry under no family that can be reconciled, and why."""
    return (*platform().catalog.set_aside(), *platform().registry.set_aside())


@task(**RETRIES, task_run_name="plan {family}")
def plan_fleet(family: str, policy: GatePolicy) -> Plan:
    """Compare the desired state with the registry."""
    fleet = reconcile.observe(family, platform())
    return reconcile.with_cost_estimates(reconcile.plan(fleet, policy), fleet, platform())


@task(**RETRIES, task_run_name="settle {family}")
def apply_fleet_verdicts(
    family: str, policy: GatePolicy, promotion: PromotionPolicy
) -> FleetChanges:
    """Write aliases by verdict, then move `serving`; again where a person was faster."""
    while True:
        fleet = reconcile.observe(family, platform())
        changes = apply_verdicts(fleet, policy, promotion, platform())
        if changes.promoted is not None:
            events.fleet_promoted(family, changes.promoted)
        if changes.refused is not None and not changes.already_reported:
            events.promotion_refused(family, changes.refused)
        if not changes.is_outdated:
            return changes
