"""The experiment files of the study, and its page, which is made from the stored scores."""

import json
from dataclasses import replace

import pytest

from study.__main__ import PAGE, page_with, pictures
from study.pages import with_blocks
from study.plan import CANDIDATES, STEPS, STUDY, TASKS, UPDATES, V1, PlannedTraining, results, suite
from study.plan import scores as stored
from trans_peft.domain.evaluation import BARE
from trans_peft.domain.experiment import OLD, PLAIN
from trans_peft.domain.recipe import OptimizerSettings
from trans_peft.experiment.prepare import recipe_of


def test_the_page_in_the_docs_equals_the_stored_scores():
    written = PAGE.read_text()
    assert page_with(written) == written
    assert all(picture.is_file() for task in TASKS for picture in pictures(task).values())


def table_of(task: str, update: str) -> dict[tuple[str, str], list[str]]:
    """Return the cells of a table of the page by arm and length."""
    (section,) = [
        part
        for part in PAGE.read_text().partition("<!-- end comparisons")[0].split("\n### ")
        if part.startswith(f"{task}, update `{update}`")
    ]
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines())
    return {(row[1], row[2]): row[3:] for row in rows if len(row) > 3 and row[0] == "LoRA"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("update", UPDATES)
def test_the_means_on_the_page_are_those_of_the_lines(task, update):
    """Computed from the JSON lines, without the library."""
    text = (results(STUDY) / "scores.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    spared = [0, 2, 11, 28, 29]
    arms = {"Direct Transfer": (0.0, 0.0, []), "uniform": (0.1, 0.1, []), "spared": (0.1, 0.0, spared)}  # noqa: E501  # fmt: skip
    fields = ("masking_p", "dropping_p", "spared_layers")
    table = table_of(task, update)
    for steps in STEPS:
        for name, arm in arms.items():
            for column, base in enumerate((OLD, update)):
                points = {
                    line["seed"]: 100 * line["right"].count("1") / len(line["right"])
                    for line in lines
                    if line["method"] == "LoRA"
                    and (line["family"], line["scored_on"]) == (task, base)
                    and (line["trained_on"], line["steps"] or 120) == (OLD, steps)
                    and tuple(line["perturbation"][field] for field in fields) == arm
                }  # fmt: skip
                shown = table[name, f"{steps} steps"][column]
                assert set(points) == ({1, 2, 3} if shown else set())
                assert not shown or shown == f"{sum(points.values()) / 3:.1f}"


def test_only_the_blocks_of_a_page_are_replaced():
    page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    made = with_blocks(page, {"x": "new"})
    assert made == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb"
    with pytest.raises(ValueError, match="no block 'y'"):
        with_blocks(page, {"y": "new"})


def test_the_settings_were_chosen_with_another_seed_on_one_pair():
    assert not set(CANDIDATES.seeds) & set(STUDY.seeds)
    assert STUDY.arms["spared"] in CANDIDATES.arms.values()
    assert {score.family for score in stored(CANDIDATES)} == {"exceptions"}
    assert {score.scored_on for score in stored(CANDIDATES)} == {OLD, "all"}
    for field in ("methods", "training"):
        assert getattr(CANDIDATES, field) == getattr(STUDY, field)
    assert CANDIDATES.suites_of("exceptions") == STUDY.suites_of("exceptions")
    assert CANDIDATES.data_of("exceptions") == STUDY.data_of("exceptions")


def test_every_stored_score_is_of_a_planned_training_or_a_bare_base():
    for experiment in (STUDY, CANDIDATES):
        planned = {
            (p.family, p.method, p.base, p.perturbation, p.seed, p.steps, label)
            for p in experiment.trainings()
            for label in p.scored_on
        }
        bare = {
            (family, BARE, label, PLAIN, 0, None, label)
            for family, bases in experiment.families.items()
            for label in bases.labels
        }
        found = [
            (s.family, s.method, s.trained_on, s.arm, s.seed, s.steps, s.scored_on)
            for s in stored(experiment)
        ]
        assert len(set(found)) == len(found) and set(found) <= planned | bare


@pytest.mark.parametrize("steps", STEPS)
def test_adapters_of_the_recovery_tables_are_trained_as_those_of_the_study(steps):
    arm = STUDY.arms["spared"]
    recipe = PlannedTraining("exceptions", "spared", arm, steps, 1).recipe(suite("exceptions", "0"))
    assert recipe.optimizer == OptimizerSettings(
        learning_rate=1e-3, steps=steps, batch_size=16, warmup_steps=steps // 12, max_length=128
    )
    (planned,) = [
        p
        for p in STUDY.trainings()
        if (p.family, p.base, p.perturbation, p.seed, p.steps or STEPS[0])
        == ("exceptions", OLD, arm, 1, steps)
    ]
    of_study = recipe_of(STUDY, planned, V1)
    same = {name: getattr(of_study, name) for name in ("adapter", "family", "data", "suites")}
    assert replace(recipe, **same) == of_study
