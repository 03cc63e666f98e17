"""Train an adapter by a recipe, evaluate it on its base, and register it as a live adapter."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from trans_peft.data import Example, pin, read_examples, write_examples
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation
from trans_peft.domain.recipe import SyntheticPrompts, TrainingRecipe
from trans_peft.errors import translating_full_disk_errors
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import (
    EvaluationSubject,
    evaluate_on,
    pin_suites,
)
from trans_peft.lifecycle.leakage import count_leakage
from trans_peft.lifecycle.preflight import check_registration, check_suites
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.synthetic_prompts import (
    check_synthetic_prompts,
    keep_prompts,
    write_synthetic_prompts,
)
from trans_peft.ports import Platform
from trans_peft.training import events
from trans_peft.training.events import Event
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.launch import fit

__all__ = ["job_on", "resolve_recipe", "train", "trained_version"]


def resolve_recipe(
    recipe: TrainingRecipe, platform: Platform
) -> tuple[TrainingRecipe, BaseVersion]:
    """Return the recipe with its base version and data pinned, and that base version.

    An alias becomes the label of a version, and data and suites get the hash of their contents. The
    hash of the returned recipe identifies the training result.
    """
    base = find_base(recipe.family, recipe.base_version, platform)
    data = recipe.data if recipe.data.sha256 else pin(recipe.data, platform.store)
    resolved = replace(
        recipe,
        base_version=base.version,
        data=data,
        suites=pin_suites(recipe.suites, platform),
        synthetic_prompts=_pinned(recipe.synthetic_prompts, platform),
    )
    return resolved, base


def job_on(
    base: BaseVersion, recipe: TrainingRecipe, examples: Sequence[Example], platform: Platform
) -> TrainingJob:
    """Return the training job of a resolved recipe. The recipe's hash names its work folder."""
    work_dir = platform.work_dir / "training" / recipe.sha256[:16]
    with translating_full_disk_errors(platform.work_dir):
        data_file = write_examples(examples, work_dir / "data.jsonl")
    return TrainingJob(
        recipe=recipe,
        base_folder=base_folder(base, platform),
        base_name=base.uri,
        base_revision=base.fingerprint_sha256,
        data_file=data_file,
        work_dir=work_dir,
    )


def trained_version(
    base: BaseVersion, recipe: TrainingRecipe, result: TrainingResult
) -> AdapterVersion:
    """Return the adapter version to register for a finished training. Its number is 0."""
    return AdapterVersion(
        adapter=recipe.adapter,
        number=0,
        base=base.ref,
        trained_on=base.ref,
        weights_sha256=result.weights_sha256,
        method=recipe.spec.peft_type,
        suites=recipe.suites,
        recipe_sha256=recipe.sha256,
        recipe=recipe,
    )


def train(
    recipe: TrainingRecipe,
    platform: Platform,
    *,
    on_event: Callable[[Event], None],
    on_progress: ProgressCallback | None = None,
) -> AdapterVersion:
    """Train one adapter by a recipe, register it, and let it serve on the base it was trained on.

    If a version of the same recipe, base and data is registered, it is returned and nothing is
    trained. A killed run resumes from its last checkpoint on the same worker. `preflight` checks
    before the first step that evaluation and registration are possible. `on_event` gets the
    training events, `on_progress` the progress of the evaluation.

    Raises TrainingError, OutOfMemoryError, DataError, InvalidSpecError or NotFoundError. Nothing is
    registered then.
    """
    resolved, base = resolve_recipe(recipe, platform)
    existing = _registered(resolved, base, platform)
    if existing is not None:
        return existing
    check_registration(resolved.adapter, base.family, platform)
    examples = read_examples(resolved.data, platform.store)
    check_suites(base, resolved.suites, platform)
    leakage = count_leakage(examples, resolved.suites, platform.store)
    check_synthetic_prompts(resolved, platform.store)

    tags = base.ref.labels | {"adapter": resolved.adapter}
    with platform.runs.run(f"train {resolved.adapter} on {base}", tags=tags) as run:
        run.params(_params(resolved))
        run.dataset(resolved.adapter, resolved.data)
        run.metrics({f"leakage_points/{found.suite}": found.points for found in leakage}, 0)

        def on_training_event(event: Event) -> None:
            if isinstance(event, events.TrainingMetrics):
                run.metrics(event.metrics, event.step)
            on_event(event)

        job = job_on(base, resolved, examples, platform)
        run.file(_write_recipe(resolved, job.work_dir))  # fails early if files cannot be stored
        prompts = write_synthetic_prompts(job, examples, platform.store, on_event=on_event)
        result = fit(job, on_event=on_training_event)
        keep_prompts(job.work_dir, result.folder)
        evaluations = evaluate_on(
            base,
            resolved.suites,
            platform,
            EvaluationSubject(resolved.adapter, result.weights_sha256, lambda: result.folder),
            on_progress=on_progress,
        )
        if resolved.synthetic_prompts is not None:
            run.metrics({"synthetic_prompts": prompts}, result.steps)
        version = platform.registry.register(
            replace(trained_version(base, resolved, result), run_id=run.id, leakage=leakage),
            result.folder,
            tags=_tags(resolved, result, evaluations),
            scores={name: found.score for name, found in evaluations.items()},
        )
    platform.registry.set_alias(version.adapter, version.base.alias, version.number)
    return version


def _pinned(settings: SyntheticPrompts | None, platform: Platform) -> SyntheticPrompts | None:
    if settings is None or settings.approved is None or settings.approved.sha256:
        return settings
    return replace(settings, approved=pin(settings.approved, platform.store))


def _registered(
    recipe: TrainingRecipe, base: BaseVersion, platform: Platform
) -> AdapterVersion | None:
    if recipe.adapter not in platform.registry.adapters(recipe.family):
        return None
    return next(
        (
            version
            for version in platform.registry.versions(recipe.adapter)
            if version.recipe_sha256 == recipe.sha256
            and version.base.fingerprint_sha256 == base.fingerprint_sha256
            and version.is_trained
            and not version.state.superseded
        ),
        None,
    )


def _params(recipe: TrainingRecipe) -> dict[str, object]:
    """Return the recipe as flat parameters, which MLflow can show and compare."""
    optimizer = {f"optimizer.{k}": v for k, v in asdict(recipe.optimizer).items()}
    options = {f"{recipe.spec.peft_type}.{k}": v for k, v in recipe.spec.options.items()}
    return {
        **asdict(recipe.perturbation),
        **optimizer,
        **options,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "processes": recipe.processes,
        "packing": recipe.packing,
        "data": recipe.data.uri,
    }


def _tags(
    recipe: TrainingRecipe, result: TrainingResult, evaluations: Mapping[str, Evaluation]
) -> dict[str, str]:
    return {
        "masking_p": str(recipe.perturbation.masking_p),
        "dropping_p": str(recipe.perturbation.dropping_p),
        "seed": str(recipe.seed),
        "data_sha256": recipe.data.sha256,
        "final_loss": f"{result.final_loss:.4f}",
        **{f"score.{suite}": f"{item.score:.2f}" for suite, item in evaluations.items()},
    }


def _write_recipe(recipe: TrainingRecipe, folder: Path) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(asdict(recipe), indent=2))
    return path
