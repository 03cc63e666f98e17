"""Compute the study's Markdown tables, one for each task and update, from the stored scores.

Each table answers four questions about Trans-PEFT. How does it change the score on the new base
after equal training? How does it change that score at an equal score on the old base, which takes
longer training? How much does it cost on the old base? Which share of the gap to an adapter that
was trained on the new base does it close?
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import fill

import numpy as np

from study.pages import with_blocks
from study.plan import CHOSEN_ON, SEEDS, STEPS, V1
from study.score_file import Score
from trans_peft.domain.evaluation import BARE
from trans_peft.experiment.statistics import Interval, resampled, right

__all__ = ["NEW", "TITLES", "Comparison", "comparisons", "markdown", "page_with"]


PLAIN, OURS = "plain", ("uniform", "spared")
_WIDTH = 120
"""Characters in a line of prose, as in `.mdformat.toml`."""

NEW = "new"
"""The arm Fine-tune(new): plain, trained and scored on the updated base."""


@dataclass(frozen=True)
class Comparison:
    """The scores of all arms on one task and one update. All arms have the same seeds and items."""

    task: str
    update: str
    scores: tuple[Score, ...]

    @cached_property
    def bare(self) -> dict[str, float]:
        """The scores of the bases without an adapter, by base."""
        return {s.scored_on: s.points for s in self.scores if s.arm == BARE}

    @cached_property
    def arms(self) -> dict[tuple[str, int, str], np.ndarray]:
        """The results (seeds, items) by arm, steps and base, where every seed has been scored."""
        found: dict[tuple[str, int, str], dict[int, str]] = {}
        for score in self.scores:
            if score.arm != BARE and score.seed in SEEDS:
                arm = NEW if score.trained_on != V1 else score.arm
                found.setdefault((arm, score.steps, score.scored_on), {})[score.seed] = score.right
        return {
            key: right([by_seed[seed] for seed in SEEDS])
            for key, by_seed in found.items()
            if set(by_seed) == set(SEEDS)
        }

    def mean(self, arm: str, steps: int, base: str) -> float | None:
        """Return an arm's mean score over seeds; None if it has not been scored yet."""
        answers = self.arms.get((arm, steps, base))
        return None if answers is None else float(100 * answers.mean())

    def lost(self, arm: str, steps: int) -> Interval | None:
        """Return the change by the update: an arm's score on the new base minus the old one."""
        return self._difference((arm, steps, self.update), (arm, steps, V1))

    def gained(self, arm: str, steps: int, base: str) -> Interval | None:
        """Return an arm's score on a base minus that of direct transfer, after equal training."""
        return self._difference((arm, steps, base), (PLAIN, steps, base))

    def at_equal_score(self, arm: str) -> Interval | None:
        """Return the new-base score of an arm minus plain's, both at plain's old-base score.

        Plain is taken after the smaller number of steps. The other arm's score on the new base is
        interpolated linearly between its two lengths of training, at plain's old-base score. None
        if plain's score does not lie between them.
        """
        first, second = STEPS
        wanted = [(name, s, b) for name, s in ((PLAIN, first), (arm, first), (arm, second))
                  for b in (V1, self.update)]  # fmt: skip
        if any(key not in self.arms for key in wanted):
            return None
        found = [self.arms[key] for key in wanted]
        plain_old, plain_new, old_1, new_1, old_2, new_2 = (resampled([one]) for one in found)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(old_2 == old_1, np.nan, (plain_old - old_1) / (old_2 - old_1))
        reached = old_1[0] <= plain_old[0] <= old_2[0]
        return Interval.of(new_1 + share * (new_2 - new_1) - plain_new) if reached else None

    def gap(self) -> Interval | None:
        """Return Fine-tune(new) minus direct transfer."""
        return self._difference((NEW, STEPS[0], self.update), (PLAIN, STEPS[0], self.update))

    def recovered(self, arm: str) -> float | None:
        """Return the share of the gap that an arm closes; None if the gap may be zero."""
        gap, gained = self.gap(), self.gained(arm, STEPS[0], self.update)
        if gap is None or gained is None or gap.low <= 0:
            return None
        return gained.value / gap.value

    def _difference(
        self, first: tuple[str, int, str], second: tuple[str, int, str]
    ) -> Interval | None:
        if first not in self.arms or second not in self.arms:
            return None
        a, b = (resampled([self.arms[key]]) for key in (first, second))
        return Interval.of(a - b)


def comparisons(scores: Sequence[Score]) -> Iterator[Comparison]:
    """Yield each task and update for which direct transfer was scored with all seeds."""
    pairs = sorted({(s.task, s.scored_on) for s in scores if s.scored_on != V1})
    for task, update in pairs:
        ours = tuple(s for s in scores if s.task == task and s.scored_on in (V1, update))
        comparison = Comparison(task, update, ours)
        if comparison.lost(PLAIN, STEPS[0]):
            yield comparison


def markdown(comparison: Comparison) -> str:
    """Return one comparison in Markdown: a title, a table and two figures."""
    lines = [
        "| arm | steps | old base | new base | change by the update | minus direct transfer |",
        "| -- | -: | -: | -: | -: | -: |",
    ]
    bare = comparison.bare
    lines.append(f"| bare base | - | {bare[V1]:.1f} | {bare[comparison.update]:.1f} |  |  |")
    new = comparison.mean(NEW, STEPS[0], comparison.update)
    if new is not None:
        lines.append(f"| Fine-tune(new) | {STEPS[0]} | - | {new:.1f} |  | {comparison.gap()} |")
    for steps in STEPS:
        for arm, title in TITLES.items():
            old, after = (comparison.mean(arm, steps, b) for b in (V1, comparison.update))
            if old is None or after is None:
                continue
            gained = "" if arm == PLAIN else comparison.gained(arm, steps, comparison.update)
            lines.append(
                f"| {title} | {steps} | {old:.1f} | {after:.1f} | "
                f"{comparison.lost(arm, steps)} | {gained} |"
            )
    equal = [
        f"{TITLES[arm]} {found}"
        for arm in OURS
        if (found := comparison.at_equal_score(arm)) is not None
    ]
    shares = [
        f"{TITLES[arm]} {100 * share:.0f} %"
        for arm in OURS
        if (share := comparison.recovered(arm)) is not None
    ]
    return "\n".join(
        [
            f"### {comparison.task}, update `{comparison.update}`",
            "",
            *lines,
            "",
            _item(
                f"At the old-base score of direct transfer ({STEPS[0]} steps), minus direct "
                f"transfer: {'; '.join(equal) or 'not reached'}."
            ),
            _item(
                "Share of the gap to Fine-tune(new) that is closed: "
                f"{'; '.join(shares) or ('not measured' if new is None else 'no clear gap')}."
            ),
        ]
    )


def _item(text: str) -> str:
    """Return an item of a Markdown list, wrapped as mdformat wraps it."""
    return fill(
        text,
        _WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def page_with(
    page: str, scores: Sequence[Score], updates: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the page with its blocks `updates`, `comparisons` and `candidates` replaced."""
    blocks = {
        "updates": _updates_table(updates),
        "candidates": _candidates_table(scores),
        "comparisons": "\n\n".join(map(markdown, comparisons(scores))),
    }
    return with_blocks(page, blocks)


def _updates_table(updates: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of the updates: the loss on held-out source code, and the drift."""
    lines = [
        "| update | held-out loss, nats per token | attention | FFN | other weights |",
        "| -- | -: | -: | -: | -: |",
    ]
    for name, figures in updates.items():
        moved = (figures[f"drift_{kind}_percent"] for kind in ("attention", "ffn", "other"))
        lines.append(
            f"| `{name}` | {figures['held_out_loss_before']:.3f} -> "
            f"{figures['held_out_loss_after']:.3f} | "
            + " | ".join(f"{percent:.2f} %" for percent in moved)
            + " |"
        )
    return "\n".join(lines)


def _candidates_table(scores: Sequence[Score]) -> str:
    """Return the table of the settings from which the arm `spared` was chosen."""
    task, update = CHOSEN_ON
    lines = ["| settings | old base | new base |", "| -- | -: | -: |"]
    chosen = [s for s in scores if s.task == task and s.seed == 0 and s.arm != BARE]
    for arm in dict.fromkeys(score.arm for score in chosen):
        points = {s.scored_on: s.points for s in chosen if s.arm == arm}
        if V1 in points and update in points:
            lines.append(f"| {arm} | {points[V1]:.1f} | {points[update]:.1f} |")
    return "\n".join(lines)


TITLES: Mapping[str, str] = {
    PLAIN: "direct transfer",
    "uniform": "Trans-PEFT, uniform",
    "spared": "Trans-PEFT, layers spared",
}
