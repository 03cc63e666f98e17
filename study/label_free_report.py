"""Compute the tables of docs/label-free.md: predictors of the loss without labels.

Each predictor is a risk: a larger value predicts a larger loss. The rank correlation is Spearman's
coefficient with the loss by the labels of other items. AUC is the probability that an adapter that
passes has a smaller risk than one that does not. Intervals are the middle 95 % of draws that
resample whole recipes (task, arm, steps), because seeds of one recipe are not independent adapters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from study.pages import with_blocks
from study.plan import UPDATES
from study.triage import NAMES
from trans_peft.domain.evaluation import BARE
from trans_peft.domain.experiment import OLD
from trans_peft.validation.statistics.intervals import lower_bound

if TYPE_CHECKING:
    from study.label_free import Adapter, Measured

__all__ = ["MARGINS", "PAGE", "Row", "area", "joined", "page_with", "rank_correlation"]

PAGE = Path(__file__).parent.parent / "docs" / "label-free.md"
MARGINS = (5.0, 10.0)
"""Margins of the gate in points, fixed before any measurement."""

_ALPHA, _DRAWS, _LEVEL = 0.05, 2_000, 0.95
_BOTH = "both"


@dataclass(frozen=True)
class Row:
    """One adapter under one update: its risks by name, and its loss by the labels, in points.

    `passed` is whether the gate's bound shows a smaller loss, by margin.
    """

    recipe: tuple[str, str, int]
    update: str
    risks: Mapping[str, float]
    lost: float
    passed: Mapping[float, bool]


def joined(
    measured: Sequence["Measured"],
    results: Mapping["Adapter", Mapping[str, str]],
    excluded: Mapping[str, Sequence[int]],
) -> list[Row]:
    """Return the measured adapters. The loss excludes the items that were answered.

    `results` has the marks of each adapter's items on each base.
    """
    rows = []
    for line in measured:
        if line.arm == BARE:
            continue
        right = results[line.adapter]
        old, new = (_without(right[base], excluded[line.task]) for base in (OLD, line.update))
        lost_items = sum(a == "1" and b == "0" for a, b in zip(old, new, strict=True))
        gained = sum(a == "0" and b == "1" for a, b in zip(old, new, strict=True))
        bound = 100 * lower_bound(len(old), lost_items, gained, _ALPHA)
        rows.append(
            Row(
                recipe=(line.task, line.arm, line.steps),
                update=line.update,
                risks={"disagreement": 1 - line.equal / line.prompts, "KL": line.kl, **line.risks},
                lost=100 * (lost_items - gained) / len(old),
                passed={margin: bound > -margin for margin in MARGINS},
            )
        )
    return rows


def rank_correlation(rows: Sequence[Row], counts: np.ndarray, risk: str) -> np.ndarray:
    """Return Spearman's coefficient of a risk with the loss; NaN if either is constant.

    `counts` (draws, rows) is how often each row is drawn. Returns one coefficient per draw.
    """
    values, lost = [row.risks[risk] for row in rows], [row.lost for row in rows]
    a, b = (counts @ _below(measure).T for measure in (values, lost))  # mid-ranks, less a half
    drawn = counts.sum(axis=1)

    def covariance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the covariance times drawn². Its terms are multiples of 1/4, so it is exactly 0
        where x or y is constant.
        """
        sums = [(counts * product).sum(axis=1) for product in (x * y, x, y)]
        return drawn * sums[0] - sums[1] * sums[2]

    with np.errstate(invalid="ignore"):
        return covariance(a, b) / np.sqrt(covariance(a, a) * covariance(b, b))


def area(rows: Sequence[Row], counts: np.ndarray, risk: str, margin: float) -> np.ndarray:
    """Return the probability that a failing adapter has the larger risk; NaN without both kinds.

    A tie counts half. `counts` as in `rank_correlation`.
    """
    fails = np.array([not row.passed[margin] for row in rows])
    failed, passed = counts * fails, counts * ~fails
    above = _below([row.risks[risk] for row in rows])
    pairs = failed.sum(axis=1) * passed.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return ((failed @ above) * passed).sum(axis=1) / pairs


def _below(values: Sequence[float]) -> np.ndarray:
    """Return (n, n): 1 where the column's value is below the row's, a half where they are equal."""
    column = np.array(values)
    row = column[:, None]
    return (column < row) + (column == row) / 2


def page_with(
    page: str,
    results: Mapping["Adapter", Mapping[str, str]],
    measured: Sequence["Measured"],
    excluded: Mapping[str, Sequence[int]],
) -> str:
    """Return the page with its blocks replaced, in the format that mdformat keeps unchanged."""
    rows = joined(measured, results, excluded)
    blocks = {
        "shifts": _shifts(measured, rows),
        "label-free": _predictors(rows, ("disagreement", "KL")),
        "triage": _predictors(rows, NAMES),
    }
    return with_blocks(page, blocks)


def _shifts(measured: Sequence["Measured"], rows: Sequence[Row]) -> str:
    lines = [
        "| update | task | bare base: equal answers, KL | adapters | equal answers | KL | "
        "points lost |",
        "| -- | -- | -- | -: | -- | -- | -- |",
    ]
    for update in UPDATES:
        for bare in measured:
            if bare.arm != BARE or bare.update != update:
                continue
            here = [r for r in rows if r.update == update and r.recipe[0] == bare.task]
            if here:
                lines.append(
                    f"| `{update}` | {bare.task} | {100 * bare.equal / bare.prompts:.0f} %, "
                    f"{bare.kl:.2f} | {len(here)} | "
                    f"{_range([100 * (1 - r.risks['disagreement']) for r in here], '.0f')} % | "
                    f"{_range([r.risks['KL'] for r in here], '.2f')} | "
                    f"{_range([r.lost for r in here], '.1f')} |"
                )
    return "\n".join(lines)


def _predictors(rows: Sequence[Row], risks: Sequence[str]) -> str:
    heads = [f"AUC for passing, margin {margin:g} (passed)" for margin in MARGINS]
    lines = [
        f"| update | adapters | predictor | rank correlation with the loss | {' | '.join(heads)} |",
        "| -- | -: | -- | -: |" + " -: |" * len(MARGINS),
    ]
    for update in (*UPDATES, _BOTH):
        here = [row for row in rows if update in (_BOTH, row.update)]
        for risk in risks:
            cells = [_with_interval(here, partial(rank_correlation, risk=risk))]
            for margin in MARGINS:
                passed = sum(row.passed[margin] for row in here)
                found = _with_interval(here, partial(area, risk=risk, margin=margin))
                cells.append(f"{found} ({passed} of {len(here)})")
            name = f"`{update}`" if update != _BOTH else "both"
            lines.append(f"| {name} | {len(here)} | {risk} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(
    rows: Sequence[Row], statistic: Callable[[Sequence[Row], np.ndarray], np.ndarray]
) -> str:
    """Return a statistic with its interval over resampled recipes, or a dash if it is undefined."""
    (value,) = statistic(rows, np.ones((1, len(rows))))
    if np.isnan(value):
        return "-"
    recipes = sorted({row.recipe for row in rows})
    drawn = np.random.default_rng(0).integers(len(recipes), size=(_DRAWS, len(recipes)))
    of_recipe = np.stack([(drawn == i).sum(axis=1) for i in range(len(recipes))], axis=1)
    values = statistic(rows, of_recipe[:, [recipes.index(row.recipe) for row in rows]])
    tail = (1 - _LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return (
        f"{value:+.2f} ({low:+.2f}, {high:+.2f})"
        if value < 0 or low < 0
        else (f"{value:.2f} ({low:.2f}, {high:.2f})")
    )


def _without(right: str, positions: Sequence[int]) -> str:
    left_out = set(positions)
    return "".join(mark for i, mark in enumerate(right) if i not in left_out)


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"
