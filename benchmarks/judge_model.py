"""Level and power of the gate on suites that a judge model marks, from simulated adapters.

    python -m benchmarks.judge_model [--adapters 4000]

People would label 70 % of the answers on the old base as right. On the new base, 40 % of the items
have another answer, whose label is drawn anew, with fewer right ones if the adapter lost. The judge
model takes a right answer as right with one probability and a wrong one with another. Its marks are
0 and 1, and equal for equal answers. Each adapter is judged by betting on the marks themselves, and
with the correction by labeled answers, which are drawn anew for each adapter. "Lenient on the new
base" breaks the assumption of the correction: wrong answers on the new base are taken as right more
often than the labeled ones. The benchmark takes half a minute on one core. Its table is in
docs/statistics.md.
"""

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.judged import MARK_LEVEL, LabeledMarks

MARGIN, ALPHA, ITEMS = 0.05, 0.05, 1000
_RIGHT, _CHANGED = 0.7, 0.4


class Judge(NamedTuple):
    """Probabilities with which a simulated judge model takes an answer as right.

    Attributes:
        right: of a right answer.
        wrong: of a wrong answer.
        wrong_on_new: of a wrong answer on the new base that the old base did not give.
    """

    right: float
    wrong: float
    wrong_on_new: float


JUDGES = {
    "no errors": Judge(1.0, 0.0, 0.0),
    "lenient": Judge(0.95, 0.3, 0.3),
    "strict": Judge(0.75, 0.05, 0.05),
    "poor": Judge(0.75, 0.35, 0.35),
    "lenient on the new base": Judge(0.95, 0.1, 0.3),
}


class PassRates(NamedTuple):
    """Shares of simulated adapters that were shown to be non-inferior."""

    uncorrected: float
    corrected: float


def simulate(judge: Judge, labels: int, loss: float, *, adapters: int, seed: int) -> PassRates:
    """Judge simulated adapters with a true loss of `loss`.

    `labels` answers are labeled as right, and as many as wrong.
    """
    rng = np.random.default_rng(seed)

    def marks(is_right: NDArray[np.bool_], wrong: float) -> NDArray[np.bool_]:
        return rng.random(is_right.shape) < np.where(is_right, judge.right, wrong)

    shape = (ITEMS, adapters)
    old, new = rng.random(shape) < _RIGHT, rng.random(shape) < _RIGHT - loss / _CHANGED
    change = marks(new, judge.wrong_on_new).astype(float) - marks(old, judge.wrong)
    changes = np.where(rng.random(shape) < _CHANGED, change, 0.0)
    slopes = np.array(
        [
            LabeledMarks(
                rng.random(labels) < judge.right, rng.random(labels) < judge.wrong
            ).slope_bounds((1 - MARK_LEVEL) * ALPHA)[0]
            for _ in range(adapters)
        ]
    )
    known = np.maximum(slopes, 1e-6)
    corrected = _passed(changes, MARGIN * known, MARK_LEVEL * ALPHA) & (slopes > 0)
    uncorrected = _passed(changes, np.full(adapters, MARGIN), ALPHA)
    return PassRates(float(np.mean(uncorrected)), float(np.mean(corrected)))


def _passed(
    changes: NDArray[np.float64], margins: NDArray[np.float64], alpha: float
) -> NDArray[np.bool_]:
    """Return for each adapter whether the mean change is shown to exceed -margin."""
    betting_test = BettingTest(
        -margins, items=len(changes), alpha=alpha, effect=MARGIN, unit_steps=False
    )
    betting_test.effect = margins  # one for each adapter
    for values in changes:
        betting_test.observe(values)
    return np.asarray(betting_test.is_significant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=4000)
    adapters = parser.parse_args().adapters
    print("| judge model | labels | uncorrected, loss 5 | loss 0 | corrected, loss 5 | loss 0 |")
    print("| -- | -- | -- | -- | -- | -- |")
    for name, judge in JUDGES.items():
        for labels in (100, 300):
            lost, kept = (
                simulate(judge, labels, loss, adapters=adapters, seed=labels)
                for loss in (MARGIN, 0.0)
            )
            print(
                f"| {name} | {labels} + {labels} | {100 * lost.uncorrected:.1f} % "
                f"| {100 * kept.uncorrected:.0f} % | {100 * lost.corrected:.1f} % "
                f"| {100 * kept.corrected:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
