"""Experiment files: what is refused, the trainings that follow, and the files of the paper."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from trans_peft.cli import main
from trans_peft.cli.files import read_experiment
from trans_peft.domain.experiment import OLD, PLAIN, Experiment
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import InvalidSpecError
from trans_peft.experiment.deviations import deviations
from trans_peft.experiment.prepare import check_settings, recipe_of

HERE = Path(__file__).parent
PAPER = sorted((HERE.parents[1] / "examples" / "experiments").glob("*.yaml"))


@pytest.fixture
def refused(tmp_path):
    def read(name: str, change) -> str:
        value = yaml.safe_load((HERE / f"{name}.yaml").read_text())
        change(value)
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(value))
        with pytest.raises(InvalidSpecError) as caught:
            check_settings(read_experiment(path))
        return str(caught.value)

    return read


def setter(path: str, value: object):
    """Return a function that sets a field by its dotted path."""

    def change(experiment):
        *parents, last = path.split(".")
        for part in parents:
            experiment = experiment[int(part) if part.isdigit() else part]
        experiment[last] = value

    return change


UNKNOWN = "there is no such field; valid fields, the most similar first:"
WHERE = {"field": "where", "values": ["ffn", "all"], "family": "tiny", "method": "LoRA",
         "at": {"masking_p": 0.1}}  # fmt: skip
NOWHERE = {"field": "masking_p", "values": [0.1, 0.2], "family": "x", "method": "y"}
SUITE = {"name": "sums", "data": {"uri": "rows.jsonl"}}
OTHER = {"tiny": {"old": "a", "new": {"b": "b"}}}
SMALL = {"tiny": {"old": "a", "new": {"v2": "b", "v3": "c"}, "suites": [SUITE]}}
JUDGED = SUITE | {
    "scoring": "judge",
    "judge": {"uri": "v1", "prompt": "{prompt}{answer}", "choices": ["y", "n"], "marks": [1, 0],
              "labeled": {"uri": "labeled.jsonl"}},
}  # fmt: skip
CHANGES = [
    ("seed", 1, f"seed: {UNKNOWN} seeds"),
    ("families.tiny.newer", {}, f"families.tiny.newer: {UNKNOWN} new"),
    ("methods.LoRA.option", {}, f"methods.LoRA.option: {UNKNOWN} options"),
    ("arms.Trans-PEFT.masking", 1, f"arms.Trans-PEFT.masking: {UNKNOWN} masking_p"),
    ("training.optimizer.step", 1, f"training.optimizer.step: {UNKNOWN} steps"),
    ("training", {}, "training.data is missing, and so is families.tiny.data"),
    ("seeds", [1, 1], "seeds must be different whole numbers"),
    (
        "seeds",
        [1, -1],
        "seeds must be different whole numbers from 0 to 2,147,483,647, not [1, -1]",
    ),
    ("data_seeds", [2**31], "data_seeds must be different whole numbers from 0 to 2,147,483,647"),
    ("training.processes", 0, "processes must be a whole number from 1"),
    ("methods.bare", {}, "no method may have the name 'bare'"),
    ("cost.currency", "<b>|", "currency must be letters or a sign, as USD or €: '<b>|'"),
    ("seeds", [0], "selection.seed=0 is also a seed of the tables"),
    ("selection.arm", "x", "selection.arm 'x' is not in arms"),
    ("selection.new", "v9", "selection.new 'v9' is not in families.tiny"),
    ("arms.other", {}, "arms.other perturbs nothing"),
    ("families.tiny.new.old", "v2", "must not have the label 'old'"),
    ("suites", [], "suites must name at least one suite"),
    ("sweeps", [WHERE], "where must be one of ffn, attention, both"),
    ("sweeps", [NOWHERE], "sweeps.0.family 'x' is not in families"),
    ("suites.0.scoring", "bleu", "the results of sums are degrees"),
    ("suites", [JUDGED], "a judge model marks the answers of sums"),
    ("suites", [SUITE, SUITE], "suites share a name: ['sums', 'sums']"),
    ("quick", {"families": OTHER}, "quick.families.tiny must replace a family"),
    ("quick", {"families": SMALL}, "quick.families.tiny has the rows and suites of the family"),
    ("longer", [4], "longer must be ascending numbers of steps above 4, not [4]"),
    ("longer", [16, 8], "longer must be ascending"),
    ("families.tiny.suites", [SUITE, SUITE], "suites share a name: ['sums', 'sums']"),
    ("families.tiny.suites", [SUITE | {"stops": 1}], f"families.tiny.suites.0.stops: {UNKNOWN}"),
]


@pytest.mark.parametrize(("path", "value", "message"), CHANGES)
def test_invalid_files_are_refused_with_the_place(refused, path, value, message):
    assert message in refused("tables", setter(path, value))


def test_a_candidate_of_the_selection_is_not_plain(refused):
    def change(experiment):
        experiment["selection"] |= {"masking_p": [0.0, 0.1], "dropping_p": [0.0]}

    assert "both 0 in a candidate, which is plain" in refused("tables", change)


def test_longer_trainings_need_steps(refused):
    def change(experiment):
        experiment["training"]["optimizer"] = {"epochs": 1.0}
        experiment["longer"] = [8]

    assert "longer needs training.optimizer.steps, not epochs" in refused("tables", change)


@pytest.fixture(params=["tables", "repeats"])
def example(request) -> Experiment:
    return read_experiment(HERE / f"{request.param}.yaml")


def test_each_training_is_planned_once_and_trans_peft_is_scored_on_the_old_base(example):
    planned = example.trainings()
    recipes = [recipe_of(example, each, each.base).sha256 for each in planned]
    assert len(set(recipes)) == len(recipes)
    for each in planned:
        assert each.scored_on == (
            example.families["tiny"].labels if each.base == OLD else (each.base,)
        )


def test_every_arm_has_every_seed_on_equal_terms(example):
    planned = example.trainings()
    for method in example.methods:
        for seed in example.seeds:
            of = [p for p in planned if (p.method, p.seed, p.data_seed) == (method, seed, None)]
            arms = {p.perturbation for p in of if p.base == OLD}
            assert arms >= {PLAIN, *example.arms.values()}
            assert {p.base for p in of if p.perturbation == PLAIN} == {
                *example.families["tiny"].labels
            }


def test_orders_of_rows_keep_the_first_seed():
    example = read_experiment(HERE / "repeats.yaml")
    orders = {(p.seed, p.data_seed) for p in example.trainings() if p.data_seed is not None}
    assert orders == {(42, 1), (42, 2)}


def test_longer_trainings_are_those_on_the_old_base_with_a_longer_warm_up():
    example = read_experiment(HERE / "repeats.yaml")
    optimizer = replace(example.training.optimizer, warmup_steps=2)
    example = replace(
        example, training=replace(example.training, optimizer=optimizer), longer=(6, 8)
    )
    longer = [p for p in example.trainings() if p.steps is not None]
    arms = {PLAIN, *example.arms.values()}
    assert {(p.perturbation, p.seed, p.steps) for p in longer} == {
        (arm, seed, steps) for arm in arms for seed in example.seeds for steps in (6, 8)
    }
    assert {p.base for p in longer} == {OLD}
    warm_ups = {p.steps: recipe_of(example, p, "b").optimizer.warmup_steps for p in longer}
    assert warm_ups == {6: 3, 8: 4}
    assert example.as_quick().longer == (40, 60)


@pytest.fixture
def two_tasks(tmp_path) -> Experiment:
    """Two families with the same bases, one with its own rows and suites, some of them named."""
    value = yaml.safe_load((HERE / "repeats.yaml").read_text())
    other = {"data": [{"uri": "a.jsonl"}, {"uri": "b.jsonl"}], "suites": ["gsm8k", SUITE]}
    value["families"]["other"] = value["families"]["tiny"] | other
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(value))
    return read_experiment(path)


def test_a_family_can_have_its_own_rows_and_suites(two_tasks, tmp_path):
    files = {
        p.family: {source.uri for source in recipe_of(two_tasks, p, "b").sources}
        for p in two_tasks.trainings()
    }
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "a", "b", "rows")}
    assert files == {"tiny": {paths["train"]}, "other": {paths["a"], paths["b"]}}
    assert [s.name for s in two_tasks.suites_of("tiny")] == ["sums"]
    assert [s.name for s in two_tasks.suites_of("other")] == ["gsm8k", "sums"]
    assert two_tasks.suites_of("other")[1].data.uri == paths["rows"]
    assert len(two_tasks.all_suites) == 3
    quick = two_tasks.as_quick()
    assert [s.limit for s in quick.sources_of("other")] == [100, 100]
    assert {s.limit for s in quick.suites_of("other")} == {50}


def test_the_papers_settings_are_compared_with_those_of_families_that_have_its_suites(two_tasks):
    found = [one for one in deviations(two_tasks) if one.startswith("Training rows")]
    assert len(found) == 1 and "a.jsonl" in found[0] and "train.jsonl" not in found[0]


def test_the_order_of_the_first_seed_is_not_trained_again():
    example = replace(read_experiment(HERE / "repeats.yaml"), seeds=(1, 42), data_seeds=(1, 2))
    assert example.orders == ((1, None), (1, 2))
    assert {p.data_seed for p in example.trainings()} == {None, 2}


def test_a_selection_holds_rows_out_and_its_seed_is_not_reported():
    example = read_experiment(HERE / "tables.yaml")
    for planned in example.selection_trainings():
        recipe = recipe_of(example, planned, "b")
        assert recipe.validation.share == 0.1 and recipe.seed not in example.seeds
    chosen = example.with_rates(Perturbation(0.3, 0.1))
    assert chosen.selection_trainings() == ()
    assert all(recipe_of(chosen, p, "b").validation is None for p in chosen.trainings())


def test_a_new_suite_repeats_no_training(example):
    more = replace(example, suites=(*example.suites, replace(example.suites[0], name="new")))
    for planned, again in zip(example.trainings(), more.trainings(), strict=True):
        assert recipe_of(example, planned, "b") == recipe_of(more, again, "b")


def test_the_quick_profile_limits_rows_items_and_steps(example):
    quick = example.as_quick()
    assert sum(source.limit for source in quick.sources_of("tiny")) == example.quick.rows
    assert {suite.limit for suite in quick.suites} == {50}
    assert quick.training.optimizer.steps == 20


# The files of the paper


def test_there_is_a_file_for_each_table_of_the_paper():
    assert [path.stem for path in PAPER] == ["code", "commonsense", "math", "seeds"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_files_of_the_paper_are_planned(path, tmp_path, capsys):
    options = ["--out", tmp_path / "out", "--state", tmp_path / "state", "--dry-run"]
    assert main(["experiment", str(path), *map(str, options)]) == 0
    text = capsys.readouterr().out
    example = read_experiment(path)
    assert text.count("unknown  ") == len(example.trainings()) + len(example.selection_trainings())
    assert "is not in the hub's cache" in text and "differences from the paper:" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_files_of_the_paper_have_its_settings(path):
    example = read_experiment(path)
    found = deviations(example)
    stated = ("Rows of a step", "Length", "Learning rate", "Schedule", "Rank", "Training rows",
              "Dtype", "Loss")  # fmt: skip
    assert [one for one in found if one.startswith(stated)] == []


def test_commonsense_adapters_train_on_prompts_as_well():
    of = {path.stem: read_experiment(path) for path in PAPER}
    with_prompt = {
        name: {recipe_of(example, p, "b").train_on_prompt for p in example.trainings()}
        for name, example in of.items()
    }
    assert with_prompt == {"code": {False}, "commonsense": {True}, "math": {False}, "seeds": {False}}  # noqa: E501  # fmt: skip
    without = replace(of["commonsense"].training, train_on_prompt=False)
    found = deviations(replace(of["commonsense"], training=without))
    assert [one for one in found if one.startswith("Loss: on answers;")]


def test_the_files_of_the_paper_have_its_pairs_of_bases():
    pairs = {
        (family.old.rpartition("/")[2], uri.rpartition("/")[2])
        for path in PAPER
        for family in read_experiment(path).families.values()
        for uri in family.new.values()
    }
    assert pairs == {
        ("Qwen2-7B", "Qwen2.5-7B"),
        ("internlm2-7b", "internlm2_5-7b"),
        ("deepseek-llm-7b-base", "deepseek-math-7b-base"),
        ("deepseek-llm-7b-base", "deepseek-coder-7b-base-v1.5"),
    }


def test_differences_are_named():
    example = read_experiment(HERE / "tables.yaml")
    found = " ".join(deviations(example))
    for words in ("Rows of a step: 8; the paper's: 16", "Length: 4 steps", "no biases", "eq. 4"):
        assert words in found
    element = replace(example, arms={"a": Perturbation(0.1, granularity="element")}, selection=None)
    assert "eq. 4" not in " ".join(deviations(element))
