"""Prefect artifacts for users: the plan and the fleet report of a family."""

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from tasks.composition import platform
from tasks.policy import RETRIES
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import FleetChanges, Plan
from trans_peft.lifecycle.report import report

__all__ = ["publish_fleet", "publish_plan"]


@task(**RETRIES, task_run_name="plan of {plan.family}")
def publish_plan(plan: Plan) -> None:
    """Write the plan to the log and to a table artifact."""
    logger = get_run_logger()
    for item in plan.work:
        logger.info("%s", item)
    for item in plan.parked:
        logger.warning("parked after three failed attempts: %s", item)
    create_table_artifact(
        key=f"plan-{_slug(plan.family)}",
        table=[
            {
                "adapter": item.adapter,
                "base": item.base_version,
                "reason": str(item.reason),
                "attempt": item.attempt,
                "estimated seconds": item.estimated_seconds,
                "parked": item in plan.parked,
            }
            for item in (*plan.work, *plan.parked)
        ],
        description=f"{len(plan.work)} to judge, {len(plan.parked)} parked",
    )


@task(**RETRIES, task_run_name="fleet of {family}")
def publish_fleet(family: str, changes: FleetChanges) -> str:
    """Write the fleet report to a markdown artifact and return its text."""
    text = report(family, platform()).markdown() + "\n\n" + changes.markdown()
    create_markdown_artifact(key=f"fleet-{_slug(family)}", markdown=text)
    return text


def _slug(family: str) -> str:
    """Return the name in the alphabet of Prefect's artifact keys: lower case, digits and dashes.

    If that changes the name, a hash is appended, so that `a.b` and `a-b` have different keys.
    """
    slug = "".join(sign if sign.isalnum() else "-" for sign in family.lower())
    return slug if slug == family else f"{slug}-{content_sha256(family)[:8]}"
