"""The last look at a family that found nothing to do, kept in a Prefect variable.

A scheduled reconcile leaves a family alone that did not change since. Reading 10,000 adapters takes
MLflow a minute of processor time; finding that nothing changed takes five small requests.
"""

from datetime import UTC, datetime, timedelta

from prefect import task
from prefect.variables import Variable

from tasks.composition import platform
from tasks.retries import RETRIES
from trans_peft.domain.conventions import artifact_key
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle import reconcile

__all__ = ["is_unchanged", "record_look", "revision"]


@task(**RETRIES, task_run_name="revision of {family}")
def revision(family: str, policy: GatePolicy, promotion: PromotionPolicy) -> str:
    """Return a hash that changes with the base versions, new adapter versions and the policies."""
    return reconcile.revision(family, policy, promotion, platform())


@task(**RETRIES, task_run_name="last look at {family}")
def is_unchanged(family: str, revision: str, minutes: int) -> bool:
    """Return whether a look in the last `minutes` found nothing to do at the same revision."""
    last = Variable.get(_name(family))
    if not isinstance(last, dict) or last.get("revision") != revision:
        return False
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(str(last.get("at")))
    except (TypeError, ValueError):  # someone changed the variable; TypeError: no time zone
        return False
    return timedelta(0) <= age < timedelta(minutes=minutes)


@task(**RETRIES, task_run_name="record look at {family}")
def record_look(family: str, revision: str) -> None:
    """Record that a look at this revision of the family found nothing to do."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    Variable.set(_name(family), {"revision": revision, "at": now}, overwrite=True)


def _name(family: str) -> str:
    return artifact_key("trans-peft-look", family)
