"""Plot the scores of each adapter on v1 and v2."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from demo.results import Result
from demo.settings import POLICY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_LEVEL = 100 * (1 - POLICY.per_strategy.alpha)
_PLAIN, _OURS, _GREY, _INK = "#E07A1F", "#1F6FB2", "#8A8F98", "#22262B"


def draw(found: Sequence[Result], path: Path) -> Path:
    """Write a PNG: scores of each task with 95 % intervals, and differences with the margin."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(result.task for result in found))
    style = {"font.size": 11, "axes.edgecolor": _GREY, "text.color": _INK, "xtick.color": _INK}
    with plt.rc_context({**style, "ytick.color": _INK, "axes.labelcolor": _INK}):
        figure, axes = plt.subplots(
            len(tasks), 2, figsize=(11, 4.2 * len(tasks)), squeeze=False, layout="constrained"
        )
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        for (left, right), task in zip(axes, tasks, strict=True):
            arms = [result for result in found if result.task == task]
            _scores(left, arms)
            _differences(right, arms)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return path


def _scores(axes: "Axes", arms: Sequence[Result]) -> None:
    columns = [
        [arm.figures.versus_old_base.reference_score for arm in arms],
        [arm.direct for arm in arms],
        [arm.figures.score for arm in arms],
    ]
    for arm, offset, *scores in zip(arms, (-0.03, 0.03), *columns, strict=False):
        errors = [_wilson(score, arm.figures.items) for score in scores]
        below_above = list(zip(*errors, strict=True))
        axes.errorbar(
            [offset, 1 + offset, 2 + offset],
            scores,
            yerr=below_above,
            color=_color(arm),
            marker="o",
            markersize=7,
            linewidth=2,
            elinewidth=1.2,
            capsize=4,
            label=arm.method,
        )
    for x, scores in enumerate(columns):
        for arm, score, y in zip(arms, scores, _apart(scores), strict=True):
            # The middle labels would cover the lines, so they are placed below them.
            axes.annotate(
                f"{score:.1f}",
                (x, y if x != 1 else y - max(scores) + min(scores) - 12),
                xytext=((-16, 0, 16)[x], 0),
                textcoords="offset points",
                ha=("right", "center", "left")[x],
                va="center",
                color=_color(arm),
                fontweight="bold",
            )
    bare_v2 = arms[0].figures.versus_bare_base
    if bare_v2 is not None:
        axes.plot(
            [1, 2], 2 * [bare_v2.reference_score],
            color=_GREY, linestyle="--", marker="o", markersize=4, label="bare base v2",
        )  # fmt: skip
    axes.set_xticks(
        range(3),
        ["base v1\n(trained here)", "base v2\n(same adapter bytes)", "base v2\n(as registered)"],
    )
    axes.set_xlim(-0.45, 2.45)
    axes.set_ylim(0, 100)
    axes.set_ylabel("right answers, %")
    axes.set_title(f"{arms[0].task}: {arms[0].figures.items} items, 95 % intervals", loc="left")
    _clean(axes)
    axes.grid(axis="y", color="#E6E8EB", linewidth=0.8)
    axes.legend(frameon=False, loc="upper right", fontsize=10)


def _differences(axes: "Axes", arms: Sequence[Result]) -> None:
    margin = POLICY.margin_points
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.axvline(-margin, color="#B3261E", linewidth=1.2, linestyle="--")
    for y, arm in enumerate(reversed(arms)):
        change = arm.figures.versus_old_base
        axes.plot([change.lower, change.upper], [y, y], color=_color(arm), linewidth=3)
        axes.plot(change.difference, y, "o", color=_color(arm), markersize=9)
        axes.annotate(
            f"{arm.method}: {arm.verdict}",
            (0.02, y),  # at the left edge, because long labels would exceed the right one
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 14),
            textcoords="offset points",
            ha="left",
            color=_color(arm),
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )
    changes = [arm.figures.versus_old_base for arm in arms]
    reach = max(margin, *(max(-change.lower, change.upper) for change in changes)) * 1.45
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-0.7, len(arms) - 0.2)
    axes.set_yticks([])
    axes.set_xlabel(f"registered for v2 minus v1, points (one-sided {_LEVEL:g} % bounds)")
    axes.annotate(
        f"margin -{margin:g}",
        (-margin, -0.62),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        color="#B3261E",
        fontsize=10,
    )
    axes.set_title("change from v1 to v2 as registered, paired", loc="left")
    _clean(axes)
    axes.spines["left"].set_visible(False)


def _apart(scores: Sequence[float], least: float = 5.0) -> list[float]:
    """Return heights for the labels of scores: in the same order, at least `least` points apart."""
    heights = list(scores)
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    for below, above in pairwise(order):
        missing = least - (heights[above] - heights[below])
        if missing > 0:
            heights[below] -= missing / 2
            heights[above] += missing / 2
    return heights


def _clean(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _color(arm: Result) -> str:
    return _PLAIN if arm.method == "plain LoRA" else _OURS


def _wilson(score: float, items: int) -> tuple[float, float]:
    """Return the lengths of a score's 95 % interval (Wilson) below and above it, in points."""
    from scipy.stats import binomtest

    right = round(score * items / 100)
    interval = binomtest(right, items).proportion_ci(0.95, method="wilson")
    return score - 100 * interval.low, 100 * interval.high - score
