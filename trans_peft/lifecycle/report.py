"""The fleet report: every adapter on every base version, with the figures of each verdict."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trans_peft.domain.adapter import AdapterVersion, AliasState
from trans_peft.domain.evaluation import SuiteJudgment, Verdict, engine_lines
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import StoreError, TransPeftError, listed_lines
from trans_peft.lifecycle.reconcile import observe
from trans_peft.ports import Platform

__all__ = ["MAX_ADAPTERS", "FleetReport", "FleetRow", "report", "report_of"]

MAX_ADAPTERS = 200
"""The number of adapters whose figures the report has. Each costs a request for each suite."""


@dataclass(frozen=True)
class FleetRow:
    """One adapter on one base version.

    Attributes:
        adapter: The adapter's name.
        method: The PEFT type of the source version.
        trained_on: The label of the base version that the source version was trained on.
        base: The label of this base version.
        verdict: None on the base that the adapter was trained on, and without a verdict yet.
        reason: The reason of the verdict, or why there is none.
        serves: Whether the adapter's alias for this base is set on a version for this base.
        manual: A description of the manual override of that alias; empty without one.
        suites: The figures of the verdict, by suite.
        scores: (suite, score in points) on the base that the adapter was trained on.
        chance: The score of random guessing in points by suite, where it is known.
        strategy: The recovery strategy that made the version on this base.
        tried: All strategies that were tried, with their duration.
    """

    adapter: str
    method: str
    trained_on: str
    base: str
    verdict: Verdict | None
    reason: str
    serves: bool
    manual: str = ""
    suites: tuple[SuiteJudgment, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    chance: Mapping[str, float] = field(default_factory=dict)
    strategy: RecoveryStrategy = RecoveryStrategy.DIRECT
    tried: tuple[StrategyAttempt, ...] = ()


@dataclass(frozen=True)
class FleetReport:
    """The report of one family.

    Attributes:
        family: The base family.
        serving: The label of the base version with the alias `serving`.
        champion: The label of the base version with the alias `champion`.
        bases: The labels of all ready base versions, oldest first.
        rows: One row for each adapter and base version.
        note: Why `serving` has not moved to `champion`, as noted on that version.
        unreadable: Registry entries that cannot be read, each with the reason.
    """

    family: str
    serving: str | None
    champion: str | None
    bases: tuple[str, ...]
    rows: tuple[FleetRow, ...]
    note: str = ""
    unreadable: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the report in Markdown: a table of adapters and bases, then the reasons.

        Of a large fleet, it has `MAX_ADAPTERS` adapters and how many serve on each base.
        """
        cells = {(row.adapter, row.base): row for row in self.rows}
        live = list(dict.fromkeys(row.adapter for row in self.rows))
        adapters = live[:MAX_ADAPTERS]
        shown = {*adapters}
        lines = [
            f"# Fleet of {self.family}",
            "",
            f"serving: **{self.serving or 'nothing'}**, champion: "
            f"**{self.champion or 'not set (paused: serving does not change)'}**",
            "",
            *([f"**{self.champion} does not serve**: {self.note}", ""] if self.note else []),
            *([self._totals(len(live)), ""] if len(live) > len(adapters) else []),
            "| adapter | " + " | ".join(self.bases) + " |",
            "|---|" + "---|" * len(self.bases),
        ]
        lines += [
            f"| {name} | " + " | ".join(_cell(cells[name, base]) for base in self.bases) + " |"
            for name in adapters
        ]
        judged = [row for row in self.rows if row.verdict is not None and row.adapter in shown]
        lines += ["", "## Why", ""] if judged else []
        lines += [
            f"- **{row.adapter}** on {row.base}: {row.verdict}. {row.reason}{_strategies(row)}"
            f"{_engines(row)}"
            for row in judged
        ]
        manual = [
            f"**{row.adapter}** on {row.base}: {row.manual}" for row in self.rows if row.manual
        ]
        lines += ["", "## Manual overrides", ""] if manual else []
        lines += [f"- {text}" for text in listed_lines(manual, MAX_ADAPTERS)]
        lines += ["", "## Unreadable entries", ""] if self.unreadable else []
        unreadable = [" ".join(text.split()) for text in self.unreadable]
        lines += [f"- {text}" for text in listed_lines(unreadable, MAX_ADAPTERS)]
        return "\n".join(lines)

    def _totals(self, live: int) -> str:
        """Return how many adapters serve on each base, and which ones are shown."""
        serving = Counter(row.base for row in self.rows if row.serves)
        totals = ", ".join(f"{serving[base]} on {base}" for base in self.bases)
        return (
            f"{live} live adapters. Serving: {totals}. The first {MAX_ADAPTERS} are shown, "
            f"those that do not serve on {self.champion or self.serving or 'a base'} before others."
        )


def report(family: str, platform: Platform) -> FleetReport:
    """Read one family's fleet and return its report, as `report_of` does."""
    return report_of(observe(family, platform), platform)


def report_of(fleet: Fleet, platform: Platform) -> FleetReport:
    """Return the report of a fleet. It reads the scores of at most `MAX_ADAPTERS` adapters.

    Adapters that do not serve on the champion come first if there are more than `MAX_ADAPTERS`.
    Only the first `MAX_ADAPTERS` adapters have `scores`.
    """
    serving, champion = fleet.base(fleet.serving), fleet.base(fleet.champion)
    wanted = champion or serving
    if wanted is not None and len(fleet.adapters) > MAX_ADAPTERS:
        order = sorted(fleet.adapters, key=lambda one: one.serving_on(wanted) is not None)
        fleet = replace(fleet, adapters=tuple(order))
    unreadable = [*fleet.unreadable, *fleet.set_aside]
    rows = _rows(fleet, platform, unreadable)
    return FleetReport(
        family=fleet.family,
        serving=serving.version if serving else None,
        champion=champion.version if champion else None,
        bases=tuple(base.version for base in fleet.bases),
        rows=tuple(rows),
        note=fleet.notes.get(fleet.champion, "") if fleet.champion is not None else "",
        unreadable=tuple(unreadable),
    )


def _scores(
    version: AdapterVersion, platform: Platform, unreadable: list[str]
) -> tuple[tuple[str, float], ...]:
    """Return the stored score of each suite; add unreadable evaluations to `unreadable`.

    Raises StoreError if the evaluation store does not respond.
    """
    scores = []
    for suite in version.suites:
        try:
            found = platform.evaluations.summary(
                suite.evaluation_key(version.weights_sha256, version.base.fingerprint_sha256)
            )
        except StoreError:
            raise
        except TransPeftError as error:
            unreadable.append(f"{version}, suite {suite.name}: {error}")
            continue
        scores += [(suite.name, found.score)] if found is not None else []
    return tuple(scores)


def _rows(fleet: Fleet, platform: Platform, unreadable: list[str]) -> Sequence[FleetRow]:
    rows = []
    has_store_failed = False

    def scores(version: AdapterVersion) -> tuple[tuple[str, float], ...]:
        nonlocal has_store_failed
        if has_store_failed:
            return ()
        try:
            return _scores(version, platform, unreadable)
        except StoreError as error:
            has_store_failed = True
            unreadable.append(f"the scores of stored evaluations are missing: {error}")
            return ()

    for number, adapter in enumerate(fleet.adapters):
        source = adapter.source
        for base in fleet.bases:
            outcome = adapter.outcome_on(base)
            trained_here = adapter.trained_on(base)
            rows.append(
                FleetRow(
                    adapter=adapter.name,
                    method=source.method,
                    trained_on=source.trained_on.version,
                    base=base.version,
                    verdict=outcome.verdict if outcome and not trained_here else None,
                    reason=(
                        _training_note(trained_here)
                        if trained_here
                        else outcome.judgment.reason
                        if outcome
                        else "no verdict"
                    ),
                    serves=adapter.serving_on(base) is not None,
                    manual=_override_note(adapter.alias_on(base)),
                    suites=outcome.judgment.suites if outcome else (),
                    scores=(scores(trained_here) if trained_here and number < MAX_ADAPTERS else ()),
                    chance={
                        suite.name: suite.chance_points
                        for suite in source.suites
                        if suite.chance_points is not None
                    },
                    strategy=outcome.strategy if outcome else RecoveryStrategy.DIRECT,
                    tried=outcome.tried if outcome else (),
                )
            )
    return rows


def _cell(row: FleetRow) -> str:
    scores = row.scores or tuple((suite.suite, suite.score) for suite in row.suites)
    figures = ", ".join(f"{name} {score:.1f}{_chance(row, name)}" for name, score in scores)
    result = str(row.verdict) if row.verdict else row.reason
    serves = "**serves**" if row.serves else ""
    manual = "" if not row.manual else "approved manually" if row.serves else "blocked manually"
    return ", ".join(filter(None, [figures, result, serves, manual]))


def _chance(row: FleetRow, suite: str) -> str:
    return f" (chance {row.chance[suite]:.1f})" if suite in row.chance else ""


def _strategies(row: FleetRow) -> str:
    if not row.tried:
        return ""
    return f" Strategy: {row.strategy}. Tried: {'; '.join(map(str, row.tried))}."


def _engines(row: FleetRow) -> str:
    lines = engine_lines(row.suites)
    return f" Engine: {'; '.join(lines)}." if lines else ""


def _training_note(version: AdapterVersion) -> str:
    is_retrained = version.made_by is RecoveryStrategy.RETRAINED
    return "retrained here after an update" if is_retrained else "trained here"


def _override_note(state: AliasState) -> str:
    return str(state.recorded or "not recorded yet") if state.is_manual else ""
