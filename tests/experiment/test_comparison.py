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

READ = read_experiment(Path(__file__).with_name("repeats.yaml"))
EXPERIMENT = replace(
    READ,
    data_seeds=(1, 2, 3),
    longer=(),
    suites=(*READ.suites, replace(READ.suites[0], name="more")),
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


SCORES = Scores.of(EXPERIMENT, "tiny", example())
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
    found = Comparison(Scores.of(EXPERIMENT, "tiny", equal), "LoRA", "v2")
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
    found = Comparison(Scores.of(EXPERIMENT, "tiny", missing), "LoRA", "v2")
    assert found.scores.average(found.direct) is None
    assert found.difference(found.carried(OURS), found.direct) is None
    assert found.scores.points(found.direct, "sums") is not None


def test_the_change_by_the_update_is_that_between_the_bases():
    runs = [(42, None), (1, None)]
    cells = row_of(tables.change_table(SCORES, "v2"), "Trans-PEFT")
    old, new = (mean(OURS, OLD, base, runs) for base in (OLD, "v2"))
    plain = [mean(PLAIN, OLD, base, runs) for base in (OLD, "v2")]
    assert cells[1:4] == ["4 steps", f"{old:.1f}", f"{new:.1f}"]
    starts = [f"{new - old:+.1f} (", f"{old - plain[0]:+.1f} (", f"{new - plain[1]:+.1f} ("]
    assert [cell[: len(start)] for cell, start in zip(cells[4:7], starts, strict=True)] == starts


def row_of(text: str, title: str) -> list[str]:
    """Return the cells of the row with that arm, without the method."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    (found,) = (cells[1:] for cells in rows if cells[1] == title)
    return found


def longer(old: int, new: int, *, plain: tuple[int, int] = (70, 50)) -> Comparison:
    """Return a comparison with two lengths of training, on 100 items with equal seeds.

    Trans-PEFT has 60 and 56 right answers on the bases after the shorter training.
    """
    experiment = replace(EXPERIMENT, longer=(8,), suites=EXPERIMENT.suites[:1])
    points = {
        (PLAIN, None): plain, (OURS, None): (60, 56), (PLAIN, 8): (90, 60), (OURS, 8): (old, new)
    }  # fmt: skip
    found = [
        score(arm, OLD, base, "sums", "1" * right + "0" * (100 - right), seed=seed, steps=steps)
        for (arm, steps), of in points.items()
        for base, right in zip((OLD, "v2"), of, strict=True)
        for seed in experiment.seeds
    ]
    return Comparison(Scores.of(experiment, "tiny", found), "LoRA", "v2")


def test_the_score_at_an_equal_old_score_is_interpolated():
    # 70 lies half way between 60 and 80, so the new base's score is half way between 56 and 76.
    assert longer(80, 76).at_equal_old_score(OURS).value == pytest.approx(66 - 50)


def test_an_old_score_out_of_reach_is_not_extrapolated():
    for found in (longer(65, 60), longer(80, 76, plain=(59, 50))):
        assert found.at_equal_old_score(OURS) is None
        assert (
            row_of(tables.equal_score_table(found.scores, "v2"), "Trans-PEFT")[1] == "not reached"
        )


def test_without_longer_trainings_the_comparison_at_an_equal_score_is_empty():
    scores = longer(80, 76).scores
    short = replace(scores, scores=tuple(s for s in scores.scores if s.steps is None))
    assert Comparison(short, "LoRA", "v2").at_equal_old_score(OURS) is None
    assert row_of(tables.equal_score_table(short, "v2"), "Trans-PEFT")[1] == ""


def test_arms_are_compared_after_equally_long_training():
    lines = tables.change_table(longer(80, 76).scores, "v2").splitlines()
    (line,) = [line for line in lines if "| Trans-PEFT | 8 steps |" in line]
    assert "| 80.0 | 76.0 | -4.0 (" in line and "| -10.0 (" in line and "| +16.0 (" in line


def test_longer_trainings_do_not_count_as_hours_of_an_adapter():
    more = tuple(replace(s, key=f"{s.key}8", steps=8, gpu_seconds=9e9) for s in SCORES.scores)
    assert tables.hours(replace(SCORES, scores=SCORES.scores + more), "LoRA").once == 1


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
