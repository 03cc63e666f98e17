"""The report of an analysis: tables, Markdown, JSON and one self-contained HTML page."""

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path

from trans_peft.analysis.distances import Interval
from trans_peft.analysis.figures import Figures, draw_figures
from trans_peft.analysis.updates import Analysis, UpdateAnalysis
from trans_peft.files import atomic_write

__all__ = ["Table", "analysis_json", "tables", "write_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22262b; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.35rem; margin-top: 3rem; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e2e5e9;
  white-space: nowrap; }
th { border-bottom: 2px solid #8a8f98; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption, .note { color: #555b64; }
"""


@dataclass(frozen=True)
class Table:
    """A table of a report. `note` explains its columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def tables(analysis: Analysis) -> tuple[Table, ...]:
    """Return tables of all updates, then of the layers of each: weights, activations, influence."""
    layers = (_of_layers(analysis, update) for update in analysis.updates)
    return (*_of_updates(analysis), *chain.from_iterable(layers))


def _of_updates(analysis: Analysis) -> tuple[Table, ...]:
    return (_ranking(analysis), *([_summary(analysis)] if analysis.texts else ()))


def _of_layers(analysis: Analysis, update: UpdateAnalysis) -> tuple[Table, ...]:
    found = [_weights(analysis, update)]
    if analysis.texts:
        found += [_distances(analysis, update), _influences(analysis, update)]
    return tuple(found)


def analysis_json(analysis: Analysis) -> str:
    """Return all figures of an analysis as JSON. What does not exist is null."""
    from pydantic_core import to_json

    return to_json(analysis, indent=2, inf_nan_mode="null").decode() + "\n"


def write_report(analysis: Analysis, folder: Path) -> tuple[Path, ...]:
    """Write `analysis.json`, `analysis.md`, `index.html` and the figures; return the three files.

    The HTML page contains its figures. Existing files of these names are replaced.
    """
    figures = draw_figures(analysis, folder / "figures")
    contents = {
        "analysis.json": analysis_json(analysis),
        "analysis.md": _markdown(analysis, figures),
        "index.html": _html(analysis, figures),
    }
    for name, text in contents.items():
        atomic_write(folder / name, text.encode())
    return tuple(folder / name for name in contents)


def _ranking(analysis: Analysis) -> Table:
    perturbation = analysis.settings.perturbation
    return Table(
        f"Updates of {analysis.old} in the order of theorem 1",
        ("update", "FFN shift", "FFN", "attention", "other weights"),
        tuple(
            (
                update.name,
                f"{update.terms.ffn_shift:.4g}",
                *map(_percent, (update.drift.ffn, update.drift.attention, update.drift.other)),
            )
            for update in analysis.updates
        ),
        "The smallest FFN shift |new - old| comes first. Other columns: |new - old| / |old|. The "
        f"regularizer of {analysis.old} for p_m = {perturbation.masking_p:g} and p_d = "
        f"{perturbation.dropping_p:g} is {analysis.updates[0].terms.regularizer:.4g}, whatever the "
        "update.",
    )


def _summary(analysis: Analysis) -> Table:
    found = [(update.name, update.distances) for update in analysis.updates if update.distances]
    return Table(
        "Change of activations",
        ("update", "FFN", "attention", "FFN - attention"),
        tuple(
            (name, *map(_shown, (of.ffn_mean, of.attention_mean, of.difference)))
            for name, of in found
        ),
        f"Mean relative Fréchet distance of the layers on {analysis.texts} texts "
        f"({analysis.tokens:,} tokens), with 95 % intervals.",
    )


def _weights(analysis: Analysis, update: UpdateAnalysis) -> Table:
    drift = update.drift
    columns = drift.ffn_shift_by_layer, drift.ffn_by_layer, drift.attention_by_layer
    return Table(
        f"Weights by layer: {analysis.old} to {update.name}",
        ("layer", "FFN shift", "FFN", "attention"),
        tuple(
            (str(layer), f"{shift:.4g}", _percent(ffn), _percent(attention))
            for layer, (shift, ffn, attention) in enumerate(zip(*columns, strict=True))
        ),
        "FFN shift: |new - old|. Other columns: |new - old| / |old|.",
    )


def _distances(analysis: Analysis, update: UpdateAnalysis) -> Table:
    assert update.distances is not None
    columns = update.distances.ffn, update.distances.attention
    return Table(
        f"Activations by layer: {analysis.old} to {update.name}",
        ("layer", "FFN", "attention"),
        tuple(
            (str(layer), *map(_shown, both))
            for layer, both in enumerate(zip(*columns, strict=True))
        ),
        "Relative Fréchet distance, with 95 % intervals.",
    )


def _influences(analysis: Analysis, update: UpdateAnalysis) -> Table:
    assert analysis.measured is not None and update.measured is not None
    columns = analysis.measured.influence, update.measured.influence
    return Table(
        f"Influence of FFNs by layer: {analysis.old} and {update.name}",
        ("layer", analysis.old, update.name, "opposite"),
        tuple(
            (str(layer), *map(_shown, both), "yes" if _opposite(*both) else "")
            for layer, both in enumerate(zip(*columns, strict=True))
        ),
        "(|h| - |h'|) / |h'|, where h is the hidden state after the layer and h' the one without "
        "its FFN. Opposite: the signs differ, and both intervals exclude 0.",
    )


def _opposite(old: Interval | None, new: Interval | None) -> bool:
    if old is None or new is None:
        return False
    return (old.high < 0 < new.low) or (new.high < 0 < old.low)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.2%}"


def _shown(interval: Interval | None) -> str:
    return "-" if interval is None else str(interval)


def _title(analysis: Analysis) -> str:
    return f"{analysis.old} and its updates {', '.join(u.name for u in analysis.updates)}"


def _markdown(analysis: Analysis, figures: Figures) -> str:
    def shown(found: Table) -> str:
        lines = [found.header, ("-",) * len(found.header), *found.rows]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        return f"### {found.title}\n\n{table}\n\n{found.note}"

    parts = [f"# {_title(analysis)}", *map(shown, _of_updates(analysis))]
    for update in analysis.updates:
        drawn = figures[update.name].items()
        parts.append(f"## {analysis.old} to {update.name}")
        parts += [f"![{caption}](figures/{path.name})" for caption, path in drawn]
        parts += map(shown, _of_layers(analysis, update))
    # Names of bases are names of folders. Nothing here is meant as HTML.
    return ("\n\n".join(parts) + "\n").replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _html(analysis: Analysis, figures: Figures) -> str:
    def shown(found: Table) -> str:
        rows = "\n".join(_row("td", row) for row in found.rows)
        return (
            f'<h3>{escape(found.title)}</h3>\n<div class="scroll"><table>'
            f"<thead>{_row('th', found.header)}</thead>\n<tbody>{rows}</tbody></table></div>\n"
            f'<p class="note">{escape(found.note)}</p>'
        )

    def image(caption: str, path: Path) -> str:
        data = b64encode(path.read_bytes()).decode()
        return (
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    title = escape(_title(analysis))
    body = [f"<h1>{title}</h1>", *map(shown, _of_updates(analysis))]
    for update in analysis.updates:
        body.append(f"<h2>{escape(analysis.old)} to {escape(update.name)}</h2>")
        body += [image(caption, path) for caption, path in figures[update.name].items()]
        body += map(shown, _of_layers(analysis, update))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
