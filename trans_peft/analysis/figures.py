"""Figures of an analysis, as in the paper: heat maps (fig. 1, 2, 8, 9) and influence (fig. 3)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trans_peft.analysis.distances import Interval
from trans_peft.analysis.updates import Analysis, Measured, UpdateAnalysis
from trans_peft.extras import explaining_missing_extras

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Figures", "draw_figures"]

Draw = Callable[["Figure"], None]

Figures = Mapping[str, Mapping[str, Path]]
"""Name of the update -> caption -> file."""

_ATTENTION, _FFN, _OLD, _NEW = "#1F6FB2", "#E07A1F", "#8A8F98", "#8E5BB5"
_INK, _AXIS, _MARK = "#22262B", "#8A8F98", "#C1121F"
_HIGH, _HIGHEST = 99.5, 1.3


def draw_figures(analysis: Analysis, folder: Path, mark: str = "") -> Figures:
    """Write PNG files into a folder; return them by update and caption, in the order of a report.

    Each update has a figure of its layers. With texts, it also has heat maps and influences. A text
    `mark` is written across each figure. Raises ModuleNotFoundError without matplotlib (extra
    `figures`).
    """
    return {
        update.name: {
            caption: _saved(folder / f"update-{number}-{name}.png", draw, mark)
            for name, caption, draw in _drawings(analysis, update)
        }
        for number, update in enumerate(analysis.updates, start=1)
    }


def _drawings(analysis: Analysis, update: UpdateAnalysis) -> Iterator[tuple[str, str, Draw]]:
    """Yield (name of the file, caption, function that draws) of each figure of an update."""
    yield "layers", "Change of attention and FFN in each layer", partial(_layers, update=update)
    if analysis.measured is None or update.measured is None:
        return
    sides = {_text(analysis.old): analysis.measured, _text(update.name): update.measured}
    for kind, name in (("attention", "attention"), ("ffn", "the FFNs")):
        if any(row is not None for row in getattr(update.measured, kind)):
            caption = f"Where the activations of {name} are large"
            yield kind, caption, partial(_heat_maps, sides=sides, kind=kind)
    caption = "Influence of each FFN on the magnitude of activations"
    yield "influence", caption, partial(_influences, sides=sides)


def _text(name: str) -> str:
    """Return a name that matplotlib shows as it is: `$` begins a formula, `_` a hidden label."""
    return f"{' ' if name.startswith('_') else ''}{name}".replace("$", r"\$")


def _saved(path: Path, draw: Draw, mark: str) -> Path:
    with explaining_missing_extras():
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    style = {
        "font.size": 11, "axes.edgecolor": _AXIS, "text.color": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.labelcolor": _INK, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.15))
        draw(figure)
        if mark:
            figure.text(
                0.5, 0.5, mark, fontsize=48, color=_MARK, alpha=0.45, rotation=15,
                ha="center", va="center",
            )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def _layers(figure: "Figure", update: UpdateAnalysis) -> None:
    distances = update.distances
    panels = figure.subplots(1, 1 if distances is None else 2, squeeze=False)[0]
    drift = update.drift
    series = (
        ("attention", _ATTENTION, [100 * value for value in drift.attention_by_layer]),
        ("FFN", _FFN, [100 * value for value in drift.ffn_by_layer]),
    )
    for name, color, values in series:
        panels[0].plot(values, "-o", color=color, label=name, markersize=5)
    panels[0].set_title("weights", loc="left")
    panels[0].set_ylabel("relative change, %")
    if distances is not None:
        _points(panels[1], distances.attention, _ATTENTION, "attention", -0.08)
        _points(panels[1], distances.ffn, _FFN, "FFN", 0.08)
        panels[1].set_title("activations, with 95 % intervals", loc="left")
        panels[1].set_ylabel("relative Fréchet distance")
    for panel in panels:
        panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
        _layer_axis(panel, len(drift.ffn_by_layer))
        panel.legend()


def _heat_maps(figure: "Figure", sides: dict[str, Measured], kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = [_matrix(getattr(side, kind)) for side in sides.values()]
    panels = figure.subplots(1, 3, sharey=True)
    high = max(_HIGHEST, float(np.nanpercentile(np.stack(rows), _HIGH)))
    change = rows[1] - rows[0]
    span = max(1e-6, float(np.nanpercentile(np.abs(change), _HIGH)))
    options: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    for panel, name, values in zip(panels, sides, rows, strict=False):
        shown = panel.imshow(values, cmap="Blues", vmin=0, vmax=high, **options)
        panel.set_title(name, loc="left")
    figure.colorbar(shown, ax=panels[:2], label="RMS relative to the layer's", extend="max")
    moved = panels[2].imshow(change, cmap="RdBu_r", vmin=-span, vmax=span, **options)
    panels[2].set_title("difference", loc="left")
    figure.colorbar(moved, ax=panels[2], extend="both")
    for panel in panels:
        panel.set_xlabel("group of neurons")
        panel.spines[:].set_visible(False)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[0].set_ylabel("layer")


def _influences(figure: "Figure", sides: dict[str, Measured]) -> None:
    panel = figure.subplots()
    for (name, side), color, at in zip(sides.items(), (_OLD, _NEW), (-0.19, 0.19), strict=True):
        layers = [layer for layer, found in enumerate(side.influence) if found is not None]
        found = [interval for interval in side.influence if interval is not None]
        panel.bar(
            [layer + at for layer in layers],
            [interval.value for interval in found],
            0.38,
            yerr=_errors(found),
            color=color,
            label=name,
            error_kw={"elinewidth": 1, "ecolor": _INK},
        )
    panel.axhline(0, color=_AXIS, linewidth=1)
    panel.set_ylabel("(|h| - |h'|) / |h'|")
    _layer_axis(panel, len(next(iter(sides.values())).influence))
    panel.legend()


def _points(
    axes: "Axes", found: Sequence[Interval | None], color: str, name: str, offset: float
) -> None:
    layers = [layer + offset for layer, interval in enumerate(found) if interval is not None]
    shown = [interval for interval in found if interval is not None]
    axes.errorbar(
        layers, [i.value for i in shown], yerr=_errors(shown), fmt="-o", color=color, label=name,
        markersize=5, elinewidth=1.2, capsize=2,
    )  # fmt: skip


def _errors(found: Sequence[Interval]) -> np.ndarray:
    """Return the lengths of error bars (2, layers): a bootstrap interval may leave out its
    estimate."""
    bars = [(i.value - i.low, i.high - i.value) for i in found]
    return np.clip(np.array(bars).reshape(-1, 2).T, 0, None)


def _layer_axis(axes: "Axes", layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _matrix(rows: Sequence[Sequence[float] | None]) -> np.ndarray:
    width = max(len(row) for row in rows if row is not None)
    columns = np.arange(width)
    # A layer with fewer groups has wider ones; a layer without the sub-layer stays empty.
    return np.array(
        [
            np.full(width, np.nan) if row is None else np.take(row, columns * len(row) // width)
            for row in rows
        ]
    )
