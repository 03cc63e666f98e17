"""The policies of reconcile's deployment. Verdicts follow them, and no others.

A flow run keeps the parameters with which it was created. If an operator changes the policies, runs
from before the change would judge adapters again by the old ones, and replace each other's verdicts
with the runs from after it.
"""

from typing import Any

from prefect import task
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as current_run
from pydantic import TypeAdapter, ValidationError

from tasks.origin import inherited_tags
from tasks.retries import RETRIES
from trans_peft.domain.conventions import Deployment
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.promotion import PromotionPolicy

__all__ = ["changed_policies", "is_deployed", "start_successor"]

_GATE = TypeAdapter(GatePolicy)
_PROMOTION = TypeAdapter(PromotionPolicy)


@task(**RETRIES, task_run_name="compare the policies with the deployment")
def changed_policies(policy: GatePolicy, promotion: PromotionPolicy) -> str:
    """Return which of a run's policies the deployment does not have; empty if it has both."""
    deployed = _parameters()
    changed = {
        "gate policy": _differs(deployed, "policy", policy, _GATE),
        "promotion policy": _differs(deployed, "promotion", promotion, _PROMOTION),
    }
    return " and ".join(name for name, differs in changed.items() if differs)


def is_deployed(policy: GatePolicy) -> bool:
    """Return whether reconcile's deployment has this gate policy."""
    return not _differs(_parameters(), "policy", policy, _GATE)


def start_successor(family: str | None, wait: bool) -> str:
    """Start reconcile with the deployment's policies; return the name of the flow run.

    A repeated call of one run returns the same successor.
    """
    run: Any = run_deployment(
        Deployment.RECONCILE,
        parameters={"family": family, "wait": wait},
        idempotency_key=f"successor of {current_run.id}",
        tags=inherited_tags(),
        timeout=0,
        as_subflow=False,  # so that it goes on if a person cancels the current run
    )
    return str(run.name)


def _parameters() -> dict[str, Any]:
    """Return the parameters of the deployment; none if it does not exist."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(Deployment.RECONCILE).parameters
        except ObjectNotFound:
            return {}


def _differs(
    deployed: dict[str, Any],
    name: str,
    ours: GatePolicy | PromotionPolicy,
    known: TypeAdapter[Any],
) -> bool:
    try:
        return name in deployed and known.validate_python(deployed[name]) != ours
    except ValidationError:  # a later run fails on this parameter, and says what is wrong with it
        return True
