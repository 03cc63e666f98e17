"""The report on constructed scores whose shares are known."""

from functools import partial

import pytest

from study.distillation_report import figures, page_with, readme_with, recoveries
from study.plan import V1
from study.score_file import Score

ITEMS = 100
COMPENSATED = "plain, compensated 16, unlabeled"
PAGE = "# Page\n\n" + "".join(
    f"<!-- begin {name} -->\n\nold\n\n<!-- end {name} -->\n" for name in ("recoveries", "cost")
)


def score(arm, base, points, *, seed=1, trained_on=V1, seconds=0.0, task="task"):
    right = "1" * points + "0" * (ITEMS - points)
    return Score(f"{arm}{seed}{trained_on}{base}", task, arm, 120, seed, trained_on, base, right,
                 {}, seconds)  # fmt: skip


def pair(seed, compensated, task="task"):
    """Direct transfer falls from 70 to 40; Fine-tune(new) reaches 60 in 200 s."""
    made = partial(score, seed=seed, task=task)
    return [
        made("plain", V1, 70),
        made("spared", V1, 68),
        made("plain", "ffn", 40),
        made("spared", "ffn", 50),
        made("plain", "ffn", 60, trained_on="ffn", seconds=200.0),
        made(COMPENSATED, "ffn", compensated, seconds=50.0),
    ]


def test_the_share_of_the_gap():
    (found,) = recoveries(pair(1, 58) + pair(2, 54))
    assert found.share(COMPENSATED).value == pytest.approx(80)
    assert found.share("spared").value == pytest.approx(50)
    assert found.share("plain, distilled, prompt model") is None
    share = found.share(COMPENSATED)
    assert share.low < 80 < share.high


def test_a_seed_without_fine_tune_new_is_left_out():
    incomplete = [s for s in pair(2, 40) if s.trained_on == V1]
    (found,) = recoveries(pair(1, 58) + incomplete)
    assert found.seeds(COMPENSATED, "plain") == [1]
    assert found.share(COMPENSATED).value == pytest.approx(90)


def test_a_pair_without_fine_tune_new_is_not_reported():
    assert list(recoveries([s for s in pair(1, 58) if s.trained_on == V1])) == []


def test_the_figure_is_that_of_the_worst_pair():
    found = list(recoveries(pair(1, 58) + pair(1, 50, task="other")))
    entries = figures(found)
    assert entries["survive.gap_closed_min"]["value"] == pytest.approx(0.5)
    assert "other, ffn" in entries["survive.gap_closed_min"]["shape"]
    assert entries["survive.old_base_cost_points"]["value"] == 0  # of the plain adapter
    assert entries["survive.old_base_cost_points.trans_peft"]["value"] == pytest.approx(2)
    assert figures([]) == {}


def test_the_table():
    page = page_with(PAGE, list(recoveries(pair(1, 56))))
    assert "### task, update `ffn`: 1 seed, 100 items" in page
    assert "| plain, unchanged | 70.0 | 40.0 | 0 | 0 |" in page
    assert "| plain, compensated at rank 16: unlabeled prompts |  | 56.0 | 80 (" in page
    assert "| Fine-tune(new) |  | 60.0 | 100 | 200 |" in page


def test_a_row_with_fewer_seeds_says_so():
    others = [s for s in pair(2, 0) if s.arm == "plain"]
    page = page_with(PAGE, list(recoveries(pair(1, 56) + others)))
    assert "unlabeled prompts (1 of 2 seeds) |  | 56.0 | 80 (" in page
    assert "| plain, unchanged | 70.0 |" in page


def test_the_costs_are_those_of_pairs_in_which_every_way_was_measured():
    distilled = score("plain, distilled, unlabeled", "ffn", 50, seconds=100.0)
    found = list(recoveries([*pair(1, 58), distilled, *pair(2, 58)]))
    assert page_with(PAGE, found).partition("begin cost")[2].splitlines()[4:7] == [
        "| compensated at rank 16 | 50 | 0.25 (0.25 to 0.25) | 14 |",
        "| distilled | 100 | 0.50 (0.50 to 0.50) | 28 |",
        "| Fine-tune(new) | 200 | 1 | 56 |",
    ]


def test_the_readme_has_the_default_strategy_of_every_pair():
    found = list(recoveries([*pair(1, 58), *pair(2, 54)]))
    assert (
        readme_with(PAGE, found)
        .splitlines()[6]
        .startswith("| task, FFN weights only | 70.0 | 40.0 | **56.0** | 60.0 | 80 (")
    )


def test_both_columns_of_a_row_have_the_same_seeds():
    others = [s for s in pair(2, 0) if s.arm == "plain"]
    page = page_with(
        PAGE, list(recoveries([*pair(1, 56), *others, score("spared", V1, 10, seed=2)]))
    )
    assert "| Trans-PEFT, unchanged (1 of 2 seeds) | 68.0 | 50.0 |" in page
