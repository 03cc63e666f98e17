"""The tables of the paper in Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from trans_peft.domain.experiment import OLD, PLAIN, Cost, Experiment, rates_text
from trans_peft.domain.recipe import Perturbation
from trans_peft.experiment.cells import HELD_OUT, Score
from trans_peft.experiment.comparison import Comparison, Line, Scores
from trans_peft.experiment.statistics import Interval

__all__ = [
    "Hours",
    "change_table",
    "equal_score_table",
    "hours",
    "hours_table",
    "literal",
    "main_table",
    "p_value_table",
    "seed_table",
    "selection_table",
    "sweep_table",
    "table",
]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """Return a Markdown table. The first `texts` columns are text, the others numbers."""
    marks = ["--" if number < texts else "-:" for number in range(len(columns))]
    lines = [columns, marks, *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def literal(text: str) -> str:
    """Return a text of a user, such as a path or a pattern, as Markdown that shows it as it is.

    >>> literal(".*_(q|v)_proj")
    '`.*_(q|v)_proj`'
    """
    return f"`{' '.join(text.split()).replace('`', chr(39))}`" if text.strip() else ""


def main_table(scores: Scores, new: str) -> str:
    """Return table 1 or 2: all methods and arms of a family on one new base, in percent."""
    columns = ["method", "", *scores.suites, "average"]
    rows = [
        ["bare base", f"on {label}"]
        + [_points(scores.bare_points(label, suite)) for suite in scores.suites]
        + [_points(scores.bare_average(label))]
        for label in (OLD, new)
    ]
    for method in scores.experiment.methods:
        for title, line in _lines(Comparison(scores, method, new)):
            points = [_points(scores.points(line, suite)) for suite in scores.suites]
            rows.append([method, title, *points, _points(scores.average(line))])
    return table(columns, rows, texts=2)


def _lines(found: Comparison) -> Iterator[tuple[str, Line]]:
    """Yield the title and the line of each row of a method."""
    yield "Fine-tune(new)", found.tuned_new
    yield "Fine-tune(old)", found.tuned_old
    yield "Direct Transfer", found.direct
    for name, arm in found.scores.experiment.arms.items():
        yield name, found.carried(arm)
        yield f"{name} on {OLD}", found.carried(arm, OLD)


def change_table(scores: Scores, new: str) -> str:
    """Return the means over suites on both bases, and the differences with their intervals.

    Each arm is compared with direct transfer after equally long training.
    """
    columns = [
        "method", "", "trained for", OLD, new, "change by the update",
        f"{OLD}, minus Fine-tune(old)", f"{new}, minus Direct Transfer", "share of the gap",
    ]  # fmt: skip
    bare = [_points(scores.bare_average(label)) for label in (OLD, new)]
    rows = [["bare base", "", "", *bare, "", "", "", ""]]
    for method in scores.experiment.methods:
        found = Comparison(scores, method, new)
        gap = _text(found.difference(found.tuned_new, found.direct))
        tuned = _points(scores.average(found.tuned_new))
        rows.append([method, "Fine-tune(new)", _duration(scores), "", tuned, "", "", gap, ""])
        for steps in scores.lengths:
            rows += [
                _change_row(found, title, arm, steps)
                for title, arm in {"Direct Transfer": PLAIN, **scores.experiment.arms}.items()
            ]
    return table(columns, rows, texts=3)


def _change_row(found: Comparison, title: str, arm: Perturbation, steps: int | None) -> list[str]:
    labels = (OLD, found.new)
    lines = [found.carried(arm, label, steps) for label in labels]
    row = [found.method, title, _duration(found.scores, steps)]
    row += [_points(found.scores.average(line)) for line in lines]
    row.append(_text(found.difference(lines[1], lines[0])))
    if arm == PLAIN:
        return [*row, "", "", ""]
    plain = [found.carried(PLAIN, label, steps) for label in labels]
    row += [_text(found.difference(*pair)) for pair in zip(lines, plain, strict=True)]
    share = found.share(arm) if steps is None else None
    percent = share and f"{share.value:.0f} % ({share.low:.0f}, {share.high:.0f})"
    return [*row, percent or ""]


def equal_score_table(scores: Scores, new: str) -> str:
    """Return the difference of each arm from direct transfer at an equal score on the old base."""
    rows = []
    for method in scores.experiment.methods:
        found = Comparison(scores, method, new)
        for name, arm in scores.experiment.arms.items():
            lines = [found.carried(arm, steps=steps) for steps in scores.lengths]
            is_scored = all(scores.average(line) is not None for line in lines)
            reached = found.at_equal_old_score(arm)
            text = "not reached" if reached is None and is_scored else _text(reached)
            rows.append([method, name, text])
    return table(["method", "arm", f"{new}, minus Direct Transfer"], rows, texts=2)


def _duration(scores: Scores, steps: int | None = None) -> str:
    optimizer = scores.experiment.optimizer(steps)
    return (
        f"{optimizer.steps} steps" if optimizer.epochs is None else f"{optimizer.epochs:g} epochs"
    )


def p_value_table(scores: Scores, new: str) -> str:
    """Return table 3: p-values against direct transfer, and paired intervals of the difference."""
    rows = []
    for method in scores.experiment.methods:
        found = Comparison(scores, method, new)
        for name, arm in scores.experiment.arms.items():
            cells = []
            for suite in (*scores.suites, None):
                difference = found.difference(
                    found.carried(arm), found.direct,
                    suites=None if suite is None else [suite], runs=scores.orders,
                )  # fmt: skip
                p_value = found.p_value(arm, suite)
                cells.append("" if difference is None else f"{_p(p_value)}; {difference}")
            rows.append([method, name, *cells])
    return table(["method", "arm", *scores.suites, "average"], rows, texts=2)


def seed_table(scores: Scores, new: str) -> str:
    """Return table 4: the score of each seed, and their mean."""
    rows = []
    for suite in scores.suites:
        for method in scores.experiment.methods:
            for title, line in _lines(Comparison(scores, method, new)):
                by_seed = [scores.points(line, suite, [run]) for run in scores.seeds]
                mean = scores.points(line, suite)
                rows.append([suite, method, title, *map(_points, by_seed), _points(mean)])
    seeds = [f"seed {seed}" for seed, _ in scores.seeds]
    return table(["suite", "method", "", *seeds, "average"], rows, texts=3)


def sweep_table(
    scores: Scores, perturbations: Mapping[float | str, Perturbation], method: str
) -> str:
    """Return the figures of fig. 6 or 10: mean over suites on each base, by value."""
    labels = scores.experiment.families[scores.family].labels
    runs = scores.seeds[:1]
    rows = [
        [str(value)]
        + [_points(scores.average(Line(method, arm, OLD, label), runs)) for label in labels]
        for value, arm in perturbations.items()
    ]
    return table(["value", *labels], rows)


def selection_table(experiment: Experiment, scores: Iterable[Score]) -> str:
    """Return the candidates of the selection with their loss, in nats per answer token."""
    chosen = experiment.selection
    assert chosen is not None
    losses = {(s.arm, s.scored_on): s.loss for s in scores if s.suite == HELD_OUT}
    rows = []
    for candidate in chosen.candidates(experiment.arms[chosen.arm]):
        found = (losses.get((candidate, label)) for label in (OLD, chosen.new))
        rows.append([rates_text(candidate), *("" if x is None else f"{x:.4f}" for x in found)])
    return table(["candidate", OLD, chosen.new], rows)


@dataclass(frozen=True)
class Hours:
    """Measured GPU hours of one adapter of a method.

    Attributes:
        once: one training on the old base with Trans-PEFT, the mean over all arms.
        plain: one plain training on the old base.
        again: one plain training on each new base, summed.
    """

    once: float
    plain: float
    again: float

    @property
    def retuned(self) -> float:
        """Hours of an adapter that is trained again after each update."""
        return self.plain + self.again


def hours(scores: Scores, method: str) -> Hours | None:
    """Return the measured hours of a method; None if a training is missing."""
    measured: dict[tuple[str, bool], dict[object, float]] = {}
    for score in scores.scores:
        if score.method == method and score.gpu_seconds and score.steps is None:
            of = measured.setdefault((score.trained_on, score.arm.is_off), {})
            of[score.arm, score.seed, score.data_seed] = score.gpu_seconds / 3600
    new = scores.experiment.families[scores.family].new
    wanted = [(OLD, False), (OLD, True), *((label, True) for label in new)]
    if any(key not in measured for key in wanted):
        return None
    once, plain, *again = (fmean(measured[key].values()) for key in wanted)
    return Hours(once, plain, sum(again))


def hours_table(scores: Scores, cost: Cost) -> str:
    """Return the figures of fig. 7: GPU hours of one adapter and of many, and their price."""
    columns = ["method", "", "GPU hours of an adapter", f"of {cost.adapters:,} adapters"]
    columns.append(f"price of these, {cost.currency}")
    rows = []
    for method in scores.experiment.methods:
        found = hours(scores, method)
        if found is None:
            continue
        for title, value in (
            ("Trans-PEFT, tuned once", found.once),
            ("tuned again for each update", found.retuned),
        ):
            total = value * cost.adapters
            price = f"{total * cost.price_per_gpu_hour:,.2f}" if cost.price_per_gpu_hour else ""
            rows.append([method, title, f"{value:.3g}", f"{total:,.4g}", price])
    return table(columns, rows, texts=2)


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _text(found: Interval | None) -> str:
    return "" if found is None else str(found)


def _p(value: float | None) -> str:
    if value is None:
        return "no p"
    return "p<0.01" if value < 0.01 else f"p={value:.2f}"
