"""Plot the scores of every arm on the old and the new base, for each task and update."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from study.plan import STEPS, V1
from study.report import NEW, TITLES, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_GREY, _INK = "#8A8F98", "#22262B"
_COLORS = {"plain": "#E07A1F", "uniform": "#8E5BB5", "spared": "#1F6FB2"}


def draw(comparisons: Sequence[Comparison], path: Path) -> Path:
    """Write a PNG with one panel per comparison.

    A large point is the mean over seeds, a small one a single seed. A line joins the lengths of
    training. On the diagonal nothing is lost. At equal old scores, higher is better.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(comparisons))
    rows = -(-len(comparisons) // columns)
    style = {"font.size": 11, "axes.edgecolor": _GREY, "text.color": _INK, "xtick.color": _INK}
    with plt.rc_context({**style, "ytick.color": _INK, "axes.labelcolor": _INK}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(5.6 * columns, 5.2 * rows), squeeze=False, layout="constrained"
        )
        for panel in list(axes.flat)[len(comparisons) :]:
            panel.set_visible(False)
        for panel, comparison in zip(axes.flat, comparisons, strict=False):
            _panel(panel, comparison)
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)
    return path


def _panel(axes: "Axes", comparison: Comparison) -> None:
    shown = []
    for arm, color in _COLORS.items():
        points = []
        for steps in STEPS:
            old, new = (comparison.arms.get((arm, steps, b)) for b in (V1, comparison.update))
            if old is None or new is None:
                continue
            by_seed = 100 * old.mean(axis=1), 100 * new.mean(axis=1)
            axes.plot(*by_seed, "o", color=color, markersize=4, alpha=0.35, markeredgewidth=0)
            points.append((by_seed[0].mean(), by_seed[1].mean(), steps))
            shown += [*by_seed[0], *by_seed[1]]
        if points:
            x, y, lengths = zip(*points, strict=True)
            axes.plot(x, y, "-o", color=color, linewidth=2, markersize=8, label=TITLES[arm])
            for at in zip(x, y, lengths, strict=True):
                axes.annotate(
                    f"{at[2]} steps", at[:2], xytext=(8, -12), textcoords="offset points",
                    color=color, fontsize=9,
                )  # fmt: skip
    tuned = comparison.mean(NEW, STEPS[0], comparison.update)
    if tuned is not None:
        label = f"Fine-tune(new), {STEPS[0]} steps"
        axes.axhline(tuned, color=_GREY, linewidth=1.4, linestyle="--", label=label)
        shown.append(tuned)
    low, high = min(shown) - 4, max(shown) + 4
    axes.plot([low, high], [low, high], color="#D5D8DD", linewidth=1, zorder=0)
    axes.annotate(
        "nothing lost", (high - 1, high - 1), ha="right", va="top", rotation=45, fontsize=9,
        color=_GREY, rotation_mode="anchor", xytext=(-2, 4), textcoords="offset points",
    )  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("right on the old base, %")
    axes.set_ylabel("right on the new base, %")
    axes.set_title(f"{comparison.task}, update {comparison.update}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=9)
