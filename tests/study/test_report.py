"""The report on constructed results whose figures are known."""

import json
from dataclasses import replace

import pytest

from study.__main__ import FIGURES, PAGE, SCORES
from study.plan import SEEDS, STEPS, V1, arms, planned_trainings
from study.report import Comparison, comparisons, page_with
from study.score_file import Score, ScoreFile

FIRST, SECOND = STEPS
ITEMS = 100
UPDATES = {
    "ffn": {
        "held_out_loss_before": 2.0,
        "held_out_loss_after": 1.5,
        "drift_attention_percent": 0.0,
        "drift_ffn_percent": 1.79,
        "drift_other_percent": 0.0,
    }
}


def score(arm, steps, base, points, *, trained_on=V1):
    """Return one score per seed: the first `points` of 100 items are right."""
    right = "1" * points + "0" * (ITEMS - points)
    return [
        Score(f"{arm}{steps}{seed}{trained_on}{base}", "task", arm, steps, seed, trained_on, base,
              right, {}, 1.0)
        for seed in SEEDS
    ]  # fmt: skip


def example_comparison(new=90, ours_second=(80, 76)):
    return Comparison(
        "task",
        "ffn",
        tuple(
            score("bare", 0, V1, 10) + score("bare", 0, "ffn", 12)
            + score("plain", FIRST, V1, 70) + score("plain", FIRST, "ffn", 50)
            + score("spared", FIRST, V1, 60) + score("spared", FIRST, "ffn", 56)
            + score("spared", SECOND, V1, ours_second[0])
            + score("spared", SECOND, "ffn", ours_second[1])
            + score("plain", FIRST, "ffn", new, trained_on="ffn")
        ),
    )  # fmt: skip


def test_differences_are_between_the_means():
    seen = example_comparison()
    assert seen.lost("plain", FIRST).value == pytest.approx(-20)
    assert seen.lost("spared", FIRST).value == pytest.approx(-4)
    assert seen.gained("spared", FIRST, "ffn").value == pytest.approx(6)
    assert seen.gained("spared", FIRST, V1).value == pytest.approx(-10)


def test_the_score_at_an_equal_old_score_is_interpolated():
    # 70 lies half way between 60 and 80, so the new base's score is half way between 56 and 76.
    assert example_comparison().at_equal_score("spared").value == pytest.approx(66 - 50)


def test_an_old_score_out_of_reach_is_not_extrapolated():
    assert example_comparison(ours_second=(65, 60)).at_equal_score("spared") is None


def test_the_share_of_the_gap_needs_a_gap():
    assert example_comparison().recovered("spared") == pytest.approx(6 / 40)
    assert example_comparison(new=50).recovered("spared") is None
    assert example_comparison(new=40).recovered("spared") is None


def test_an_arm_without_all_seeds_is_excluded():
    scores = example_comparison().scores
    missing = tuple(s for s in scores if (s.arm, s.seed) != ("spared", SEEDS[-1]))
    assert Comparison("task", "ffn", missing).mean("spared", FIRST, "ffn") is None


def test_a_comparison_needs_direct_transfer():
    scores = [s for s in example_comparison().scores if s.arm != "plain"]
    assert not list(comparisons(scores))


def test_only_the_blocks_of_a_page_are_replaced():
    page = "a\n<!-- begin comparisons -->\nold\n<!-- end comparisons -->\nb\n"
    page += "<!-- begin candidates -->\n<!-- end candidates -->\n"
    page += "<!-- begin updates -->\n<!-- end updates -->\nc"
    made = page_with(page, example_comparison().scores, UPDATES)
    assert made.startswith("a\n") and "\nb\n" in made and made.endswith("\nc")
    assert "old\n" not in made
    assert "| Trans-PEFT, layers spared | 120 | 60.0 | 56.0 | -4.0" in made
    assert "| `ffn` | 2.000 -> 1.500 | 0.00 % | 1.79 % | 0.00 % |" in made
    assert page_with(made, example_comparison().scores, UPDATES) == made


def test_the_page_in_the_docs_equals_the_file_of_scores():
    written = PAGE.read_text()
    updates = json.loads(FIGURES.read_text())
    assert page_with(written, tuple(ScoreFile(SCORES)), updates) == written


def test_an_appended_score_is_read_again(tmp_path):
    score_file = ScoreFile(tmp_path / "scores.jsonl")
    for one in example_comparison().scores:
        score_file.append(one)
    again = ScoreFile(tmp_path / "scores.jsonl")
    assert tuple(again) == example_comparison().scores
    assert example_comparison().scores[0].key in again and "another" not in again


def test_a_score_with_another_key_replaces_the_earlier_one(tmp_path):
    score_file = ScoreFile(tmp_path / "scores.jsonl")
    before = example_comparison().scores[0]
    score_file.append(before)
    score_file.append(replace(before, key="another", right="1" * ITEMS))
    assert [score.key for score in ScoreFile(tmp_path / "scores.jsonl")] == ["another"]
    assert before.key not in ScoreFile(tmp_path / "scores.jsonl")


def test_the_plan_trains_every_arm_with_every_seed_on_equal_terms():
    planned = list(planned_trainings((0, 2)))
    assert len(set(planned)) == len(planned)
    for task in ("signatures", "exceptions"):
        for steps in STEPS:
            for arm, perturbation in arms((0, 2)).items():
                seeds = {
                    each.seed
                    for each in planned
                    if (each.task, each.arm, each.steps, each.base) == (task, arm, steps, V1)
                    and each.perturbation == perturbation
                }
                assert seeds >= set(SEEDS)
