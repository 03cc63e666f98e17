"""The figures of the paper as SVG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trans_peft.domain.experiment import OLD, PLAIN, Sweep
from trans_peft.experiment.comparison import Comparison, Line, Run, Scores
from trans_peft.experiment.statistics import Interval, resampled
from trans_peft.experiment.tables import hours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bases_figure", "hours_figure", "sweep_figure", "transfer_figure"]

_GREY, _INK, _PALE = "#8A8F98", "#22262B", "#D5D8DD"
_TUNED, _DIRECT = "#3B3F46", "#E07A1F"
_ARMS = ("#1F6FB2", "#8E5BB5", "#2A9D6F", "#B23A6F", "#8C6D1F", "#17A2B8", "#6B8E23", "#C44E9D")
_BASES = (_GREY, *_ARMS)
_MARKERS = "osD^vP*X<>"
_MARK = "#C1121F"
_LETTERS = 45  # that fit side by side below the axis


def transfer_figure(scores: Scores, new: str, path: Path, mark: str = "") -> Path | None:
    """Plot the mean score on the new base against that on the old one, for all methods and arms.

    A small point is one seed. A line joins the lengths of training, and a longer one has its number
    of steps. On the diagonal nothing is lost. A dashed line with the marker of a method is its
    Fine-tune(new).
    """
    shown: list[float] = []

    def panel(axes: "Axes") -> None:
        for method, marker in zip(scores.experiment.methods, _MARKERS * 9, strict=False):
            found = Comparison(scores, method, new)
            arms = {"Direct Transfer": PLAIN, **scores.experiment.arms}
            for (name, arm), color in zip(arms.items(), (_DIRECT, *_ARMS * 9), strict=False):
                means = []
                for steps in scores.lengths:
                    on_old, on_new = found.carried(arm, OLD, steps), found.carried(arm, None, steps)
                    for run in scores.seeds:
                        x, y = scores.average(on_old, [run]), scores.average(on_new, [run])
                        if x is not None and y is not None:
                            axes.plot(x, y, marker, color=color, markersize=4, alpha=0.4)
                            shown.extend((x, y))
                    x, y = scores.average(on_old), scores.average(on_new)
                    if x is not None and y is not None:
                        means.append((x, y))
                        shown.extend((x, y))
                        if steps is not None:
                            axes.annotate(f"  {steps} steps", (x, y), color=color, fontsize=8)
                if means:
                    x_y = zip(*means, strict=True)
                    axes.plot(
                        *x_y, f"{marker}-", color=color, markersize=9, label=f"{method}, {name}"
                    )
            tuned = scores.average(found.tuned_new)
            if tuned is not None:
                shown.append(tuned)
                axes.axhline(
                    tuned, color=_TUNED, linewidth=1, linestyle="--", marker=marker, markersize=5,
                    label=f"{method}, Fine-tune(new)",
                )  # fmt: skip
        if not shown:
            return
        low, high = min(shown) - 4, max(shown) + 4
        axes.plot([low, high], [low, high], color=_PALE, linewidth=1, zorder=0)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set(xlabel=f"right on {OLD}, %", ylabel=f"right on {new}, %")
        _legend(axes)

    suites = len(scores.suites)
    of = f" (mean of {suites} suites)" if suites > 1 else ""
    title = f"{scores.family}: scores on both bases, {new}{of}"
    _draw(path, title, panel, mark, size=(8.2, 5.0))
    return path if shown else None


def bases_figure(scores: Scores, path: Path, mark: str = "") -> Path:
    """Plot fig. 5: a group of bars for each new base of one old base."""
    labels = list(scores.experiment.families[scores.family].new)
    method = next(iter(scores.experiment.methods))
    of = [Comparison(scores, method, label) for label in labels]
    bars = [("Fine-tune(new)", [one.tuned_new for one in of], _TUNED)]
    bars += [("Fine-tune(old)", [one.tuned_old for one in of], _GREY)]
    bars += [("Direct Transfer", [one.direct for one in of], _DIRECT)]
    bars += [
        (name, [one.carried(arm) for one in of], color)
        for (name, arm), color in zip(scores.experiment.arms.items(), _ARMS * 9, strict=False)
    ]
    title = f"{scores.family}, {method}: one old base, {len(labels)} new ones"
    return _draw(path, title, lambda axes: _groups(axes, scores, labels, bars), mark)


def sweep_figure(scores: Scores, sweep: Sweep, path: Path, mark: str = "") -> Path:
    """Plot fig. 6 as lines over the values of a rate, or fig. 10 as bars for each sub-layer."""
    labels = scores.experiment.families[scores.family].labels
    values = list(sweep.perturbations)
    if sweep.field != "where":
        values.sort(key=float)
    colors = dict(zip(labels, _BASES * 9, strict=False))

    def line(value: Any, label: str) -> Line:
        return Line(sweep.method, sweep.perturbations[value], OLD, label)

    def panel(axes: "Axes") -> None:
        if sweep.field == "where":
            bars = [(f"on {name}", [line(v, name) for v in values], colors[name]) for name in labels]  # noqa: E501  # fmt: skip
            _groups(axes, scores, [str(value) for value in values], bars, scores.seeds[:1])
            return
        for number, label in enumerate(labels):
            found = [_interval(scores, line(value, label), scores.seeds[:1]) for value in values]
            known = [(x, one) for x, one in enumerate(found) if one is not None]
            if known:
                x, y = zip(*known, strict=True)
                shift = 0.06 * (number - (len(labels) - 1) / 2)  # error bars lie side by side
                axes.errorbar(
                    np.array(x) + shift, [one.value for one in y], yerr=_errors(y), fmt="-o",
                    color=colors[label], capsize=3, label=f"on {label}",
                )  # fmt: skip
        axes.set(xlabel={"masking_p": "$p_m$", "dropping_p": "$p_d$"}[sweep.field])
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(ylabel="right, % (mean of suites)")
        _legend(axes)

    return _draw(path, f"{scores.family}, {sweep.method}: {sweep.field}", panel, mark)


def hours_figure(scores: Scores, path: Path, mark: str = "") -> Path | None:
    """Plot fig. 7: GPU hours of an adapter, tuned once or again for each update."""
    found = {name: hours(scores, name) for name in scores.experiment.methods}
    known = {name: one for name, one in found.items() if one is not None}
    if not known:
        return None

    def panel(axes: "Axes") -> None:
        at = np.arange(len(known))
        once = [one.once for one in known.values()]
        plain = [one.plain for one in known.values()]
        again = [one.again for one in known.values()]
        axes.bar(at - 0.2, once, 0.38, color=_ARMS[0], label="Trans-PEFT, tuned once")
        axes.bar(at + 0.2, plain, 0.38, color=_GREY, label="plain, on the old base")
        axes.bar(at + 0.2, again, 0.38, bottom=plain, color=_DIRECT, label="plain, on each new base")  # noqa: E501  # fmt: skip
        _name_groups(axes, list(known))
        axes.set(ylabel="GPU hours of an adapter")
        _legend(axes)

    return _draw(path, f"{scores.family}: GPU hours, measured", panel, mark)


def _groups(
    axes: "Axes",
    scores: Scores,
    groups: Sequence[str],
    bars: Sequence[tuple[str, Sequence[Line], str]],
    runs: Sequence[Run] | None = None,
) -> None:
    """Draw grouped bars of mean scores with intervals; a missing score has no bar."""
    width = 0.8 / len(bars)
    for number, (title, lines, color) in enumerate(bars):
        for group, line in enumerate(lines):
            found = _interval(scores, line, scores.seeds if runs is None else runs)
            if found is not None:
                axes.bar(
                    group + (number - (len(bars) - 1) / 2) * width, found.value, width * 0.92,
                    yerr=_errors([found]), color=color, capsize=2, ecolor=_INK,
                    error_kw={"linewidth": 1}, label=title if group == 0 else None,
                )  # fmt: skip
    _name_groups(axes, groups)
    axes.set(ylabel="right, % (mean of suites)")
    _legend(axes)


def _name_groups(axes: "Axes", names: Sequence[str]) -> None:
    """Write a name below each group of bars; slanted if they would overlap."""
    slanted: dict[str, Any] = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(
        range(len(names)), names, **(slanted if sum(map(len, names)) > _LETTERS else {})
    )


def _legend(axes: "Axes") -> None:
    """Add a legend beside the panel, if something was drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def _interval(scores: Scores, line: Line, runs: Sequence[Run]) -> Interval | None:
    found = scores.results(line, scores.suites, runs)
    return None if found is None else Interval.of(resampled(found))


def _errors(found: Sequence[Interval]) -> np.ndarray:
    """Return the lengths of error bars (2, values)."""
    pairs = [(max(0.0, one.value - one.low), max(0.0, one.high - one.value)) for one in found]
    return np.array(pairs).T


def _draw(
    path: Path,
    title: str,
    panel: Callable[["Axes"], None],
    mark: str,
    *,
    size: tuple[float, float] = (7.2, 4.2),
) -> Path:
    """Write an SVG file with one panel. A text `mark` is written across it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    style = {
        "font.size": 11, "axes.edgecolor": _GREY, "text.color": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.labelcolor": _INK, "svg.hashsalt": "trans-peft",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        panel(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        if mark:
            figure.text(
                0.45, 0.5, mark, fontsize=38, color=_MARK, alpha=0.45, rotation=20,
                ha="center", va="center",
            )  # fmt: skip
        figure.savefig(path, facecolor="white", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return path
