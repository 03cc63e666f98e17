"""Tasks that plan missing transfers and apply verdicts."""

from prefect import task

from tasks import events
from tasks.composition import platform
from tasks.reporting import obstacle_text
from tasks.retries import RETRIES
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.fleet import Fleet, FleetChanges
from trans_peft.domain.outcome import Plan
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle import reconcile
from trans_peft.lifecycle.apply_verdicts import apply_verdicts

__all__ = ["apply_fleet_verdicts", "base_families", "plan_fleet", "read_fleet", "set_aside"]


@task(**RETRIES)
def base_families() -> tuple[str, ...]:
    """Return the names of all base families."""
    return platform().catalog.families()


@task(**RETRIES)
def set_aside() -> tuple[str, ...]:
    """Return registry entries that belong to no readable family, each with the reason."""
    return (*platform().catalog.set_aside(), *platform().registry.set_aside())


@task(**RETRIES, task_run_name="read {family}")
def read_fleet(family: str) -> Fleet:
    """Read the fleet of a family from the registry."""
    return reconcile.observe(family, platform())


@task(**RETRIES, task_run_name="plan {fleet.family}")
def plan_fleet(fleet: Fleet, policy: GatePolicy) -> Plan:
    """Compare the desired state of a family with its fleet, and return the missing transfers."""
    return reconcile.with_cost_estimates(reconcile.plan(fleet, policy), fleet, platform())


@task(**RETRIES, task_run_name="apply verdicts of {family}")
def apply_fleet_verdicts(
    family: str, policy: GatePolicy, promotion: PromotionPolicy
) -> tuple[Fleet, FleetChanges]:
    """Read a fleet, set aliases by verdict, then move `serving`; return the fleet afterwards.

    Repeats if `champion` moved meanwhile.
    """
    while True:
        fleet = reconcile.observe(family, platform())
        fleet, changes = apply_verdicts(fleet, policy, promotion, platform())
        if withdrawn := [change for change in changes.aliases if change.number is None]:
            events.adapters_withdrawn(family, withdrawn)
        if changes.promoted is not None:
            events.fleet_promoted(family, str(changes.promoted))
        if changes.is_refused and not changes.already_reported:
            events.promotion_refused(family, obstacle_text(changes))
        if not changes.is_outdated:
            return fleet, changes
