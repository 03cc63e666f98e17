"""Check an experiment before its first training, and pin its bases, data and suites."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from trans_peft.data import pin
from trans_peft.data.training_rows import read_training_rows
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.experiment import OLD, Experiment, PlannedTraining, Rows
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.validation import ValidationSettings
from trans_peft.errors import InvalidSpecError, listed
from trans_peft.experiment.disk import check_disk, copies
from trans_peft.lifecycle.base_files import tokenizer_folder
from trans_peft.lifecycle.evaluation import pin_suites
from trans_peft.lifecycle.leakage import count_leakage
from trans_peft.lifecycle.preflight import check_suites
from trans_peft.ports import Platform
from trans_peft.transfer.compatibility import (
    UNRELATED_COSINE,
    tokenizers_may_differ,
    weight_cosine,
)
from trans_peft.transfer.tokenizers import compare_tokenizers
from trans_peft.validation.scoring import RULES

__all__ = [
    "FindBase",
    "Prepared",
    "check_families",
    "check_family",
    "check_layers",
    "check_settings",
    "pinned",
    "prepare",
    "recipe_of",
    "with_leakage",
]

FindBase = Callable[[str], BaseVersion]
"""Returns the verified base version at a place that an experiment names."""

# Weights do not depend on suites: with one in every recipe, a new suite repeats no training.
_ANY_SUITE = Suite("experiment", DataSource("experiment.jsonl", sha256="0" * 64))
_NAME = "experiment"


@dataclass(frozen=True)
class Prepared:
    """A checked experiment with the bases on this machine.

    Attributes:
        experiment: the experiment, with pinned rows and suites.
        bases: the bases by family and label.
        leakage: for each suite, the training rows that have nearly the prompt of an item.
    """

    experiment: Experiment
    bases: Mapping[tuple[str, str], BaseVersion]
    leakage: tuple[SuiteLeakage, ...] = ()

    def base(self, planned: PlannedTraining) -> BaseVersion:
        """Return the base on which an adapter is trained."""
        return self.bases[planned.family, planned.base]

    def recipe(self, planned: PlannedTraining) -> TrainingRecipe:
        """Return the recipe of a training. Its hash covers the base by its fingerprint."""
        fingerprint_sha256 = self.base(planned).fingerprint_sha256
        return recipe_of(self.experiment, planned, f"sha256-{fingerprint_sha256}")

    def key(self, subject: str, base: BaseVersion, scored: Suite | str) -> str:
        """Return the key of a score: of the recipe's hash or `BARE`, on a base and a suite."""
        suite = [scored] if isinstance(scored, str) else [scored.suite_sha256, scored.decoding_sha256]  # noqa: E501  # fmt: skip
        return content_sha256([subject, base.fingerprint_sha256, *suite])


def recipe_of(experiment: Experiment, planned: PlannedTraining, base: str) -> TrainingRecipe:
    """Return the recipe of a planned training on a base version with that label."""
    shared = experiment.training
    validation = None
    if planned.held_out:
        # The loss that selects is computed on the new base, so that the training needs none.
        validation = ValidationSettings(share=planned.held_out, every_steps=10_000_000, keep="last")
    return TrainingRecipe(
        adapter=_NAME,
        family=_NAME,
        data=experiment.data_of(planned.family),
        suites=(_ANY_SUITE,),
        base_version=base,
        spec=experiment.methods[planned.method],
        perturbation=planned.perturbation,
        optimizer=experiment.optimizer(planned.steps),
        dtype=shared.dtype,
        seed=planned.seed,
        data_seed=planned.data_seed,
        processes=shared.processes,
        packing=shared.packing,
        checkpoint_steps=shared.checkpoint_steps,
        validation=validation,
        compute=shared.compute,
        train_on_prompt=shared.train_on_prompt,
    )


def check_settings(experiment: Experiment) -> None:
    """Raise InvalidSpecError for an invalid recipe, or for a suite with degrees. Reads no file."""
    for planned in (*experiment.selection_trainings(), *experiment.trainings()):
        recipe_of(experiment, planned, _NAME)
    problems = [
        f"a judge model marks the answers of {suite.name}, and marks are not right or wrong: leave "
        "this suite out"
        if suite.judge is not None
        else f"the results of {suite.name} are degrees: give it a threshold, and one answer to an "
        "item"
        for suite in experiment.all_suites
        if suite.samples > 1 or _has_degrees(suite)
    ]
    if problems:
        raise InvalidSpecError(
            f"the suites of the experiment {experiment.name!r} cannot be used: "
            + "; ".join(problems),
            expected="suites with right and wrong answers",
        )


def prepare(experiment: Experiment, find: FindBase, platform: Platform) -> Prepared:
    """Return the pinned experiment after all checks that need no model.

    Raises InvalidSpecError if two bases are not versions of one model, StoreError if the disk is
    too small for copies of the bases, and what reading training rows and suites raises.
    """
    prepared = pinned(experiment, find, platform)
    check_families(prepared.bases, platform)
    check_layers(experiment, prepared.bases, platform)
    check_disk(copies(prepared.bases.values(), platform), platform.work_dir)
    asked = {
        (base.fingerprint_sha256, prepared.experiment.suites_of(family)): base
        for (family, _), base in prepared.bases.items()
    }
    for (_, suites), base in asked.items():
        check_suites(base, suites, platform)
    return with_leakage(prepared, platform)


def pinned(experiment: Experiment, find: FindBase, platform: Platform) -> Prepared:
    """Return the experiment with its bases, and with data and suites pinned. Checks nothing else.

    Raises what `find` and `check_settings` raise, and what reading data raises.
    """
    check_settings(experiment)
    bases = {
        (name, label): find(family.uri(label))
        for name, family in experiment.families.items()
        for label in family.labels
    }

    def pinned_rows(data: Rows) -> Rows:
        if isinstance(data, DataSource):
            return pin(data, platform.store)
        return tuple(source.pinned(pin(source, platform.store).sha256) for source in data)

    suites = partial(pin_suites, platform=platform)
    return Prepared(experiment.with_rows(pinned_rows, suites), bases)


def with_leakage(prepared: Prepared, platform: Platform) -> Prepared:
    """Return the experiment with the numbers of training rows that are items of its suites."""
    experiment = prepared.experiment
    first = {
        (experiment.data_of(planned.family), experiment.suites_of(planned.family)): planned
        for planned in reversed(experiment.trainings())
    }
    leakage: list[SuiteLeakage] = []
    for (_, suites), planned in first.items():
        rows = read_training_rows(recipe_of(experiment, planned, _NAME), platform.store)
        leakage += count_leakage(rows.all, suites, platform.store)
    return replace(prepared, leakage=tuple(leakage))


def check_families(bases: Mapping[tuple[str, str], BaseVersion], platform: Platform) -> None:
    """Raise InvalidSpecError, with all reasons, unless each new base is a version of its old one.

    Families whose old base is not among `bases` are not checked.
    """
    problems = []
    for (family, label), new in bases.items():
        old = bases.get((family, OLD))
        if label != OLD and old is not None:
            problems += [
                f"families.{family}: {OLD} and {label}: {problem}"
                for problem in check_family(old, new, platform)
            ]
    if problems:
        raise InvalidSpecError(
            "an adapter cannot be carried between these bases\n    " + "\n    ".join(problems),
            expected="a new base that was trained further from the old one, with the same "
            "architecture, shapes and tokens",
            do="correct the bases in the experiment file",
        )


def check_layers(
    experiment: Experiment, bases: Mapping[tuple[str, str], BaseVersion], platform: Platform
) -> None:
    """Raise InvalidSpecError if a perturbation spares layers that a base does not have, or all."""
    problems = {}
    for planned in (*experiment.selection_trainings(), *experiment.trainings()):
        spared = planned.perturbation.spared_layers
        if spared and (base := bases.get((planned.family, planned.base))) is not None:
            layers = platform.catalog.fingerprint(base).layer_count
            if max(spared) >= layers or len(spared) == layers:
                problems[planned.family, spared] = (
                    f"spared_layers {list(spared)}: {planned.family}/{planned.base} has the layers "
                    f"0 to {layers - 1}, and at least one of them must be perturbed"
                )
    if problems:
        raise InvalidSpecError(
            "a perturbation spares layers that cannot be spared\n    "
            + "\n    ".join(problems.values()),
            do="correct spared_layers in the experiment file",
        )


def check_family(old: BaseVersion, new: BaseVersion, platform: Platform) -> list[str]:
    """Return why two bases are not versions of one model. Reads fingerprints and tokenizers."""
    before, after = platform.catalog.fingerprint(old), platform.catalog.fingerprint(new)
    problems = [
        f"the {what} was {was} and is {now}"
        for what, was, now in (
            ("architecture", before.architecture, after.architecture),
            ("number of layers", before.layer_count, after.layer_count),
        )
        if was != now
    ]
    problems += _different_shapes(before, after)
    cosine = weight_cosine(before.tensors, after.tensors)
    if not problems and cosine is not None and cosine < UNRELATED_COSINE:
        problems.append(
            f"the weights are unrelated, as after pretraining from scratch: their median cosine is "
            f"{cosine:.3f}, and an update has at least {UNRELATED_COSINE}"
        )
    if tokenizers_may_differ(before, after):
        with TemporaryDirectory() as folder:
            before_at = tokenizer_folder(old, platform, Path(folder, "old"))
            after_at = tokenizer_folder(new, platform, Path(folder, "new"))
            problems += compare_tokenizers(before_at, after_at)[0]
    return problems


def _different_shapes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the tensors of the layers that differ in name or shape. Embeddings may grow."""
    shapes = [
        {
            name: tensor.shape
            for name, tensor in found.tensors.items()
            if not any(part in name for part in ("embed", "lm_head", "wte"))
        }
        for found in (old, new)
    ]
    changed = sorted(
        name for name in shapes[0].keys() | shapes[1].keys()
        if shapes[0].get(name) != shapes[1].get(name)
    )  # fmt: skip
    return [f"{len(changed)} tensors differ in shape: {listed(changed, 3)}"] if changed else []


def _has_degrees(suite: Suite) -> bool:
    rule = RULES.get(suite.scoring.partition(":")[0])
    return rule is not None and rule.is_graded and suite.threshold is None
