"""What the desired state of a family has already, and what it lacks, by base version."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from statistics import mean

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.lifecycle.reconcile import MAX_ATTEMPTS
from trans_peft.ui.figures import finite
from trans_peft.ui.index import FleetIndex, State

__all__ = ["BaseProgress", "FleetProgress", "progress_of"]


@dataclass(frozen=True)
class BaseProgress:
    """The verdicts of one family on one base version.

    Attributes:
        base: Label of the base version.
        number: Its number in MLflow.
        is_champion: Whether it has the alias `champion`.
        is_serving: Whether it has the alias `serving`.
        is_desired: Whether every live adapter needs a verdict there.
        live: Number of live adapters that can be read.
        judged: Adapters that have a verdict, or were trained there.
        missing: Adapters without a verdict.
        retried: Adapters whose transfer failed and is tried again.
        parked: Adapters whose transfer failed as often as it is tried.
        serving: Adapters that serve there.
        states: Number of adapters by state.
        seconds_each: Mean duration of a transfer there, or else in this family. None: unknown.
        seconds_left: `seconds_each` times the number of transfers that are left. None: unknown.
    """

    base: str
    number: int
    is_champion: bool
    is_serving: bool
    is_desired: bool
    live: int
    judged: int
    missing: int
    retried: int
    parked: int
    serving: int
    states: Mapping[State, int]
    seconds_each: float | None
    seconds_left: float | None

    @property
    def share(self) -> float:
        """Share of adapters that need no further transfer, from 0 to 1; 1 without adapters."""
        return 1.0 if not self.live else (self.judged - self.retried) / self.live


@dataclass(frozen=True)
class FleetProgress:
    """The progress of one family.

    Attributes:
        family: The name of the family.
        bases: All ready base versions, newest first.
        missing: Verdicts that the desired state lacks, over all desired base versions.
        seconds_left: Rough duration of the missing transfers, one after another. None: unknown.
        note: Why `serving` has not moved to `champion`, as noted in the registry.
    """

    family: str
    bases: tuple[BaseProgress, ...]
    missing: int
    seconds_left: float | None
    note: str


def progress_of(index: FleetIndex) -> FleetProgress:
    """Return the progress of a family, from the snapshot alone.

    Verdicts under an older gate policy count as present, because the policy is a parameter of
    reconcile and not part of the registry.
    """
    fleet = index.fleet
    by_base: dict[str, list[TransferOutcome]] = {}
    for adapter in fleet.adapters:
        weights = adapter.source.weights_sha256
        for outcome in adapter.outcomes:
            if outcome.weights_sha256 == weights:
                by_base.setdefault(outcome.base.fingerprint_sha256, []).append(outcome)
    overall = _mean_seconds([o for outcomes in by_base.values() for o in outcomes])
    desired = {base.fingerprint_sha256 for base in fleet.desired_bases}
    bases = tuple(
        _of_base(
            index,
            base,
            by_base.get(base.fingerprint_sha256, []),
            overall,
            is_desired=base.fingerprint_sha256 in desired,
        )
        for base in reversed(fleet.bases)
    )
    wanted = [base for base in bases if base.is_desired and base.missing + base.retried]
    estimates = [base.seconds_left for base in wanted]
    known = [seconds for seconds in estimates if seconds is not None]
    return FleetProgress(
        fleet.family,
        bases,
        sum(base.missing + base.retried for base in wanted),
        finite(sum(known)) if len(known) == len(estimates) else None,
        fleet.notes.get(fleet.champion, "") if fleet.champion is not None else "",
    )


def _of_base(
    index: FleetIndex,
    base: BaseVersion,
    outcomes: list[TransferOutcome],
    overall_seconds: float | None,
    *,
    is_desired: bool,
) -> BaseProgress:
    states = index.counts[base.version]
    column = index.bases.index(base.version)
    failed = {row.adapter for row in index.rows if row.cells[column].state is State.FAILED}
    parked = sum(o.adapter in failed and o.attempts >= MAX_ATTEMPTS for o in outcomes)
    missing, retried = states[State.MISSING], len(failed) - parked
    each = _mean_seconds(outcomes)
    each = overall_seconds if each is None else each
    return BaseProgress(
        base=base.version,
        number=base.number,
        is_champion=base.number == index.fleet.champion,
        is_serving=base.number == index.fleet.serving,
        is_desired=is_desired,
        live=len(index.rows),
        judged=len(index.rows) - missing,
        missing=missing,
        retried=retried,
        parked=parked,
        serving=index.serving_counts[base.version],
        states={state: states[state] for state in State if states[state]},
        seconds_each=each,
        seconds_left=None if each is None else finite(each * (missing + retried)),
    )


def _mean_seconds(outcomes: list[TransferOutcome]) -> float | None:
    """Return the mean duration of transfers that led to a verdict from figures; None without."""
    seconds = [
        o.seconds for o in outcomes if 0 < o.seconds < inf and o.verdict is not Verdict.FAILED
    ]
    return mean(seconds) if seconds else None
