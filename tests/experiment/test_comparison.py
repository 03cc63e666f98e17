"""The statistics and tables of constructed scores, compared with independent computations."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from trans_peft.cli.files import read_experiment
from trans_peft.domain.evaluation import BARE
from trans_peft.domain.experiment import OLD, PLAIN
from trans_peft.domain.recipe import Perturbation
from trans_peft.experiment import tables
from trans_peft.experiment.cells import HELD_OUT, Score, selected
from trans_peft.experiment.comparison import Comparison, Scores

EXPERIMENT = replace(
    read_experiment(Path(__file__).with_name("repeats.yaml")), data_seeds=(1, 2, 3)
)
OURS = EXPERIMENT.arms["Trans-PEFT"]
SUITES = {"sums": 40, "more": 100}
GENERATOR = np.random.default_rng(5)
SHARES = {
    (PLAIN, OLD, OLD): 0.8, (PLAIN, OLD, "v2"): 0.4, (PLAIN, "v2", "v2"): 0.8,
    (OURS, OLD, OLD): 0.75, (OURS, OLD, "v2"): 0.7,
}  # fmt: skip


def score(arm, trained_on, scored_on, suite, right, *, seed=42, data_seed=None, **more) -> Score:
    key = repr((arm, trained_on, scored_on, suite, seed, data_seed))
    return Score(
        key, "tiny", more.pop("method", "LoRA"), asdict(arm), seed, data_seed, trained_on,
        scored_on, suite, right, **more,
    )  # fmt: skip


def answers(share: float, items: int) -> str:
    return "".join("1" if draw < share else "0" for draw in GENERATOR.random(items))


def example() -> tuple[Score, ...]:
    runs = [(42, None), (1, None), (42, 1), (42, 2), (42, 3)]
    seconds = {OLD: 3600.0, "v2": 7200.0}
    found = [
        score(
            arm, trained_on, scored_on, suite, answers(share, items), seed=seed,
            data_seed=data_seed, gpu_seconds=seconds[trained_on],
        )
        for (arm, trained_on, scored_on), share in SHARES.items()
        for suite, items in SUITES.items()
        for seed, data_seed in runs
    ]  # fmt: skip
    bare = [
        score(PLAIN, base, base, suite, "0" * items, seed=0, method=BARE)
        for base in (OLD, "v2")
        for suite, items in SUITES.items()
    ]
    return tuple(found + bare)


SCORES = Scores.of(EXPERIMENT, "tiny", SUITES, example())
FOUND = Comparison(SCORES, "LoRA", "v2")


def mean(arm, trained_on, scored_on, runs):
    """The mean over suites and runs of the points, from the lines themselves."""
    points = [
        s.points
        for s in SCORES.scores
        if (s.method, s.arm, s.trained_on, s.scored_on) == ("LoRA", arm, trained_on, scored_on)
        and (s.seed, s.data_seed) in runs
    ]
    return sum(points) / len(points)


def test_a_difference_is_that_of_the_means_over_suites_and_seeds():
    runs = [(42, None), (1, None)]
    found = FOUND.difference(FOUND.carried(OURS), FOUND.direct)
    expected = mean(OURS, OLD, "v2", runs) - mean(PLAIN, OLD, "v2", runs)
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high and found.excludes_zero


def test_the_share_of_the_gap():
    runs = [(42, None), (1, None)]
    direct, tuned = mean(PLAIN, OLD, "v2", runs), mean(PLAIN, "v2", "v2", runs)
    expected = 100 * (mean(OURS, OLD, "v2", runs) - direct) / (tuned - direct)
    found = FOUND.share(OURS)
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high


def test_there_is_no_share_without_a_gap():
    equal = tuple(
        replace(s, right="10" * (len(s.right) // 2)) if s.right else s for s in SCORES.scores
    )
    found = Comparison(Scores.of(EXPERIMENT, "tiny", SUITES, equal), "LoRA", "v2")
    assert found.share(OURS) is None


@pytest.mark.parametrize("suite", ["sums", "more", None])
def test_p_values_compare_the_orders_of_rows(suite):
    def points(arm):
        of = [s for s in SCORES.scores if (s.arm, s.trained_on, s.scored_on) == (arm, OLD, "v2")]
        suites = SUITES if suite is None else [suite]
        return [
            np.mean([s.points for s in of if s.data_seed == order and s.suite in suites])
            for order in (1, 2, 3)
        ]

    assert FOUND.p_value(OURS, suite) == pytest.approx(ttest_rel(points(OURS), points(PLAIN))[1])


def test_a_missing_run_leaves_a_cell_empty():
    missing = tuple(s for s in SCORES.scores if (s.seed, s.suite) != (1, "more"))
    found = Comparison(Scores.of(EXPERIMENT, "tiny", SUITES, missing), "LoRA", "v2")
    assert found.scores.average(found.direct) is None
    assert found.difference(found.carried(OURS), found.direct) is None
    assert found.scores.points(found.direct, "sums") is not None


def test_hours_are_means_over_trainings():
    found = tables.hours(SCORES, "LoRA")
    assert (found.once, found.plain, found.again, found.retuned) == (1, 1, 2, 3)
    priced = tables.hours_table(SCORES, replace(EXPERIMENT.cost, price_per_gpu_hour=2.0))
    assert "| LoRA | Trans-PEFT, tuned once | 1 | 1,000 | 2,000.00 |" in priced
    assert "| LoRA | tuned again for each update | 3 | 3,000 | 6,000.00 |" in priced


def test_the_main_table_has_every_line_of_the_paper():
    lines = tables.main_table(SCORES, "v2").splitlines()
    titles = [line.split(" | ")[1] for line in lines[2:]]
    assert titles == [
        "on old", "on v2", "Fine-tune(new)", "Fine-tune(old)", "Direct Transfer", "Trans-PEFT",
        "Trans-PEFT on old",
    ]  # fmt: skip
    assert len({line.count("|") for line in lines}) == 1


def test_the_seed_table_has_each_seed():
    (line,) = [
        line
        for line in tables.seed_table(SCORES, "v2").splitlines()
        if line.startswith("| sums | LoRA | Direct Transfer |")
    ]
    wanted = ("LoRA", PLAIN, OLD, "v2", "sums", None)
    of = [
        s
        for s in SCORES.scores
        if (s.method, s.arm, s.trained_on, s.scored_on, s.suite, s.data_seed) == wanted
    ]
    points = [s.points for s in of]
    shown = [f"{value:.1f}" for value in (*points, sum(points) / 2)]
    assert line.split(" | ")[3:] == [*shown[:-1], f"{shown[-1]} |"]


PREPARED = SimpleNamespace(  # what `selected` needs
    experiment=read_experiment(Path(__file__).with_name("tables.yaml")),
    suites=(),
    bases={("tiny", OLD): OLD, ("tiny", "v2"): "v2"},
    recipe=lambda planned: SimpleNamespace(sha256=repr(planned.perturbation)),
    key=lambda subject, base, suite: f"{subject} {base}",
)


def test_the_candidate_with_the_lowest_loss_on_the_new_base_is_selected():
    low, high = Perturbation(0.1, 0.1), Perturbation(0.3, 0.1)
    losses = {(low, OLD): 1.0, (low, "v2"): 3.0, (high, OLD): 2.0, (high, "v2"): 2.5}
    found = [
        replace(score(arm, OLD, base, HELD_OUT, "", loss=loss), key=f"{arm!r} {base}")
        for (arm, base), loss in losses.items()
    ]
    assert selected(PREPARED, found) == high
    assert selected(PREPARED, found[:-1]) is None
