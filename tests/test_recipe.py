"""A recipe with a value that cannot be trained with is refused before a model is loaded."""

import json
import math
import re
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.data import DataSource, TrainingSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.domain.recipe import (
    OptimizerSettings,
    Perturbation,
    SyntheticPrompts,
    TrainingRecipe,
)
from trans_peft.domain.spec import AdapterSpec
from trans_peft.domain.validation import ValidationSettings
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.specs import to_config

NAN, INF = math.nan, math.inf
NOT_A_PROBABILITY = (-0.1, 1, 1.5, NAN, INF, -INF, "0.1", None, True)
RECIPE = TrainingRecipe("a", "f", DataSource("t.jsonl"), (Suite("s", DataSource("s.jsonl")),))


@pytest.mark.parametrize("name", ["masking_p", "dropping_p"])
@pytest.mark.parametrize("value", NOT_A_PROBABILITY)
def test_a_probability_outside_its_range_is_refused(name, value):
    with pytest.raises(InvalidSpecError, match=rf"{name} must lie in \[0, 1\), not {value!r}"):
        Perturbation(**{name: value})


def test_every_problem_of_a_perturbation_is_named_at_once():
    with pytest.raises(
        InvalidSpecError,
        match=r"masking_p must.*dropping_p must.*where must.*indices from 0, found \[-1",
    ):
        Perturbation(NAN, 1.0, where="mlp", spared_layers=(0, -1))


@pytest.mark.parametrize(
    "given", [{"granularity": "element"}, {"where": "both"}, {"spared_layers": (0, 2)}], ids=str
)
def test_settings_of_a_perturbation_without_a_probability_are_refused(given):
    (name,) = given
    with pytest.raises(InvalidSpecError, match=f"{name} is given while .* both 0"):
        Perturbation(**given)
    assert not Perturbation(masking_p=0.1, **given).is_off
    assert not Perturbation(dropping_p=0.1, **given).is_off


def test_a_perturbation_without_arguments_or_with_two_zeros_is_off():
    assert Perturbation().is_off
    assert Perturbation(masking_p=0.0, dropping_p=0.0) == Perturbation()


PERTURBATIONS = {
    "granularity": (("element",), ("layer", None)),
    "where": (("attention", "both"), ("mlp", None)),
    "spared_layers": (((0, 3),), ((-1,), (1.5,), ("0",), (True,), (99, 99))),
}
OPTIMIZERS = {
    "learning_rate": ((1e-12, 1, 10), (0, -1e-3, 10.5, 1e37, 1e300, INF, NAN, "1e-3", True, None)),
    "steps": ((1, 10_000), (0, -1, 10**15, 1.5, "3", True)),
    "batch_size": ((1, 10_000), (0, -1, 10**12, 1.5, True)),
    "gradient_accumulation": ((1, 10_000), (0, -1, 10**12, 1.5)),
    "warmup_steps": ((0, 99), (-1, 100, 10**6, 0.1)),
    "weight_decay": (
        (0, 0.1, 3333),
        (-0.1, -1e38, 3334, 1e38, 10**400, INF, NAN, "0", None),
    ),
    "max_grad_norm": ((0, 1.0, 1e9), (-1.0, INF, NAN, None)),
    "max_length": ((2, 10**6), (0, 1, -1, 10**9, 1.5)),
    "warmup_ratio": ((0, 0.03, 0.99), (-0.1, 1, NAN, "0.1", True, None)),
    "schedule": (("cosine", "linear", "constant"), ("cosinus", None)),
    "name": (("adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit"), ("sgd", "", None)),
    "betas": (((0, 0), (0.9, 0.95)), ((0.9,), (0.9, 1), (-0.1, 0.9), ("0.9", 0.9), 0.9, None)),
    "epsilon": ((1e-12, 1), (0, -1e-8, 2, NAN, "1e-8", None)),
    "loraplus_lr_ratio": ((1, 16.0), (0, 0.5, -1, 1000, INF, "16", None)),
    "neftune_alpha": ((0, 5, 15.0), (-1, 1000, NAN, True, None)),
}
EPOCHS = ((1, 3, 0.5, 10_000), (0, -1, 10_001, NAN, "3", True))
RECIPES = {
    "dtype": (("float32", "bfloat16", "nf4"), ("float16", "int8", None)),
    "seed": ((0, 2**31 - 1), (-1, 2**31, 2**40, 1.5, "1")),
    "processes": ((1, 64), (0, -1, 10**6, 1.5)),
    "checkpoint_steps": ((1, 10**6), (0, -1, 10**9, 0.5)),
    "objective": (("sft", "dpo"), ("kto", "", None)),
}
PREFERENCES = {"dpo_beta": ((0.1, 0.01, 1.0, 100), (0, -0.1, 101, NAN, INF, "0.1", True, None))}
BASES = (
    (Perturbation(masking_p=0.1), PERTURBATIONS),
    (replace(RECIPE, objective="dpo"), PREFERENCES),
    (OptimizerSettings(), OPTIMIZERS),
    (RECIPE, RECIPES),
)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [(base, name, value) for base, table in BASES for name in table for value in table[name][0]],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_in_range_is_accepted_and_has_a_hash(settings, field, value):
    changed = replace(settings, **{field: value})
    recipe = changed if isinstance(changed, TrainingRecipe) else None
    if isinstance(changed, OptimizerSettings):
        recipe = replace(RECIPE, optimizer=changed)
    if isinstance(changed, Perturbation):
        recipe = replace(RECIPE, perturbation=changed)
    assert len(recipe.sha256) == 64


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [(base, name, value) for base, table in BASES for name in table for value in table[name][1]],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_out_of_range_is_refused_by_its_field(settings, field, value):
    with pytest.raises(InvalidSpecError, match=rf"(?s){field} must .*(not|found)"):
        replace(settings, **{field: value})


def test_every_field_of_the_optimizer_has_a_range():
    assert {field.name for field in fields(OptimizerSettings)} == {*OPTIMIZERS, "epochs"}


@pytest.mark.parametrize("epochs", EPOCHS[0])
def test_epochs_are_accepted_instead_of_steps(epochs):
    settings = OptimizerSettings(epochs=epochs)
    assert settings.steps is None
    assert settings == OptimizerSettings(epochs=float(epochs))
    same = [replace(RECIPE, optimizer=OptimizerSettings(epochs=e)) for e in (epochs, float(epochs))]
    assert same[0].sha256 == same[1].sha256


@pytest.mark.parametrize("epochs", EPOCHS[1])
def test_epochs_out_of_range_are_refused(epochs):
    with pytest.raises(InvalidSpecError, match="epochs must be above 0 and at most 10,000, not"):
        OptimizerSettings(epochs=epochs)


@pytest.mark.parametrize(
    ("first", "second"),
    [({"steps": 100}, {"epochs": 3}), ({"warmup_steps": 3}, {"warmup_ratio": 0.1})],
)
def test_two_fields_for_one_setting_are_refused(first, second):
    (one,), (other,) = first, second
    with pytest.raises(InvalidSpecError, match=f"{one}=.* and {other}=.* are both given"):
        OptimizerSettings(**first, **second)


@pytest.mark.parametrize(
    ("settings", "rows", "processes", "steps", "warmup_steps"),
    [
        ({"epochs": 3, "batch_size": 16}, 1000, 1, 188, 0),  # 187.5 steps
        ({"epochs": 3, "batch_size": 16, "warmup_ratio": 0.03}, 3000, 1, 563, 17),  # the paper's
        ({"epochs": 1, "batch_size": 4, "gradient_accumulation": 2}, 64, 2, 4, 0),
        ({"epochs": 0.5, "batch_size": 2}, 10, 1, 3, 0),
        ({"epochs": 1.1, "batch_size": 10}, 100, 1, 11, 0),
        ({"epochs": 1.1, "batch_size": 10}, 101, 1, 12, 0),  # 11.11 steps
        ({"epochs": 10, "batch_size": 3}, 3 * 0.1, 1, 1, 0),
        ({"epochs": 1.001, "batch_size": 1000}, 10_000_000, 1, 10_010, 0),
        ({"epochs": 1.000001, "batch_size": 10}, 10_000_000, 1, 1_000_001, 0),
        ({"epochs": 1, "batch_size": 100}, 10_000_001, 1, 100_001, 0),  # 1 row more
        ({"epochs": 0.001, "batch_size": 16}, 3, 1, 1, 0),
        ({"steps": 10, "warmup_ratio": 0.99}, 7, 1, 10, 9),
        ({"steps": 10, "warmup_steps": 2}, 7, 1, 10, 2),
    ],
)
def test_epochs_become_steps(settings, rows, processes, steps, warmup_steps):
    found = OptimizerSettings(**settings).for_rows(rows, processes)
    assert (found.steps, found.epochs) == (steps, None)
    assert (found.warmup_steps, found.warmup_ratio) == (warmup_steps, 0)


@given(
    tenths=st.integers(1, 100_000),
    rows=st.integers(1, 1_000_000),
    weight=st.integers(1, 10_000),
    batch_size=st.integers(1, 4096),
)
def test_steps_are_those_of_the_decimal_numbers(tenths, rows, weight, batch_size):
    exact = math.ceil(Fraction(tenths * rows * weight, 1000 * batch_size))
    assume(exact * batch_size <= 100_000_000 and exact <= 10_000_000)
    settings = OptimizerSettings(epochs=tenths / 10, batch_size=batch_size)
    assert settings.for_rows(rows * (weight / 100), 1).steps == exact


def test_epochs_that_are_shorter_than_the_warm_up_or_too_long_are_refused():
    with pytest.raises(InvalidSpecError, match="warmup_steps must be less than steps=3, not 3"):
        OptimizerSettings(epochs=1, batch_size=4, warmup_steps=3).for_rows(12, 1)
    with pytest.raises(InvalidSpecError, match="must be at most 100,000,000 rows"):
        OptimizerSettings(epochs=10_000, batch_size=1000).for_rows(20_000, 1)


def test_a_run_states_its_length():
    assert OptimizerSettings().duration == "100 steps of 16 rows"
    assert OptimizerSettings(epochs=3).duration == "3 epochs in steps of 16 rows"


def test_privacy_is_part_of_the_hash_and_its_absence_changes_no_stored_hash():
    """The first hash was computed before the field existed."""
    prompts = SyntheticPrompts(steps=60)
    values = [None, *(PrivacySettings(8.0, **f) for f in ({}, {"delta": 1e-6}, {"batch_size": 64}))]
    hashes = [
        replace(RECIPE, synthetic_prompts=replace(prompts, privacy=value)).sha256
        for value in values
    ]
    assert hashes[0] == "8a4512855eacb98a23ba8911fddcfb22c9c2908299a3d1566731b0d58c960e7b"
    assert len({*hashes}) == 4
    whole = replace(prompts, privacy=PrivacySettings(8))
    assert replace(RECIPE, synthetic_prompts=whole).sha256 == hashes[1]
    read = TypeAdapter(SyntheticPrompts).validate_python({"steps": 60, "privacy": {"epsilon": 8}})
    assert read == whole


def test_privacy_needs_held_out_rows_that_do_not_depend_on_the_others():
    private = SyntheticPrompts(steps=60, privacy=PrivacySettings(8.0))
    held_out = ValidationSettings(data=DataSource("v.jsonl"))
    assert replace(RECIPE, synthetic_prompts=private, validation=held_out)
    with pytest.raises(InvalidSpecError, match=r"needs validation\.data instead"):
        replace(RECIPE, synthetic_prompts=private, validation=ValidationSettings(share=0.1))


def test_fields_that_were_added_change_no_stored_hash():
    """These hashes were computed before `epochs` and all fields after it existed."""
    assert RECIPE.sha256 == "83179e35258ae87d2e4430f280cbe3795177a6abe386c292e24ba426e0c20024"
    settings = OptimizerSettings(1e-3, 7, warmup_steps=2)
    assert replace(RECIPE, optimizer=settings).sha256 == (
        "f7f9d27f4f4344928a3204121e9410c9ca2fa1fb5364cbb51e5bc2614be933cb"
    )


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS, "epochs"} - {"steps"}))
def test_every_field_of_the_optimizer_is_part_of_the_hash(name):
    accepted = EPOCHS[0] if name == "epochs" else OPTIMIZERS[name][0]
    hashes = {
        replace(RECIPE, optimizer=OptimizerSettings(**{name: value})).sha256 for value in accepted
    }
    assert len(hashes) == len(accepted)


def test_the_rate_of_lora_plus_needs_lora():
    faster = replace(RECIPE, optimizer=OptimizerSettings(loraplus_lr_ratio=16))
    with pytest.raises(InvalidSpecError, match="loraplus_lr_ratio needs an adapter of the type"):
        replace(faster, spec=AdapterSpec("LOHA"))


NOT_WITH_DPO = {
    "packing": {"packing": True},
    "train_on_prompt": {"train_on_prompt": True},
    "a template": {"data": DataSource("t.jsonl", template="gsm8k")},
    "validation": {"validation": ValidationSettings(share=0.1)},
    "granularity element": {"perturbation": Perturbation(masking_p=0.1, granularity="element")},
    "compute.memory_gib": {"compute": ComputeSettings(memory_gib=8)},
}


def test_everything_that_preferences_do_not_have_is_named_at_once():
    given = {name: value for one in NOT_WITH_DPO.values() for name, value in one.items()}
    with pytest.raises(InvalidSpecError, match=".*".join(NOT_WITH_DPO)):
        replace(RECIPE, objective="dpo", **given)
    for one in NOT_WITH_DPO.values():
        replace(RECIPE, **one)


def test_the_objective_is_part_of_the_hash_and_beta_belongs_to_dpo():
    dpo = replace(RECIPE, objective="dpo")
    assert len({r.sha256 for r in (RECIPE, dpo, replace(dpo, dpo_beta=0.5))}) == 3
    assert replace(dpo, dpo_beta=0.5).for_answers() == RECIPE
    with pytest.raises(InvalidSpecError, match=r"dpo_beta=0\.5 needs objective: dpo"):
        replace(RECIPE, dpo_beta=0.5)


@pytest.mark.parametrize(
    ("ratio", "largest"), [(1, 99.9), (1.0, 99.9), (16, 6.24), (16.0, 6.24), (999, 0.1)]
)
def test_the_decay_is_below_1_over_the_highest_rate(ratio, largest):
    settings = {"learning_rate": 1e-2, "loraplus_lr_ratio": ratio}
    assert OptimizerSettings(**settings, weight_decay=largest).weight_decay == largest
    rate = "learning_rate" if ratio == 1 else r"\(learning_rate \* loraplus_lr_ratio\)"
    with pytest.raises(InvalidSpecError, match=rf"weight_decay must be less than 1 / {rate} = "):
        OptimizerSettings(**settings, weight_decay=100.1 / ratio)


def test_a_weight_needs_a_second_source():
    weighted = TrainingSource("t.jsonl", weight=5.0)
    with pytest.raises(InvalidSpecError, match=r"one source, with the weight 5.0.* add a source"):
        replace(RECIPE, data=(weighted,))
    both = replace(RECIPE, data=(weighted, TrainingSource("u.jsonl")))
    assert [source.weight for source in both.sources] == [5, 1]


@pytest.mark.parametrize(
    ("steps", "every_steps", "stop_after", "first_stop"),
    [
        (100, 50, 1, 100),  # the last step
        (101, 50, 1, None),
        (100, 33, 2, None),  # losses after steps 33, 66, 99 and 100
        (99, 33, 2, 99),
        (100, 10, 9, 100),
        (100, 10, 8, None),
        (10, 50, 1, 100),
        (10, 50, 0, None),
    ],
)
def test_a_run_that_is_too_short_to_be_stopped_is_refused(
    steps, every_steps, stop_after, first_stop
):
    validation = ValidationSettings(share=0.1, every_steps=every_steps, stop_after=stop_after)
    settings = OptimizerSettings(epochs=steps, batch_size=1)
    recipe = replace(RECIPE, optimizer=settings, validation=validation)  # steps are not known
    if first_stop is None:
        resolved = replace(recipe, optimizer=settings.for_rows(1, 1))
        assert resolved.optimizer.steps == steps
        return
    with pytest.raises(
        InvalidSpecError,
        match=f"cannot stop the run before step {first_stop}, and the run has {steps} steps",
    ):
        replace(recipe, optimizer=settings.for_rows(1, 1))


def test_a_run_on_more_rows_than_its_order_can_hold_is_refused():
    optimizer = OptimizerSettings(steps=10_000, batch_size=1_000, gradient_accumulation=10)
    with pytest.raises(InvalidSpecError, match="must be at most 100,000,000 rows"):
        replace(optimizer, batch_size=1_001)
    with pytest.raises(InvalidSpecError, match="processes must be at most 100,000,000 rows"):
        replace(RECIPE, optimizer=optimizer, processes=2)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


ENDLESS: list = []
ENDLESS.append(ENDLESS)
NOT_JSON = {
    "no type": (3, {}, "peft_type"),
    "lower case": ("lora", {}, "upper case, such as LORA"),
    "no options": ("LORA", None, "not a mapping"),
    "a list": ("LORA", ["r"], "not a mapping"),
    "keys of several types": ("LORA", {1: 2, "zzz": 3}, "the key 1 is not a string"),
    "a nested key": ("LORA", {"rank_pattern": {1: 2}}, "options.rank_pattern: the key 1"),
    "nan": ("LORA", {"lora_dropout": NAN}, "options.lora_dropout: nan is not finite"),
    "infinity": ("LORA", {"alpha_pattern": {"q": INF}}, "options.alpha_pattern.q: inf"),
    "an object": ("LORA", {"r": object()}, "options.r: a value of type object"),
    "bytes": ("LORA", {"r": b"8"}, "options.r: a value of type bytes"),
    "thousands of digits": ("LORA", {"r": 10**5000}, r"options.r: a whole number beyond 2\*\*64"),
    "a mixed set": ("LORA", {"target_modules": {"q", 1}}, "several types"),
    "17 levels": ("LORA", {"r": nested(16)}, "nested more than 16 levels"),
    "3,000 levels": ("LORA", {"r": nested(3000)}, "nested more than 16 levels"),
    "a cycle": ("LORA", {"r": ENDLESS}, "nested more than 16 levels"),
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_options_that_json_cannot_represent_are_refused(case):
    peft_type, options, message = NOT_JSON[case]
    with pytest.raises(InvalidSpecError, match=message) as caught:
        AdapterSpec(peft_type, options)
    assert len(str(caught.value)) < 1000


def test_every_spec_has_a_hash():
    spec = AdapterSpec("LORA", {"target_modules": {"v", "q"}, "r": nested(15), "x": (1, 2.5, None)})
    same = AdapterSpec("LORA", {"target_modules": ["q", "v"], "r": nested(15), "x": [1, 2.5, None]})
    assert replace(RECIPE, spec=spec).sha256 == replace(RECIPE, spec=same).sha256
    assert re.fullmatch("[0-9a-f]{64}", replace(RECIPE, spec=spec).sha256)


def test_the_recipe_of_the_readme_can_be_trained():
    page = (Path(__file__).parents[1] / "README.md").read_text()
    parameters = re.search(r"### Parameters.*?```json\n(.*?)```", page, re.DOTALL)[1]
    recipe = TypeAdapter(TrainingRecipe).validate_python(json.loads(parameters)["recipe"])
    assert recipe.perturbation.masking_p == 0.1
    assert to_config(recipe.spec).r == 16


DATA = {
    "one source": DataSource("t.jsonl"),
    "several": (TrainingSource("t.jsonl", "f00d", weight=2.0), TrainingSource("u", limit=3)),
}


@pytest.mark.parametrize("data", DATA)
def test_a_recipe_is_equal_after_it_was_json(data):
    recipe = replace(
        RECIPE,
        data=DATA[data],
        data_seed=3,
        optimizer=OptimizerSettings(epochs=3, warmup_ratio=0.03, betas=(0.9, 0.95)),
        compute=ComputeSettings(attention="eager", memory_gib=8.0),
        validation=ValidationSettings(DataSource("v.jsonl"), stop_after=2),
    )
    adapter = TypeAdapter(TrainingRecipe)
    again = adapter.validate_json(adapter.dump_json(recipe))
    assert again == recipe
    assert again.sha256 == recipe.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"data": DATA["several"]},
        {"data": (TrainingSource("t.jsonl"),)},
        {"data": (TrainingSource("t.jsonl", limit=3),)},
        {"data_seed": 42},
        {"train_on_prompt": True},
        {"validation": ValidationSettings(share=0.1)},
        {"validation": ValidationSettings(share=0.1, keep="last")},
    ],
    ids=str,
)
def test_data_and_validation_are_part_of_the_hash(change):
    hashes = {replace(RECIPE, **c).sha256 for c in ({}, {"data_seed": 43}, change)}
    assert len(hashes) == 3


def test_the_seed_of_the_order_has_the_range_of_the_seed():
    with pytest.raises(InvalidSpecError, match="data_seed must be a whole number from 0"):
        replace(RECIPE, data_seed=-1)
