"""The fleet report: adapters x base versions, with the figures behind each verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trans_peft.domain.adapter import AdapterVersion, AliasState, version_trained_on
from trans_peft.domain.evaluation import SuiteJudgement, Verdict
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import StoreError, TransPeftError
from trans_peft.lifecycle.reconcile import observe
from trans_peft.ports import Platform

__all__ = ["FleetReport", "FleetRow", "report"]


@dataclass(frozen=True)
class FleetRow:
    """One adapter on one base.

    `verdict` is None on the base it was trained on (there it is the reference itself) and where no
    verdict is known yet (`reason` says which). `serves`: whether its alias on that base is set, on
    bytes made for that base. `manual`: what a person did to that alias, where one did. `chance`:
    the score of blind guessing by suite, where it is known. `strategy` made the version on this
    base; `tried` are all rungs of a ladder with their cost.
    """

    adapter: str
    method: str
    trained_on: str
    base: str
    verdict: Verdict | None
    reason: str
    serves: bool
    manual: str = ""
    suites: tuple[SuiteJudgement, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()
    chance: Mapping[str, float] = field(default_factory=dict)
    strategy: RecoveryStrategy = RecoveryStrategy.DIRECT
    tried: tuple[StrategyAttempt, ...] = ()


@dataclass(frozen=True)
class FleetReport:
    """One family: what serves, what should, and a row for each adapter on each base.

    `note`: why what should serve does not, as it stands on that version's page. `unreadable`: what
    stands in the registry and cannot be read, by name, with the reason.
    """

    family: str
    serving: str | None
    champion: str | None
    bases: tuple[str, ...]
    rows: tuple[FleetRow, ...]
    note: str = ""
    unreadable: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the report as a page: adapters down, base versions across, then the reasons."""
        cells = {(row.adapter, row.base): row for row in self.rows}
        adapters = list(dict.fromkeys(row.adapter for row in self.rows))
        lines = [
            f"# Fleet of {self.family}",
            "",
            f"serving: **{self.serving or 'nothing'}**, champion: "
            f"**{self.champion or 'not set (paused: what serves stays)'}**",
            "",
            *([f"**{self.champion} does not serve**: {self.note}", ""] if self.note else []),
            "| adapter | " + " | ".join(self.bases) + " |",
            "|---|" + "---|" * len(self.bases),
        ]
        lines += [
            f"| {name} | " + " | ".join(_cell(cells[name, base]) for base in self.bases) + " |"
            for name in adapters
        ]
        judged = [row for row in self.rows if row.verdict is not None]
        lines += ["", "## Why", ""] if judged else []
        lines += [
            f"- **{row.adapter}** on {row.base}: {row.verdict}. {row.reason}{_ladder(row)}"
            for row in judged
        ]
        hands = [row for row in self.rows if row.manual]
        lines += ["", "## By hand", ""] if hands else []
        lines += [f"- **{row.adapter}** on {row.base}: {row.manual}" for row in hands]
        lines += ["", "## Set aside: cannot be read", ""] if self.unreadable else []
        lines += [f"- {' '.join(text.split())}" for text in self.unreadable]
        return "\n".join(lines)


def report(family: str, platform: Platform) -> FleetReport:
    """Read one family's fleet and return its report."""
    fleet = observe(family, platform)
    serving, champion = fleet.base(fleet.serving), fleet.base(fleet.champion)
    unreadable = [*fleet.unreadable, *fleet.set_aside]
    rows = _rows(fleet, platform, unreadable)
    return FleetReport(
        family=family,
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
    """Return the stored score of each suite; what cannot be read is added to `unreadable`.

    StoreError where the store of evaluations does not answer.
    """
    scores = []
    for suite in version.suites:
        try:
            found = platform.evaluations.get(
                suite.evaluation_key(version.weights_sha256, version.base_fingerprint_sha256)
            )
        except StoreError:
            raise
        except TransPeftError as error:
            unreadable.append(f"{version}, suite {suite.name}: {error}")
            continue
        scores += [(found.suite, found.score)] if found is not None else []
    return tuple(scores)


def _rows(fleet: Fleet, platform: Platform, unreadable: list[str]) -> Sequence[FleetRow]:
    rows = []
    no_answer = False

    def scores(version: AdapterVersion) -> tuple[tuple[str, float], ...]:
        nonlocal no_answer
        if no_answer:
            return ()
        try:
            return _scores(version, platform, unreadable)
        except StoreError as error:
            no_answer = True
            unreadable.append(f"the scores of stored evaluations are left out: {error}")
            return ()

    for adapter in fleet.adapters:
        source = adapter.source
        for base in fleet.bases:
            outcome = adapter.outcome_on(base)
            trained_here = version_trained_on(base.fingerprint_sha256, adapter.versions)
            rows.append(
                FleetRow(
                    adapter=adapter.name,
                    method=source.method,
                    trained_on=source.trained_on_version,
                    base=base.version,
                    verdict=outcome.verdict if outcome and not trained_here else None,
                    reason=(
                        _trained(trained_here)
                        if trained_here
                        else outcome.judgement.reason
                        if outcome
                        else "not judged"
                    ),
                    serves=adapter.can_serve(base, adapter.alias_on(base).number),
                    manual=_hand(adapter.alias_on(base)),
                    suites=outcome.judgement.suites if outcome else (),
                    scores=scores(trained_here) if trained_here else (),
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
    word = str(row.verdict) if row.verdict else row.reason
    serves = "**serves**" if row.serves else ""
    manual = "by hand" if row.manual and row.serves else "blocked by hand" if row.manual else ""
    return ", ".join(filter(None, [figures, word, serves, manual]))


def _chance(row: FleetRow, suite: str) -> str:
    return f" (chance {row.chance[suite]:.1f})" if suite in row.chance else ""


def _ladder(row: FleetRow) -> str:
    if not row.tried:
        return ""
    return f" Made by {row.strategy}; tried {'; '.join(map(str, row.tried))}."


def _trained(version: AdapterVersion) -> str:
    anew = version.made_by is RecoveryStrategy.RETRAINED
    return "trained here, anew after an update" if anew else "trained here"


def _hand(state: AliasState) -> str:
    return str(state.recorded or "seen only now") if state.manual else ""
