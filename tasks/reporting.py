"""Pages for people: what is planned, and the fleet as it stands."""

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
    """Write the plan to the log and as a table: adapter, base, reason, attempt, estimated cost."""
    logger = get_run_logger()
    for item in plan.work:
        logger.info("%s", item)
    for item in plan.parked:
        logger.warning("parked for a person: %s", item)
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
        description=f"{len(plan.work)} to judge, {len(plan.parked)} parked for a person",
    )


@task(**RETRIES, task_run_name="fleet of {family}")
def publish_fleet(family: str, changes: FleetChanges) -> str:
    """Write the fleet report and return its text."""
    text = report(family, platform()).markdown() + "\n\n" + changes.markdown()
    create_markdown_artifact(key=f"fleet-{_slug(family)}", markdown=text)
    return text


def _slug(family: str) -> str:
    """Return the name as Prefect's artifact keys allow it: lower case, digits, dashes.

    A name that has other signs gets a hash, so that `a.b` and `a-b` keep two pages.
    """
    slug = "".join(sign if sign.isalnum() else "-" for sign in family.lower())
    return slug if slug == family else f"{slug}-{content_sha256(family)[:8]}"
