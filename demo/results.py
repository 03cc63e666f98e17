"""Read the results of the demo from the registry, and format them as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from demo.base import FAMILY
from demo.settings import POLICY, DemoTask, recipes
from trans_peft.domain.evaluation import SuiteJudgment, Verdict
from trans_peft.errors import NotFoundError
from trans_peft.lifecycle.evaluation import evaluate_on, pin_suites
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
    """Results of one adapter, trained on v1 and judged on v2. Scores are in points."""

    adapter: str
    task: str
    method: str
    bare_v1: float
    figures: SuiteJudgment
    verdict: Verdict
    reason: str
    serves: bool


def results(demo_tasks: Sequence[DemoTask], version: str, platform: Platform) -> list[Result]:
    """Return every result on a new base version. NotFoundError if a verdict is missing.

    No flow needs the score of the bare v1. It is read from the evaluation store, or computed if it
    is not stored yet.
    """
    v1 = find_base(FAMILY, "v1", platform)
    rows = {row.adapter: row for row in report(FAMILY, platform).rows if row.base == version}
    found = []
    for demo_task in demo_tasks:
        suites = pin_suites((demo_task.suite,), platform)
        bare = evaluate_on(v1, suites, platform)[demo_task.suite.name].score
        for recipe in recipes(demo_task):
            row = rows.get(recipe.adapter)
            if row is None or row.verdict is None or not row.suites:
                raise NotFoundError(
                    f"{recipe.adapter} has no verdict with figures on {version}",
                    found=row.reason if row else "not in the registry",
                )
            found.append(
                Result(
                    adapter=recipe.adapter,
                    task=demo_task.task.name,
                    method=_method(recipe.perturbation.masking_p, recipe.perturbation.dropping_p),
                    bare_v1=bare,
                    figures=row.suites[0],
                    verdict=row.verdict,
                    reason=row.reason,
                    serves=row.serves,
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
    shown.add_column("v1 → v2\nbare base", justify="right", no_wrap=True)
    shown.add_column("change\nbounds", justify="right", no_wrap=True)
    shown.add_column("items\npower", justify="right", no_wrap=True)
    shown.add_column("verdict\n", no_wrap=True)
    for result in found:
        figures = result.figures
        old, bare = figures.versus_old_base, figures.versus_bare_base
        bare_v2 = "?" if bare is None else f"{bare.reference_score:.1f}"
        style = _STYLES.get(result.verdict, "red")
        shown.add_row(
            f"[bold]{result.adapter}[/]\n[dim]{result.method}[/]",
            f"{old.reference_score:.1f} → {figures.score:.1f}\n"
            f"[dim]{result.bare_v1:.1f} → {bare_v2}[/]",
            f"{old.difference:+.1f}\n[dim]{old.lower:+.1f}, {old.upper:+.1f}[/]",
            f"{figures.items}/{old.discordant}\n[dim]{100 * figures.power:.0f} %[/]",
            f"[{style}]{result.verdict}[/]",
        )
    return shown


def notes(found: Sequence[Result]) -> list[str]:
    """Return notes to the table: the reasons of the verdicts, and the meaning of the figures."""
    lines = [f"{result.adapter}: {result.reason}" for result in found]
    lines.append(
        f"The margin of {POLICY.margin_points:g} points and the one-sided level {POLICY.alpha:g} "
        "were fixed before anything was scored. Bounds: Tango's score interval of the paired "
        "difference. items: all items / items that are right on exactly one base. power: the "
        "probability of passing if nothing was lost, at this number of such items."
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
    lost = [-arm.figures.versus_old_base.difference for arm in (plain, ours)]
    on_v2 = ours.figures.score - plain.figures.score
    on_v1 = (
        ours.figures.versus_old_base.reference_score - plain.figures.versus_old_base.reference_score
    )
    return [
        f"{ours.task}: the update cost the plain adapter {lost[0]:.1f} points and the Trans-PEFT "
        f"one {lost[1]:.1f}. Trans-PEFT is {_ahead(on_v1)} on v1 and {_ahead(on_v2)} on v2. One "
        "seed and one update show no reliable difference."
    ]


def _ahead(points: float) -> str:
    if abs(points) < 0.05:
        return "level"
    return f"{abs(points):.1f} points {'ahead' if points > 0 else 'behind'}"
