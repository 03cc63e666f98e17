"""The rows of one family, built once for each snapshot, and their selection for one page."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import ceil

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trans_peft.domain.adapter import AliasState
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Judgment, Verdict
from trans_peft.domain.fleet import Fleet, RegisteredAdapter
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import unknown_name
from trans_peft.ui.figures import finite

__all__ = [
    "Cell",
    "FleetIndex",
    "FleetPage",
    "FleetQuery",
    "Override",
    "Row",
    "Sort",
    "State",
    "build_index",
    "cell_of",
    "select",
]


class State(StrEnum):
    """The state of one adapter on one base version: its verdict, or why it has none."""

    FAILED = Verdict.FAILED.value
    NEEDS_RETUNING = Verdict.NEEDS_RETUNING.value
    INCOMPATIBLE = Verdict.INCOMPATIBLE.value
    RETIRE = Verdict.RETIRE.value
    INCONCLUSIVE = Verdict.INCONCLUSIVE.value
    MISSING = "missing"
    PASSED = Verdict.PASSED.value
    TRAINED = "trained"


_LONGEST_OWNER = 200
"""Characters of an owner that the filter offers: a longer one makes URLs that proxies refuse."""

_RANK = {state: rank for rank, state in enumerate(State)}  # what needs attention comes first


class Override(StrEnum):
    """What a person did with the alias of an adapter on a base version, against reconcile."""

    NONE = ""
    APPROVED = "approved"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True)
class Cell:
    """One adapter on one base version.

    Attributes:
        base: Label of the base version.
        state: The verdict, `trained` or `missing`.
        serves: Whether a version of the adapter serves on this base version.
        override: Whether a person approved or blocked the adapter there.
        difference: Change of the score from the old base in points, of the suite with the largest
            loss. None without figures.
        strategy: The recovery strategy that made the version; empty for direct transfer.
    """

    base: str
    state: State
    serves: bool
    override: Override
    difference: float | None
    strategy: str


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter with a cell for each ready base version, oldest first."""

    adapter: str
    owner: str
    method: str
    suites: tuple[str, ...]
    trained_on: str
    cells: tuple[Cell, ...]


class Sort(StrEnum):
    """What rows are sorted by. Verdicts: those that need attention first."""

    NAME = "name"
    VERDICT = "verdict"
    DIFFERENCE = "difference"
    METHOD = "method"


class FleetQuery(BaseModel):
    """Which adapters of a family are shown, and in which order. An empty filter keeps all."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    q: str = Field(default="", max_length=100, description="part of the adapter's name")
    base: str = Field(
        default="",
        description="base version of the filters and the order; default: champion, or else the "
        "newest",
    )
    verdict: State | None = Field(default=None, description="verdict on that base version")
    method: str = Field(default="", description="PEFT type of the adapter")
    suite: str = Field(default="", description="name of a suite of the adapter")
    owner: str = Field(default="", description="tag `owner` of the adapter's registered model")
    serves: bool = Field(default=False, description="only adapters that serve on that base version")
    sort: Sort = Field(default=Sort.NAME)
    descending: bool = False
    page: int = Field(default=1, ge=1, le=1_000_000)
    size: int = Field(default=50, ge=1, le=1000, description="adapters on one page")

    @field_validator("verdict", mode="before")
    @classmethod
    def _empty_is_none(cls, verdict: object) -> object:
        return verdict or None  # a form sends an empty text


@dataclass(frozen=True)
class FleetPage:
    """The selected rows of one page.

    Attributes:
        rows: The rows of this page.
        found: Number of selected rows on all pages.
        total: Number of live adapters of the family.
        page: Number of this page, at most `pages`.
        pages: Number of pages, at least 1.
        base: Label of the base version that filters and order refer to; empty without one.
    """

    rows: tuple[Row, ...]
    found: int
    total: int
    page: int
    pages: int
    base: str


@dataclass(frozen=True)
class FleetIndex:
    """The rows of one family, by name of the adapter, and what the filters offer."""

    fleet: Fleet
    rows: tuple[Row, ...]

    @cached_property
    def bases(self) -> tuple[str, ...]:
        """Labels of the ready base versions, oldest first."""
        return tuple(base.version for base in self.fleet.bases)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """PEFT types of the adapters."""
        return tuple(sorted({row.method for row in self.rows}))

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """Names of the adapters' suites."""
        return tuple(sorted({suite for row in self.rows for suite in row.suites}))

    @cached_property
    def owners(self) -> tuple[str, ...]:
        """Owners of the adapters that have one, without those too long for a URL."""
        return tuple(sorted({r.owner for r in self.rows if 0 < len(r.owner) <= _LONGEST_OWNER}))

    @cached_property
    def adapters(self) -> Mapping[str, RegisteredAdapter]:
        """The live adapters by name."""
        return {adapter.name: adapter for adapter in self.fleet.adapters}

    @cached_property
    def counts(self) -> Mapping[str, Counter[State]]:
        """Number of adapters in each state, by label of the base version."""
        return {
            base: Counter(row.cells[column].state for row in self.rows)
            for column, base in enumerate(self.bases)
        }

    @cached_property
    def serving_counts(self) -> Mapping[str, int]:
        """Number of adapters that serve, by label of the base version."""
        return {
            base: sum(row.cells[column].serves for row in self.rows)
            for column, base in enumerate(self.bases)
        }

    @cached_property
    def default_base(self) -> str:
        """Label of `champion`, or of the newest base version; empty if none is ready."""
        champion = self.fleet.base(self.fleet.champion)
        return champion.version if champion else self.bases[-1] if self.bases else ""

    def base(self, label: str) -> BaseVersion:
        """Return the ready base version with that label. Raises NotFoundError."""
        for base in self.fleet.bases:
            if base.version == label:
                return base
        raise unknown_name(f"ready base version of {self.fleet.family}", label, self.bases)


def build_index(fleet: Fleet) -> FleetIndex:
    """Return the index of a fleet. All of its figures are computed now, not by a request."""
    rows = sorted((_row(adapter, fleet.bases) for adapter in fleet.adapters), key=_by_name)
    index = FleetIndex(fleet, tuple(rows))
    _ = index.counts, index.serving_counts, index.methods, index.suites, index.owners
    _ = index.adapters
    return index


def _row(adapter: RegisteredAdapter, bases: tuple[BaseVersion, ...]) -> Row:
    source = adapter.source
    outcomes: dict[str, TransferOutcome] = {}
    for outcome in adapter.outcomes:  # newest first
        if outcome.weights_sha256 == source.weights_sha256:
            outcomes.setdefault(outcome.base.fingerprint_sha256, outcome)
    trained = {
        version.base.fingerprint_sha256
        for version in adapter.versions
        if version.is_trained and not version.state.superseded
    }
    return Row(
        adapter.name,
        adapter.owner,
        source.method,
        tuple(suite.name for suite in source.suites),
        source.trained_on.version,
        tuple(
            cell_of(
                adapter,
                base,
                outcomes.get(base.fingerprint_sha256),
                is_trained=base.fingerprint_sha256 in trained,
            )
            for base in bases
        ),
    )


def cell_of(
    adapter: RegisteredAdapter,
    base: BaseVersion,
    outcome: TransferOutcome | None,
    *,
    is_trained: bool,
) -> Cell:
    """Return the cell of an adapter on a base version with its outcome there."""
    alias = adapter.alias_on(base)
    serves = adapter.serving_on(base) is not None
    if is_trained or outcome is None:
        state = State.TRAINED if is_trained else State.MISSING
        return Cell(base.version, state, serves, _override(alias, serves), None, "")
    strategy = "" if outcome.strategy is RecoveryStrategy.DIRECT else outcome.strategy.value
    return Cell(
        base.version,
        State(outcome.verdict.value),
        serves,
        _override(alias, serves),
        _largest_loss(outcome.judgment),
        strategy if outcome.new_number is not None else "",
    )


def _override(alias: AliasState, serves: bool) -> Override:
    if not alias.is_manual:
        return Override.NONE
    return Override.APPROVED if serves else Override.BLOCKED


def _largest_loss(judgment: Judgment) -> float | None:
    differences = [finite(suite.versus_old_base.difference) for suite in judgment.suites]
    return min((d for d in differences if d is not None), default=None)


def select(index: FleetIndex, query: FleetQuery) -> FleetPage:
    """Return the page of the rows that a query selects. NotFoundError for an unknown base version.

    A page after the last one is the last one. Rows that compare equal are in the order of names.
    """
    label = query.base or index.default_base
    column = index.bases.index(index.base(label).version) if label else None
    rows = [row for row in index.rows if _matches(row, query, column)]
    rows = _sorted(rows, query, column)
    pages = max(1, ceil(len(rows) / query.size))
    page = min(query.page, pages)
    start = (page - 1) * query.size
    return FleetPage(
        tuple(rows[start : start + query.size]), len(rows), len(index.rows), page, pages, label
    )


def _matches(row: Row, query: FleetQuery, column: int | None) -> bool:
    if query.q and query.q.lower() not in row.adapter.lower():
        return False
    if query.method and query.method != row.method:
        return False
    if query.suite and query.suite not in row.suites:
        return False
    if query.owner and query.owner != row.owner:
        return False
    if column is None:
        return not query.verdict and not query.serves
    cell = row.cells[column]
    return (not query.verdict or cell.state == query.verdict) and (not query.serves or cell.serves)


def _sorted(rows: list[Row], query: FleetQuery, column: int | None) -> list[Row]:
    """Sort rows that are in the order of names. Rows without a figure stay last in both orders."""
    if query.sort is Sort.NAME:
        return rows[::-1] if query.descending else rows
    if query.sort is Sort.METHOD:
        return sorted(rows, key=lambda row: row.method, reverse=query.descending)
    if column is None:
        return rows
    if query.sort is Sort.VERDICT:
        rank: Callable[[Row], int] = lambda row: _RANK[row.cells[column].state]  # noqa: E731
        return sorted(rows, key=rank, reverse=query.descending)
    known = [row for row in rows if row.cells[column].difference is not None]
    unknown = [row for row in rows if row.cells[column].difference is None]
    known.sort(key=lambda row: row.cells[column].difference or 0.0, reverse=query.descending)
    return known + unknown


def _by_name(row: Row) -> tuple[str, str]:
    return row.adapter.lower(), row.adapter
