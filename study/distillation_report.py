"""Compute the tables and the picture of docs/survival.md from the scores in study/distilled.jsonl.

For each task and update, every way to carry an adapter over is compared with direct transfer of a
plain adapter and with Fine-tune(new). The share of the gap is (score - direct transfer) /
(Fine-tune(new) - direct transfer).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from study.pages import with_blocks
from study.plan import V1
from study.score_file import Score
from trans_peft.experiment.statistics import Interval, resampled

__all__ = [
    "PAGE",
    "PICTURE",
    "README",
    "Recovery",
    "draw",
    "figures",
    "page_with",
    "readme_with",
    "recoveries",
]

README = Path(__file__).parent.parent / "README.md"
PAGE = README.parent / "docs" / "survival.md"
PICTURE = PAGE.parent / "images" / "survival.png"

PLAIN, SPARED, NEW = "plain", "spared", "Fine-tune(new)"
_SOURCES = {
    "unlabeled": "unlabeled prompts",
    "other task": "unlabeled prompts of the other task",
    "generic text": "sentences of public texts",
    "written after 20": "prompts written after 20 approved ones",
    "written after 5": "prompts written after 5 approved ones",
    "prompt model": "prompts of a prompt model",
    "prompt model with epsilon 8": "prompts of a prompt model with epsilon 8",
}
_STRATEGIES = {
    "compensated 16": "compensated at rank 16",
    "compensated 64": "compensated at rank 64",
    "distilled": "distilled",
}
_ADAPTERS = {
    PLAIN: "plain",
    SPARED: "Trans-PEFT",
    "update x 1.5": "trained under up to 1.5 of a short FFN update",
    "update x 4": "trained under up to 4 times a short FFN update",
    "noise x 1.5": "trained under noise of the norm of up to 1.5 of it",
}
_DEFAULT = f"{PLAIN}, compensated 16, unlabeled"
_GREY, _INK = "#8A8F98", "#22262B"
_RANGE = (-60, 150)
_COLORS = {PLAIN: "#E07A1F", SPARED: "#1F6FB2"}
_OTHER_COLOR = "#5B8C5A"


@dataclass(frozen=True)
class Recovery:
    """The scores on one task and one update."""

    task: str
    update: str
    scores: tuple[Score, ...]

    @cached_property
    def by_arm(self) -> Mapping[tuple[str, str], Mapping[int, Score]]:
        """The scores by arm and base, and by seed. A plain adapter of the new base is `NEW`."""
        found: dict[tuple[str, str], dict[int, Score]] = {}
        for score in self.scores:
            is_new = score.arm == PLAIN and score.trained_on != V1
            arm = NEW if is_new else score.arm
            found.setdefault((arm, score.scored_on), {})[score.seed] = score
        return found

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds with which all these arms were scored on the new base."""
        known = [set(self.by_arm.get((arm, self.update), ())) for arm in arms]
        return sorted(set.intersection(*known))

    def share(self, arm: str) -> Interval | None:
        """Return the share of the gap that an arm closes, in percent. None without scores.

        With one seed, only items are resampled.
        """
        seeds = self.seeds(arm, PLAIN, NEW)
        if not seeds:
            return None
        ours, direct, new = (self._drawn(name, self.update, seeds) for name in (arm, PLAIN, NEW))
        return Interval.of(100 * (ours - direct) / (new - direct))

    def mean(self, arm: str, base: str) -> float | None:
        """Return the mean score over all seeds, in points. None without scores."""
        scores = self.by_arm.get((arm, base), {}).values()
        return float(np.mean([score.points for score in scores])) if scores else None

    def old_base_cost(self, arm: str) -> Interval | None:
        """Return how many points fewer than the plain adapter the adapter of an arm has on v1.

        Strategies after the update do not change the adapter on v1.
        """
        arms = PLAIN, arm.partition(",")[0]
        known = [set(self.by_arm.get((name, V1), ())) for name in arms]
        if not (seeds := sorted(set.intersection(*known))):
            return None
        plain, ours = (self._drawn(name, V1, seeds) for name in arms)
        return Interval.of(plain - ours)

    def seconds(self, arm: str) -> float | None:
        """Return the mean seconds of an arm after the update. None without scores."""
        if arm in _ADAPTERS:
            return 0.0
        scores = self.by_arm.get((arm, self.update), {}).values()
        return float(np.mean([score.train_seconds for score in scores])) if scores else None

    def _drawn(self, arm: str, base: str, seeds: Sequence[int]) -> np.ndarray:
        scores = self.by_arm[arm, base]
        return resampled([np.array([scores[seed].results for seed in seeds])])


def recoveries(scores: Sequence[Score]) -> Iterator[Recovery]:
    """Yield each task and update with a score of Fine-tune(new) and of direct transfer."""
    for task, update in sorted({(s.task, s.scored_on) for s in scores if s.scored_on != V1}):
        there = {(s.arm, s.seed) for s in scores if s.task == task and s.scored_on == update}
        # Of seeds with an adapter that was trained anew, which the shares refer to.
        complete = {
            s.seed
            for s in scores
            if (s.task, s.scored_on, s.arm) == (task, update, PLAIN) and s.trained_on != V1
        }
        ours = (
            tuple(  # scores on v1 of the same adapters only, so that both columns can be compared
                s
                for s in scores
                if s.task == task
                and s.seed in complete
                and (s.scored_on == update or (s.scored_on == V1 and (s.arm, s.seed) in there))
            )
        )
        recovery = Recovery(task, update, ours)
        if recovery.seeds(PLAIN, NEW):
            yield recovery


def figures(found: Sequence[Recovery]) -> dict[str, dict[str, Any]]:
    """Return the entries of benchmarks/results.json. An entry without scores is left out."""
    shares = {str(pair.task) + ", " + pair.update: pair.share(_DEFAULT) for pair in found}
    known = {name: share for name, share in shares.items() if share is not None}
    entries: dict[str, dict[str, Any]] = {}
    if known:
        name = min(known, key=lambda pair: known[pair].value)
        entries["survive.gap_closed_min"] = _entry(
            known[name], 100, f"{name}; the smallest of {len(known)} pairs; {_DEFAULT}"
        )
    for key, arm in (("", _DEFAULT), (".trans_peft", SPARED)):
        prices = {
            pair.task: price
            for pair in found
            if pair.share(arm) is not None and (price := pair.old_base_cost(arm)) is not None
        }
        if prices:
            name = max(prices, key=lambda task: prices[task].value)
            entries[f"survive.old_base_cost_points{key}"] = _entry(
                prices[name], 1, f"{name}; the largest of {len(prices)} tasks; {arm}"
            )
    return entries


def _entry(found: Interval, divisor: float, shape: str) -> dict[str, Any]:
    names = ("value", "low", "high")
    values = (found.value, found.low, found.high)
    rounded = {name: round(value / divisor, 4) for name, value in zip(names, values, strict=True)}
    return {**rounded, "shape": f"SmolLM2-135M, 120 steps, two cores; {shape}"}


def page_with(page: str, found: Sequence[Recovery]) -> str:
    """Return the page with its blocks `recoveries` and `cost` replaced."""
    tables = {"recoveries": "\n\n".join(map(_table, found)), "cost": _costs(found)}
    return with_blocks(page, tables)


def readme_with(readme: str, found: Sequence[Recovery]) -> str:
    """Return the README with its block `recoveries` replaced: the default strategy only."""
    lines = [
        "| task, update of the base | old base | new base: unchanged | compensated | trained anew "
        "| share of the gap closed, % |",
        "| -- | -: | -: | -: | -: | -: |",
    ]
    for pair in sorted(found, key=lambda pair: (pair.update != "ffn", pair.task)):
        if (share := pair.share(_DEFAULT)) is None:
            continue
        cells = [(PLAIN, V1), *((arm, pair.update) for arm in (PLAIN, _DEFAULT, NEW))]
        old, direct, made, anew = (f"{pair.mean(*cell):.1f}" for cell in cells)
        weights = {"ffn": "FFN weights only", "all": "all weights"}[pair.update]
        lines.append(
            f"| {pair.task}, {weights} | {old} | {direct} | **{made}** | {anew} | "
            f"{_percent(share)} |"
        )
    return with_blocks(readme, {"recoveries": "\n".join(lines)})


def _arms() -> Iterator[tuple[str, str]]:
    """Yield each arm with its title, in the order of the tables."""
    for adapter, title in _ADAPTERS.items():
        yield adapter, f"{title}, unchanged"
        for strategy, done in _STRATEGIES.items():
            for source, described in _SOURCES.items():
                yield f"{adapter}, {strategy}, {source}", f"{title}, {done}: {described}"
    yield NEW, "Fine-tune(new)"


def _table(pair: Recovery) -> str:
    seeds = pair.seeds(PLAIN, NEW)
    count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    items = len(pair.by_arm[PLAIN, V1][seeds[0]].results)
    lines = [
        f"### {pair.task}, update `{pair.update}`: {count}, {items} items",
        "",
        "| adapter | old base | new base | share of the gap, % | seconds after the update |",
        "| -- | -: | -: | -: | -: |",
    ]
    for arm, title in _arms():
        new, share, seconds = pair.mean(arm, pair.update), pair.share(arm), pair.seconds(arm)
        if new is None or share is None or seconds is None:
            continue
        old = pair.mean(arm, V1)
        scored = len(pair.seeds(arm, PLAIN, NEW))
        if scored < len(seeds):
            title += f" ({scored} of {count})"
        closed = "0" if arm == PLAIN else "100" if arm == NEW else _percent(share)
        lines.append(
            f"| {title} | {'' if old is None else f'{old:.1f}'} | {new:.1f} | {closed} | "
            f"{seconds:.0f} |"
        )
    return "\n".join(lines)


def _costs(found: Sequence[Recovery]) -> str:
    """Return a Markdown table with the computing time of each way, and that for 1,000 adapters.

    Only pairs of task and update in which all ways were measured count.
    """
    arms = {"compensated at rank 16": _DEFAULT, "distilled": f"{PLAIN}, distilled, unlabeled"}
    pairs = [pair for pair in found if pair.seeds(NEW, *arms.values())]
    lines = [
        "| after the update | seconds an adapter | of training anew | hours for 1,000 adapters |",
        "| -- | -: | -: | -: |",
    ]
    for title, arm in {**arms, "Fine-tune(new)": NEW}.items():
        seconds, shares = [], []
        for pair in pairs:
            ours, new = (pair.by_arm[name, pair.update] for name in (arm, NEW))
            for seed in pair.seeds(NEW, *arms.values()):
                seconds.append(ours[seed].train_seconds)
                shares.append(ours[seed].train_seconds / new[seed].train_seconds)
        if seconds:
            low, share, high = np.quantile(shares, [0, 0.5, 1])
            shown = "1" if arm == NEW else f"{share:.2f} ({low:.2f} to {high:.2f})"
            mean = float(np.mean(seconds))
            lines.append(f"| {title} | {mean:.0f} | {shown} | {1000 * mean / 3600:.0f} |")
    return "\n".join(lines)


def _percent(share: Interval) -> str:
    return f"{share.value:.0f} ({share.low:.0f}, {share.high:.0f})"


def draw(found: Sequence[Recovery], path: Path) -> Path:
    """Write a PNG with the share of the gap of every arm, one panel per task and update."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 10, "axes.edgecolor": _GREY, "text.color": _INK, "xtick.color": _INK}
    with plt.rc_context({**style, "ytick.color": _INK, "axes.labelcolor": _INK}):
        shown = [_shares(pair) for pair in found]
        counts = [len(rows) for rows in shown]
        figure, axes = plt.subplots(
            len(found), 1, figsize=(10, 0.32 * sum(counts) + 0.7 * len(found) + 0.4),
            height_ratios=[count + 0.4 for count in counts], squeeze=False, sharex=True,
            layout="constrained",
        )  # fmt: skip
        for panel, pair, rows in zip(axes.flat, found, shown, strict=True):
            for row, (_, share, color) in enumerate(reversed(rows)):
                panel.plot([share.low, share.high], [row, row], color=color, linewidth=2)
                panel.plot(share.value, row, "o", color=color, markersize=6)
            panel.set_yticks(range(len(rows)), [title for title, *_ in reversed(rows)])
            panel.set_ylim(-0.7, len(rows) - 0.3)
            panel.set_xlim(*_RANGE)
            for at, line in ((0, "-"), (80, ":"), (100, "--")):
                panel.axvline(at, color=_GREY, linewidth=1, linestyle=line, zorder=0)
            panel.set_title(f"{pair.task}, update {pair.update}", loc="left", fontsize=10)
            panel.spines[["top", "right", "left"]].set_visible(False)
            panel.tick_params(left=False)
        axes.flat[-1].set_xticks(
            [0, 50, 80, 100], ["0\ndirect transfer", "50", "80", "100\nFine-tune(new)"]
        )
        axes.flat[-1].set_xlabel("share of the gap that is closed, %")
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)
    return path


def _shares(pair: Recovery) -> list[tuple[str, Interval, str]]:
    """Return the title, the share of the gap and the color of each arm between the references."""
    return [
        (title, share, _COLORS.get(arm.partition(",")[0], _OTHER_COLOR))
        for arm, title in _arms()
        if arm not in (PLAIN, NEW) and (share := pair.share(arm)) is not None
    ]
