"""The report of an experiment: report.md, report.html with all figures in it, and figures/."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from trans_peft.domain.experiment import OLD, Experiment, rates_text
from trans_peft.experiment import figures, tables
from trans_peft.experiment.analyses import FamilyAnalysis
from trans_peft.experiment.cells import Score
from trans_peft.experiment.comparison import Scores
from trans_peft.experiment.outline import Outline
from trans_peft.files import atomic_write

__all__ = ["MARK", "Report", "write_report"]

MARK = "not a result"
"""Written on everything that `--quick` makes."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #fff;
  max-width: 1100px; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d5d8dd; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: 13.5px; white-space: nowrap; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e6e8eb; }
th { background: #f4f5f7; text-align: left; } th:empty { padding: 0; }
tbody tr:hover { background: #fafbfc; }
img { max-width: 100%; } code { background: #f4f5f7; padding: 0 .2em; }
blockquote { margin: 1rem 0; padding: .5rem 1rem; background: #fdf0e3;
  border-left: 4px solid #e07a1f; font-weight: 600; }
"""
_IMAGE = re.compile(r'src="(figures/[^"]+\.(svg|png))"')
_TYPES = {"svg": "svg+xml", "png": "png"}


@dataclass(frozen=True)
class Report:
    """The files of a report.

    Attributes:
        markdown: report.md.
        page: report.html, which needs no other file.
        figures: the figures.
    """

    markdown: Path
    page: Path
    figures: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files."""
        return (self.markdown, self.page, *self.figures)


@dataclass(frozen=True)
class _Sources:
    """What the sections are made from. `experiment` has its selected rates."""

    experiment: Experiment
    selection: Experiment
    scores: Sequence[Score]
    analyses: Sequence[FamilyAnalysis]
    folder: Path
    mark: str

    def of(self, family: str) -> Scores:
        return Scores.of(self.experiment, family, self.scores)


def write_report(  # noqa: PLR0913  what was planned, what was found, and where it is written
    given: Experiment,
    experiment: Experiment,
    plan: Outline,
    scores: Sequence[Score],
    analyses: Sequence[FamilyAnalysis],
    folder: Path,
    *,
    is_quick: bool = False,
) -> Report:
    """Write the report into a folder. What has not been scored is empty.

    Args:
        given: The experiment of the file, with its selection.
        experiment: The experiment with the selected rates; the same one without a selection.
        plan: Its plan, with the differences from the paper.
        scores: The scores.
        analyses: The analyses of families.
        folder: The folder.
        is_quick: Whether the scores were computed with `--quick` and are no results.
    """
    mark = MARK if is_quick else ""
    sources = _Sources(experiment, given, scores, analyses, folder, mark)
    parts = [f"# Experiment {experiment.name}"]
    if mark:
        parts.append(f"> **{MARK.capitalize()}.** Made with `--quick`: few rows, items and steps.")
    parts += [_settings(sources, plan), _differences(plan)]
    parts += [section for section in _sections(sources) if section]
    text = "\n\n".join(parts) + "\n"
    name = f"report-{MARK.replace(' ', '-')}" if mark else "report"
    markdown, page = folder / f"{name}.md", folder / f"{name}.html"
    atomic_write(markdown, text)
    atomic_write(page, _page(text, folder, experiment.name))
    images = re.findall(r"^!\[[^\]]*\]\((figures/\S+)\)$", text, re.MULTILINE)
    return Report(markdown, page, tuple(folder / image for image in images))


def _sections(sources: _Sources) -> Iterator[str]:
    experiment = sources.experiment
    if sources.selection.selection is not None:
        yield _selected(sources)
    yield (
        "## Scores (tables 1 and 2)\n\nRight answers in percent. The second table of each pair of "
        "bases has means over suites, and compares arms after equally long training. *Share of the "
        "gap*: of the gap from Direct Transfer to Fine-tune(new), if its interval lies above zero. "
        f"{_intervals(experiment)}"
    )
    for family, bases in experiment.families.items():
        scores = sources.of(family)
        for new in bases.new:
            image = figures.transfer_figure(
                scores, new, _figure(sources, family, f"transfer-{new}"), sources.mark
            )
            text = f"{tables.main_table(scores, new)}\n\n{tables.change_table(scores, new)}"
            yield _section(f"### {family}, {new}", text, image, sources)
    yield from _equal_scores(sources)
    yield from _repeats(sources)
    if any(len(bases.new) > 1 for bases in experiment.families.values()):
        yield (
            "## Domain updates (fig. 5)\n\nOne old base and several new ones; the first method. "
            "Bars have intervals over runs and items."
        )
    for family, bases in experiment.families.items():
        if len(bases.new) > 1:
            path = _figure(sources, family, "domains")
            image = figures.bases_figure(sources.of(family), path, sources.mark)
            yield _section("", "", image, sources)
    yield from _sweeps(sources)
    yield from _hours(sources)
    yield from _analyses(sources)


def _settings(sources: _Sources, plan: Outline) -> str:
    experiment, shared = sources.experiment, sources.experiment.training
    items = {(s.family, s.suite): len(s.right) for s in sources.scores if s.right}
    rows_of = {
        name: ", ".join(tables.literal(source.uri) for source in experiment.sources_of(name))
        for name in experiment.families
    }
    suites_of = {
        name: ", ".join(f"{s.name} ({items.get((name, s.name), '?')})" for s in experiment.suites_of(name))  # noqa: E501
        for name in experiment.families
    }  # fmt: skip
    bases = "; ".join(
        f"{name}: {tables.literal(family.old)} -> "
        + ", ".join(f"{label} ({tables.literal(uri)})" for label, uri in family.new.items())
        for name, family in experiment.families.items()
    )
    rows = [
        ["bases", bases],
        ["methods", "; ".join(f"{n}: {s.peft_type} {_options(s.options)}" for n, s in experiment.methods.items())],  # noqa: E501
        ["arms", "; ".join(f"{name}: {rates_text(arm)}" for name, arm in experiment.arms.items())],
        ["training rows", _by_family(rows_of)],
        ["training", f"{shared.optimizer.duration}, learning rate {shared.optimizer.learning_rate:g}, {shared.optimizer.schedule}, {shared.dtype}"],  # noqa: E501
        ["suites (items)", _by_family(suites_of)],
        ["seeds", ", ".join(map(str, experiment.seeds))],
    ]  # fmt: skip
    if experiment.data_seeds:
        rows.append(["seeds of the order of rows", ", ".join(map(str, experiment.data_seeds))])
    if experiment.longer:
        rows.append(["steps of longer trainings", ", ".join(map(str, experiment.longer))])
    lines = ["## What was run", "", tables.table(["", ""], rows, texts=2)]
    if plan.missing:
        lines += ["", f"**{plan.missing} trainings are missing; what needs them is empty.**"]
    if plan.notes:
        lines += ["", *(f"- {note}" for note in plan.notes)]
    return "\n".join(lines)


def _differences(plan: Outline) -> str:
    found = plan.deviations or ("None that the settings show.",)
    return "\n".join(["## Differences from the paper", "", *(f"- {one}" for one in found)])


def _selected(sources: _Sources) -> str:
    given = sources.selection
    chosen = given.selection
    assert chosen is not None
    arm = sources.experiment.arms[chosen.arm]
    text = tables.selection_table(given, [s for s in sources.scores if s.family == chosen.family])
    return (
        f"## Selected rates\n\n`{chosen.arm}`: {rates_text(arm)}. Loss on {100 * chosen.share:g} % "
        f"of the training rows, which these trainings held out, in nats per answer token; the "
        f"lowest one on {chosen.new} is selected. Chosen on {chosen.family} with "
        f"{chosen.method} and seed {chosen.seed}, which no table contains. Rows "
        f"of {chosen.family} are therefore the weaker evidence.\n\n{text}"
    )


def _equal_scores(sources: _Sources) -> Iterator[str]:
    experiment = sources.experiment
    if not experiment.longer:
        return
    yield (
        "## At an equal score on the old base\n\nArms learn more slowly under perturbation. The "
        "score of an arm on the new base is interpolated between its lengths of training, at the "
        f"score of Direct Transfer on {OLD} after {experiment.training.optimizer.steps} steps."
    )
    for family, bases in experiment.families.items():
        for new in bases.new:
            yield f"### {family}, {new}\n\n{tables.equal_score_table(sources.of(family), new)}"


def _repeats(sources: _Sources) -> Iterator[str]:
    experiment = sources.experiment
    if len(experiment.data_seeds) > 1:
        yield (
            f"## Significance (table 3)\n\nSeed {experiment.seeds[0]} with "
            f"{len(experiment.data_seeds)} orders of the rows. p: two-sided paired t test between "
            "the runs of an arm and of Direct Transfer; the paper does not name its test. There is "
            "none if all runs have the same difference. Beside it the difference in points, with "
            "its interval over runs and items."
        )
        for family, bases in experiment.families.items():
            for new in bases.new:
                yield f"### {family}, {new}\n\n{tables.p_value_table(sources.of(family), new)}"
    if len(experiment.seeds) > 1:
        yield "## Seeds (table 4)"
        for family, bases in experiment.families.items():
            for new in bases.new:
                yield f"### {family}, {new}\n\n{tables.seed_table(sources.of(family), new)}"


def _sweeps(sources: _Sources) -> Iterator[str]:
    experiment = sources.experiment
    for number, sweep in enumerate(experiment.sweeps, start=1):
        scores = sources.of(sweep.family)
        of = "fig. 10" if sweep.field == "where" else "fig. 6"
        fixed = rates_text(sweep.at)
        image = figures.sweep_figure(
            scores,
            sweep,
            _figure(sources, sweep.family, f"sweep-{number}-{sweep.field}"),
            sources.mark,
        )
        text = tables.sweep_table(scores, sweep.perturbations, sweep.method)
        title = (
            f"## Sweep of `{sweep.field}` ({of})\n\n{sweep.family}, {sweep.method}, seed "
            f"{experiment.seeds[0]}; the other fields: {fixed}. Mean over suites, in percent."
        )
        yield _section(title, text, image, sources)


def _hours(sources: _Sources) -> Iterator[str]:
    cost = sources.experiment.cost
    yield (
        "## GPU hours (fig. 7)\n\nDuration of the training loops times their processes. "
        "An adapter that is tuned again was trained on the old base and on each new base. "
        f"{cost.adapters:,} adapters are this number times one adapter"
        + (
            f", at {cost.price_per_gpu_hour:g} {cost.currency} a GPU hour."
            if cost.price_per_gpu_hour
            else "."
        )
    )
    for family in sources.experiment.families:
        scores = sources.of(family)
        path = _figure(sources, family, "hours")
        image = figures.hours_figure(scores, path, sources.mark)
        yield _section(f"### {family}", tables.hours_table(scores, cost), image, sources)


def _analyses(sources: _Sources) -> Iterator[str]:
    from trans_peft import analysis as analyzed

    if sources.experiment.analyses:
        yield (
            "## Analyses of the bases (fig. 1, 2, 3, 8, 9, theorem 1)\n\nThe bases read the texts "
            "that come with `trans-peft analyse`. docs/analysis.md explains the measures."
        )
    for found in sources.analyses:
        analysis = found.analysis
        adapters = f"with plain {found.method} adapters" if found.method else "without adapters"
        yield f"### {found.family}, {adapters}"
        for shown in analyzed.tables(analysis):
            yield f"#### {shown.title}\n\n{tables.table(shown.header, shown.rows)}\n\n{shown.note}"
        folder = _figure(sources, found.family, "analysis").with_suffix("")
        drawn = analyzed.draw_figures(analysis, folder, sources.mark)
        for update, images in drawn.items():
            for caption, image in images.items():
                title = f"#### {caption}: {analysis.old} and {update}"
                yield _section(title, "", image, sources)


def _intervals(experiment: Experiment) -> str:
    runs = len(experiment.seeds)
    over = f"{runs} seeds and items" if runs > 1 else "items alone: there is one seed"
    return f"Intervals: the middle 95 % of 4,000 resamples of {over}."


def _by_family(texts: Mapping[str, str]) -> str:
    """Return one text if it is that of all families, else each with its family."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{family}: {text}" for family, text in texts.items())


def _options(options: object) -> str:
    pairs = options.items() if hasattr(options, "items") else ()
    return tables.literal(", ".join(f"{name} {value}" for name, value in pairs))


def _figure(sources: _Sources, family: str, name: str) -> Path:
    suffix = f"-{MARK.replace(' ', '-')}" if sources.mark else ""
    return sources.folder / "figures" / family / f"{name}{suffix}.svg"


def _section(title: str, text: str, image: Path | None, sources: _Sources) -> str:
    parts = [title, text]
    if image is not None:
        parts.append(f"![{image.stem}]({image.relative_to(sources.folder).as_posix()})")
    return "\n\n".join(part for part in parts if part)


def _page(text: str, folder: Path, name: str) -> str:
    """Return the report as one HTML page with its figures in it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="scroll"><table>').replace(
        "</table>", "</table></div>"
    )

    def embedded(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match.group(1)).read_bytes()).decode()
        return f'src="data:image/{_TYPES[match.group(2)]};base64,{data}"'

    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{_IMAGE.sub(embedded, body)}</body></html>\n"
    )
