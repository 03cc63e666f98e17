"""Read the results of the demo from the registry, and format them as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from demo.base import FAMILY
from demo.settings import POLICY, DemoTask, recipes
from trans_peft.domain.evaluation import SuiteJudgment, Verdict
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.evaluation import pin_suites
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import find_base
from trans_peft.ports import Platform

__all__ = ["Result", "notes", "results", "table"]

_STYLES = {
    Verdict.PASSED: "green",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.NEEDS_RETUNING: "red",
    Verdict.RETIRE: "magenta",
}


@dataclass(frozen=True)
class Result:
    """Results of one adapter, trained on v1 and judged on v2. Scores are in points.

    Attributes:
        adapter: The adapter's name.
        task: The name of its task.
        method: How it was trained.
        direct: The score of the unchanged adapter on v2.
        figures: The figures of the version that is registered for v2.
        verdict: The verdict on that version.
        reason: The reason of the verdict.
        serves: Whether that version may serve.
        strategy: The recovery strategy that made that version.
        tried: All strategies that were tried.
    """

    adapter: str
    task: str
    method: str
    direct: float
    figures: SuiteJudgment
    verdict: Verdict
    reason: str
    serves: bool
    strategy: RecoveryStrategy = RecoveryStrategy.DIRECT
    tried: tuple[StrategyAttempt, ...] = ()


def results(demo_tasks: Sequence[DemoTask], version: str, platform: Platform) -> list[Result]:
    """Return every result on a new base version. NotFoundError if a verdict is missing."""
    new = find_base(FAMILY, version, platform)
    sources = {adapter.name: adapter.source for adapter in observe(FAMILY, platform).adapters}
    rows = {row.adapter: row for row in report(FAMILY, platform).rows if row.base == version}
    found = []
    for demo_task in demo_tasks:
        suites = pin_suites((demo_task.suite,), platform)
        for recipe in recipes(demo_task):
            row = rows.get(recipe.adapter)
            if row is None or row.verdict is None or not row.suites:
                raise NotFoundError(
                    f"{recipe.adapter} has no verdict with figures on {version}",
                    found=row.reason if row else "not in the registry",
                )
            weights_sha256 = sources[recipe.adapter].weights_sha256
            direct = platform.evaluations.get(
                suites[0].evaluation_key(weights_sha256, new.fingerprint_sha256)
            )
            if direct is None:
                raise NotFoundError(f"{recipe.adapter} has no score on {version}")
            found.append(
                Result(
                    adapter=recipe.adapter,
                    task=demo_task.task.name,
                    method=_method(recipe.perturbation.masking_p, recipe.perturbation.dropping_p),
                    direct=direct.score,
                    figures=row.suites[0],
                    verdict=row.verdict,
                    reason=row.reason,
                    serves=row.serves,
                    strategy=row.strategy,
                    tried=row.tried,
                )
            )
    return found


def _method(masking_p: float, dropping_p: float) -> str:
    parts = [f"{name} {p:g}" for name, p in (("mask", masking_p), ("drop", dropping_p)) if p]
    return f"Trans-PEFT ({', '.join(parts)})" if parts else "plain LoRA"


def table(found: Sequence[Result]) -> Table:
    """Return the table: one row per adapter, scores and differences in points, 80 columns wide."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    shown.add_column("adapter\nmethod", no_wrap=True)
    shown.add_column("v1→v2→final\nbare v2", no_wrap=True)
    shown.add_column("change\nbounds", justify="right", no_wrap=True)
    shown.add_column("items\npower", justify="right", no_wrap=True)
    shown.add_column("verdict\nstrategy", no_wrap=True)
    for result in found:
        figures = result.figures
        old, bare = figures.versus_old_base, figures.versus_bare_base
        bare_v2 = "?" if bare is None else f"{bare.reference_score:.1f}"
        scores = [old.reference_score, result.direct]
        if result.strategy is not RecoveryStrategy.DIRECT:
            scores.append(figures.score)
        style = _STYLES.get(result.verdict, "red")
        shown.add_row(
            f"[bold]{result.adapter}[/]\n[dim]{result.method}[/]",
            f"{'→'.join(f'{score:.1f}' for score in scores)}\n[dim]{bare_v2}[/]",
            f"{old.difference:+.1f}\n[dim]{old.lower:+.1f}, {old.upper:+.1f}[/]",
            f"{figures.items}/{old.discordant}\n[dim]{100 * figures.power:.0f} %[/]",
            f"[{style}]{result.verdict}[/]\n[dim]{result.strategy}[/]",
        )
    return shown


def notes(found: Sequence[Result]) -> list[str]:
    """Return notes to the table: the reasons of the verdicts, and the meaning of the figures."""
    lines = []
    for result in found:
        attempts = [
            f"{attempt}. {attempt.reason}" if attempt.verdict else str(attempt)
            for attempt in result.tried
        ]
        lines += [f"{result.adapter}: {text}" for text in attempts or [result.reason]]
    lines.append(
        f"The margin of {POLICY.margin_points:g} points and the one-sided level "
        f"{POLICY.alpha:g}, shared by {len(POLICY.recovery.strategies)} strategies, were fixed "
        "before anything was scored. Bounds: Tango's score interval of the paired "
        "difference. items: all items / items that are right on exactly one base. power: the "
        "probability of passing if nothing was lost, at this number of such items. strategy: how "
        "the version for v2 was made, without a training row."
    )
    for task in dict.fromkeys(result.task for result in found):
        lines += _comparison([result for result in found if result.task == task])
    return lines


def _comparison(arms: Sequence[Result]) -> list[str]:
    """Return a sentence that compares the two adapters of a task."""
    plain = next((arm for arm in arms if arm.method == "plain LoRA"), None)
    ours = next((arm for arm in arms if arm.method != "plain LoRA"), None)
    if plain is None or ours is None:
        return []
    on_v1 = [arm.figures.versus_old_base.reference_score for arm in (plain, ours)]
    lost = [before - arm.direct for before, arm in zip(on_v1, (plain, ours), strict=True)]
    return [
        f"{ours.task}: before recovery, the update cost the plain adapter {lost[0]:.1f} points and "
        f"the Trans-PEFT one {lost[1]:.1f}. Trans-PEFT is {_ahead(on_v1[1] - on_v1[0])} on v1 and "
        f"{_ahead(ours.direct - plain.direct)} on v2. One seed and one update show no reliable "
        "difference."
    ]


def _ahead(points: float) -> str:
    if abs(points) < 0.05:
        return "level"
    return f"{abs(points):.1f} points {'ahead' if points > 0 else 'behind'}"
