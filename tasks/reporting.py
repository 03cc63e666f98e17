"""Prefect artifacts for users: the plan and the fleet report of a family."""

from collections.abc import Iterable, Mapping
from logging import INFO, WARNING

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from tasks.composition import platform
from tasks.retries import RETRIES
from trans_peft.domain.conventions import OUTCOME_TAG_PREFIX, TAG_PREFIX, artifact_key
from trans_peft.domain.fleet import Fleet, FleetChanges
from trans_peft.domain.outcome import Plan, TransferTask
from trans_peft.errors import listed, listed_lines
from trans_peft.lifecycle.promotion import describe_obstacle
from trans_peft.lifecycle.report import report_of

__all__ = [
    "MAX_LISTED",
    "changes_markdown",
    "limited",
    "obstacle_text",
    "parked_text",
    "publish_fleet",
    "publish_plan",
    "unprepared_text",
]

MAX_LISTED = 200
"""The number of lines of one kind in a log, an artifact or a state. A fleet may have thousands."""


@task(**RETRIES, task_run_name="plan of {plan.family}")
def publish_plan(plan: Plan, unprepared: Mapping[str, str] | None = None) -> None:
    """Write the plan to the log and to a table artifact.

    `unprepared`: the adapters that cannot be recovered without training rows, with the reasons.
    """
    logger = get_run_logger()
    readiness = "" if unprepared is None else unprepared_text(unprepared)
    for line in limited(map(str, plan.tasks)):
        logger.info("%s", line)
    costs = [line for line in (plan.total_cost, plan.recovery_cost) if line]
    for line in costs:
        logger.info("%s", line)
    if readiness:
        logger.log(WARNING if unprepared else INFO, "%s", readiness)
    for line in limited(map(parked_text, plan.parked)):
        logger.warning("%s", line)
    counts = (
        f"{len(plan.tasks)} to judge, {len(plan.parked)} parked; at most {MAX_LISTED} of each are "
        "listed"
    )
    create_table_artifact(
        key=artifact_key("plan", plan.family),
        table=[
            {
                "adapter": item.adapter,
                "base": item.base.version,
                "reason": str(item.reason),
                "attempt": item.attempt,
                "estimated seconds": None
                if item.estimated_seconds is None
                else round(item.estimated_seconds),
                "parked": is_parked,
            }
            for is_parked, items in ((False, plan.tasks), (True, plan.parked))
            for item in items[:MAX_LISTED]
        ],
        description="\n\n".join([counts, *costs, readiness]).rstrip(),
    )


@task(**RETRIES, task_run_name="fleet of {fleet.family}")
def publish_fleet(fleet: Fleet, changes: FleetChanges, warning: str = "") -> str:
    """Write the fleet report to a markdown artifact, below a warning, and return its text."""
    text = report_of(fleet, platform()).markdown() + "\n\n" + changes_markdown(changes)
    if warning:
        text = f"**Warning**\n\n```text\n{warning}\n```\n\n{text}"
    create_markdown_artifact(key=artifact_key("fleet", fleet.family), markdown=text)
    return text


def obstacle_text(changes: FleetChanges) -> str:
    """Return why `serving` did not move to `champion`, empty if nothing prevents it."""
    return "" if changes.obstacle is None else describe_obstacle(changes.obstacle)


def limited(lines: Iterable[str]) -> list[str]:
    """Return the first `MAX_LISTED` lines and, if there are others, a last line "and N more"."""
    return listed_lines([*lines], MAX_LISTED)


def unprepared_text(unprepared: Mapping[str, str]) -> str:
    """Return which adapters cannot be recovered without training rows, and why.

    Adapters with one reason are in one line.
    """
    if not unprepared:
        return "all adapters have what a recovery without training rows needs"
    names: dict[str, list[str]] = {}
    for name, reason in unprepared.items():
        names.setdefault(reason, []).append(name)
    lines = [f"- {listed(found)}: {reason}" for reason, found in names.items()]
    count = f"{len(unprepared)} adapter{'s' if len(unprepared) > 1 else ''}"
    return "\n".join([f"{count} cannot be recovered without training rows:", *limited(lines)])


def parked_text(item: TransferTask) -> str:
    """Return that all attempts of a task failed, and how to start it again."""
    tag = f"{TAG_PREFIX}{OUTCOME_TAG_PREFIX}{item.base.alias}"
    return (
        f"parked after three failed attempts: {item}\n"
        f"  do:       read the reason in the newest run of {item.adapter} in the experiment "
        f"trans-peft/transfers and correct its cause; then, in MLflow, remove the tag "
        f"{tag} of version {item.source_number} of {item.adapter}"
    )


def changes_markdown(changes: FleetChanges) -> str:
    """Return the changes of one run as a section of the fleet report."""
    aliases = [
        f"{change.adapter}: {change.alias} -> "
        + ("none" if change.number is None else f"version {change.number}")
        for change in changes.aliases
    ]
    overrides = [
        f"manual override kept: {found.adapter} on {found.base}: {found.override}"
        for found in changes.manual_overrides
    ]
    lines = [f"- {line}" for line in (*limited(aliases), *limited(overrides))]
    if changes.promoted is not None:
        lines.append(f"- **serving moved to {changes.promoted}**")
    if changes.obstacle is not None:
        what = "promotion refused" if changes.is_refused else "serving did not move"
        text = obstacle_text(changes).replace("\n", "\n  ")
        lines.append(f"- **{what}**: {text}")
    return "\n".join(["## Changes", "", *(lines or ["- none"])])
