"""All views of the fleet page over one platform. Reads only."""

from dataclasses import dataclass

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.fleet import RegisteredAdapter
from trans_peft.domain.names import name_problem, quoted
from trans_peft.errors import NotFoundError, StoreError, TransPeftError, unknown_name
from trans_peft.ports import Platform
from trans_peft.ui.figures import finite
from trans_peft.ui.index import FleetPage, FleetQuery, State, select
from trans_peft.ui.life import (
    AdapterView,
    BaseView,
    Station,
    adapter_view,
    base_view,
)
from trans_peft.ui.links import Links
from trans_peft.ui.progress import FleetProgress
from trans_peft.ui.snapshots import Snapshot, Snapshots
from trans_peft.ui.verdict import Meaning, SuiteView, meaning_of, suites_of

__all__ = ["FamilyView", "Reader", "VerdictView"]


@dataclass(frozen=True)
class FamilyView:
    """One family in the list of all families. The figures are None until it has been read."""

    name: str
    live: int | None = None
    bases: int | None = None
    serving: str = ""
    champion: str = ""
    missing: int | None = None
    problems: int = 0


@dataclass(frozen=True)
class VerdictView:
    """One verdict explained.

    Attributes:
        adapter: Name of the adapter.
        family: Its family.
        base: Label of the new base version.
        old_base: Label of the base version that the judged weights were trained on.
        station: The verdict with its reason, strategies and override.
        meaning: What the verdict says, and what to do, also about a manual override.
        margin_points: The non-inferiority margin. None if the outcome does not record it.
        alpha: The one-sided level, likewise.
        leakage: Training rows that are items of a suite, as text for each suite.
        policy_sha256: Hash of the gate policy.
        largest_logit_change: Result of the effect probe; None if it was not run.
        suites: The figures of every suite.
        page_url: MLflow's page of the version that the transfer registered.
    """

    adapter: str
    family: str
    base: str
    old_base: str
    station: Station
    meaning: Meaning
    margin_points: float | None
    alpha: float | None
    leakage: tuple[str, ...]
    policy_sha256: str
    largest_logit_change: float | None
    suites: tuple[SuiteView, ...]
    page_url: str


class Reader:
    """Builds the views from the snapshots, and from the platform what snapshots do not have."""

    def __init__(self, platform: Platform, snapshots: Snapshots, links: Links) -> None:
        self._platform = platform
        self._snapshots = snapshots
        self._links = links

    def families(self) -> tuple[FamilyView, ...]:
        """Return all families. Does not wait for a family that has not been read yet."""
        return tuple(
            FamilyView(name) if (seen := self._snapshots.last(name)) is None else _family(seen)
            for name in self._snapshots.families()
        )

    def snapshot(self, family: str) -> Snapshot:
        """Return a family as it was last read. NotFoundError, StoreError."""
        if name_problem("the family", family):
            raise unknown_name("base family", quoted(family), self._snapshots.families())
        return self._snapshots.get(family)

    def failure(self, family: str) -> TransPeftError | None:
        """Return why a family could not be read again; None if the last read succeeded."""
        return self._snapshots.failure(family)

    def adapters(self, family: str, query: FleetQuery) -> FleetPage:
        """Return a page of the adapters of a family."""
        return select(self.snapshot(family).index, query)

    def progress(self, family: str) -> FleetProgress:
        """Return which verdicts exist, and which are missing, on each base version."""
        return self.snapshot(family).progress

    def adapter(self, family: str, name: str) -> AdapterView:
        """Return the life of an adapter, live or retired. NotFoundError."""
        seen = self.snapshot(family)
        return adapter_view(self._adapter(seen, name), seen.fleet, self._links)

    def verdict(self, family: str, name: str, base_label: str) -> VerdictView:
        """Return a verdict with its figures. NotFoundError if there is none."""
        seen = self.snapshot(family)
        adapter, base = self._adapter(seen, name), seen.index.base(base_label)
        outcome = adapter.outcome_on(base)
        view = adapter_view(adapter, seen.fleet, self._links)
        station = next(s for s in view.stations if s.cell.base == base.version)
        if outcome is None or not station.has_outcome:
            raise NotFoundError(
                f"{name} has no verdict on {base}",
                expected="an outcome of a transfer to that base version",
                found="trained on it" if station.cell.state is State.TRAINED else "no verdict yet",
                do="wait for reconcile, or choose a base version with a verdict",
            )
        source = next((v for v in adapter.versions if v.number == outcome.source_number), None)
        return VerdictView(
            adapter=name,
            family=family,
            base=base.version,
            old_base=(source or adapter.source).trained_on.version,
            station=station,
            meaning=meaning_of(station.cell.state, station.cell.override, base, outcome.new_number),
            margin_points=finite(outcome.judgment.margin_points),
            alpha=finite(outcome.judgment.alpha),
            leakage=tuple(map(str, outcome.judgment.leakage)),
            policy_sha256=outcome.policy_sha256,
            largest_logit_change=finite(outcome.effect.max_logit_change)
            if outcome.effect
            else None,
            suites=suites_of(adapter, base, outcome, self._platform.evaluations),
            page_url=self._links.version(name, outcome.new_number or outcome.source_number),
        )

    def base(self, family: str, label: str) -> BaseView:
        """Return a base version, ready or not. NotFoundError."""
        seen = self.snapshot(family)
        base = _any_base(seen, label)
        if not base.ready:
            return base_view(base, seen.fleet, self._links, None, "it is not ready")
        try:
            fingerprint = self._platform.catalog.fingerprint(base)
        except TransPeftError as error:
            return base_view(base, seen.fleet, self._links, None, str(error))
        return base_view(base, seen.fleet, self._links, fingerprint)

    def _adapter(self, seen: Snapshot, name: str) -> RegisteredAdapter:
        """Return an adapter of a snapshot, or read it: it may be retired, new or unreadable."""
        family = seen.fleet.family
        if name in seen.index.adapters:
            return seen.index.adapters[name]
        unknown = NotFoundError(
            f"the family {family} has no adapter {quoted(name)}",
            expected=f"one of its {len(seen.index.adapters):,} live adapters, or a retired one",
            do="search for a part of the name on the page of the family",
        )
        if name_problem("the adapter", name):
            raise unknown
        try:
            found = self._platform.registry.adapter(name)
        except NotFoundError:
            raise unknown from None
        if found.family != family:
            raise unknown
        if not found.versions:
            raise StoreError(f"{name} has no versions", do="train or adopt it")
        return found


def _any_base(seen: Snapshot, label: str) -> BaseVersion:
    for base in (*seen.fleet.bases, *seen.waiting):
        if base.version == label:
            return base
    return seen.index.base(label)  # raises the error with the names most like it


def _family(seen: Snapshot) -> FamilyView:
    fleet = seen.fleet
    serving, champion = fleet.base(fleet.serving), fleet.base(fleet.champion)
    return FamilyView(
        fleet.family,
        live=len(fleet.adapters),
        bases=len(fleet.bases),
        serving=serving.version if serving else "",
        champion=champion.version if champion else "",
        missing=seen.progress.missing,
        problems=len(fleet.unreadable) + len(fleet.set_aside),
    )
