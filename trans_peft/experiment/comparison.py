"""The scores of an experiment as arrays of runs and items, and the statistics of its tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from trans_peft.domain.evaluation import BARE
from trans_peft.domain.experiment import OLD, PLAIN, Experiment
from trans_peft.domain.recipe import Perturbation
from trans_peft.experiment.cells import HELD_OUT, Score
from trans_peft.experiment.statistics import Interval, paired_p, resampled, right

__all__ = ["Comparison", "Line", "Run", "Scores"]

Run = tuple[int, int | None]
"""A seed, and the seed of the order of rows if it is another one."""


@dataclass(frozen=True)
class Line:
    """A method and an arm, trained on one base and scored on one base of the same family.

    `steps` are the optimizer steps of a longer training, None for the usual number.
    """

    method: str
    arm: Perturbation
    trained_on: str
    scored_on: str
    steps: int | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of one family.

    Attributes:
        experiment: the experiment, with its selected rates.
        family: name of the family.
        suites: names of the suites, in the order of the tables.
        scores: all scores of the family.
    """

    experiment: Experiment
    family: str
    suites: tuple[str, ...]
    scores: tuple[Score, ...]

    @classmethod
    def of(cls, experiment: Experiment, family: str, found: Iterable[Score]) -> "Scores":
        """Return the scores of a family among all scores."""
        own = tuple(score for score in found if score.family == family and score.suite != HELD_OUT)
        suites = tuple(suite.name for suite in experiment.suites_of(family))
        return cls(experiment, family, suites, own)

    @cached_property
    def _right(self) -> dict[tuple[Line, Run, str], str]:
        return {
            (
                Line(score.method, score.arm, score.trained_on, score.scored_on, score.steps),
                (score.seed, score.data_seed),
                score.suite,
            ): score.right
            for score in self.scores
        }

    @property
    def seeds(self) -> tuple[Run, ...]:
        """The runs of the tables: one for each seed."""
        return tuple((seed, None) for seed in self.experiment.seeds)

    @property
    def orders(self) -> tuple[Run, ...]:
        """The runs of table 3: the first seed with each order of rows."""
        return self.experiment.orders

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """The optimizer steps of the trainings on the old base; None is the usual number."""
        return (None, *self.experiment.longer)

    def results(
        self, line: Line, suites: Sequence[str], runs: Sequence[Run]
    ) -> list[np.ndarray] | None:
        """Return an array (runs, items) for each suite; None if a run has not been scored."""
        wanted = [[(line, run, suite) for run in runs] for suite in suites]
        if not runs or any(key not in self._right for keys in wanted for key in keys):
            return None
        return [right([self._right[key] for key in keys]) for keys in wanted]

    def points(self, line: Line, suite: str, runs: Sequence[Run] | None = None) -> float | None:
        """Return the mean score over runs on a suite, in percent; None if one is missing."""
        found = self.results(line, [suite], self.seeds if runs is None else runs)
        return None if found is None else float(100 * found[0].mean())

    def average(self, line: Line, runs: Sequence[Run] | None = None) -> float | None:
        """Return the mean over suites of `points`; None if one is missing."""
        found = [self.points(line, suite, runs) for suite in self.suites]
        whole = [points for points in found if points is not None]
        return sum(whole) / len(whole) if whole and len(whole) == len(found) else None

    def bare(self, label: str) -> Line:
        """Return the line of a bare base."""
        return Line(BARE, PLAIN, label, label)

    def bare_points(self, label: str, suite: str) -> float | None:
        """Return the score of a bare base on a suite."""
        return self.points(self.bare(label), suite, [(0, None)])

    def bare_average(self, label: str) -> float | None:
        """Return the mean over suites of the score of a bare base."""
        return self.average(self.bare(label), [(0, None)])


@dataclass(frozen=True)
class Comparison:
    """One method on the old base and one new base: the lines of tables 1 and 2."""

    scores: Scores
    method: str
    new: str

    @property
    def tuned_new(self) -> Line:
        """Fine-tune(new): plain, trained and scored on the new base."""
        return Line(self.method, PLAIN, self.new, self.new)

    @property
    def tuned_old(self) -> Line:
        """Fine-tune(old): plain, trained and scored on the old base."""
        return self.carried(PLAIN, OLD)

    @property
    def direct(self) -> Line:
        """Direct transfer: plain, trained on the old base and scored on the new one."""
        return self.carried(PLAIN)

    def carried(
        self, arm: Perturbation, scored_on: str | None = None, steps: int | None = None
    ) -> Line:
        """Return an arm that was trained on the old base, scored on the new base or another."""
        return Line(self.method, arm, OLD, self.new if scored_on is None else scored_on, steps)

    def difference(
        self,
        line: Line,
        other: Line,
        *,
        suites: Sequence[str] | None = None,
        runs: Sequence[Run] | None = None,
    ) -> Interval | None:
        """Return the mean over suites of a line's score minus another's, with its interval."""
        over = self.scores.suites if suites is None else suites
        of = self.scores.seeds if runs is None else runs
        found = [self.scores.results(one, over, of) for one in (line, other)]
        if found[0] is None or found[1] is None:
            return None
        return Interval.of(resampled(found[0]) - resampled(found[1]))

    def share(self, arm: Perturbation) -> Interval | None:
        """Return the percentage of the gap from direct transfer to Fine-tune(new) that is closed.

        None if the interval of the gap does not lie above zero.
        """
        lines = (self.carried(arm), self.direct, self.tuned_new)
        ours, direct, tuned = (self._draws(line) for line in lines)
        if ours is None or direct is None or tuned is None or Interval.of(tuned - direct).low <= 0:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(tuned == direct, np.nan, 100 * (ours - direct) / (tuned - direct))
        return Interval.of(shares)

    def at_equal_old_score(self, arm: Perturbation) -> Interval | None:
        """Return an arm's score on the new base minus direct transfer's, at equal old-base scores.

        Arms learn more slowly under perturbation. The arm's score on the new base is interpolated
        linearly between two lengths of training, at the old-base score of direct transfer after
        the usual number of steps. None if that score lies between no two of the arm's.
        """
        plain_old, plain_new = self._draws(self.tuned_old), self._draws(self.direct)
        if plain_old is None or plain_new is None:
            return None
        for lengths in pairwise(self.scores.lengths):
            old, new = (
                [self._draws(self.carried(arm, base, steps)) for steps in lengths]
                for base in (OLD, self.new)
            )
            if any(draws is None for draws in (*old, *new)):
                continue
            (old_1, old_2), (new_1, new_2) = np.array(old), np.array(new)
            if old_1[0] <= plain_old[0] <= old_2[0]:
                with np.errstate(divide="ignore", invalid="ignore"):
                    way = np.where(old_2 == old_1, np.nan, (plain_old - old_1) / (old_2 - old_1))
                return Interval.of(new_1 + way * (new_2 - new_1) - plain_new)
        return None

    def _draws(self, line: Line) -> np.ndarray | None:
        """Return the resampled mean scores of a line; None if one is missing."""
        found = self.scores.results(line, self.scores.suites, self.scores.seeds)
        return None if found is None else resampled(found)

    def p_value(self, arm: Perturbation, suite: str | None = None) -> float | None:
        """Return the p-value of table 3 for an arm against direct transfer. None: all suites."""
        runs = self.scores.orders
        per_run = [
            [
                self.scores.average(line, [run])
                if suite is None
                else self.scores.points(line, suite, [run])
                for run in runs
            ]
            for line in (self.carried(arm), self.direct)
        ]
        ours, theirs = ([points for points in line if points is not None] for line in per_run)
        if len(ours) < len(runs) or len(theirs) < len(runs):
            return None
        return paired_p(ours, theirs)
