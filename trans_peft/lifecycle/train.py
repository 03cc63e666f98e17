"""Train an adapter by a recipe, evaluate it on its base, and register it as a live adapter."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.data import pin, write_examples
from trans_peft.data.training_rows import TrainingRows, read_training_rows
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation
from trans_peft.domain.recipe import SyntheticPrompts, TrainingRecipe
from trans_peft.errors import StoreError, translating_full_disk_errors
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
from trans_peft.training.checkpoint_store import CheckpointStore, continued
from trans_peft.training.events import Event
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.launch import fit

__all__ = [
    "job_on",
    "remove_checkpoints",
    "resolve_recipe",
    "stored_checkpoints",
    "train",
    "trained_version",
]


def resolve_recipe(
    recipe: TrainingRecipe, platform: Platform
) -> tuple[TrainingRecipe, BaseVersion]:
    """Return the recipe with its base version and data pinned, and that base version.

    An alias becomes the label of a version, and data and suites get the hash of their contents. The
    hash of the returned recipe identifies the training result.
    """
    base = find_base(recipe.family, recipe.base_version, platform)
    pinned = recipe.with_sources(
        lambda source: source if source.sha256 else pin(source, platform.store)
    )
    resolved = replace(
        pinned,
        base_version=base.version,
        suites=pin_suites(recipe.suites, platform),
        synthetic_prompts=_pinned(recipe.synthetic_prompts, platform),
    )
    return resolved, base


def job_on(
    base: BaseVersion, recipe: TrainingRecipe, rows: TrainingRows, platform: Platform
) -> TrainingJob:
    """Return the training job of a resolved recipe. The recipe's hash names its work folder."""
    work_dir = platform.work_dir / "training" / recipe.sha256[:16]
    with translating_full_disk_errors(platform.work_dir):
        data_file, *more_data_files = (
            write_examples(examples, work_dir / f"data{number or ''}.jsonl")
            for number, examples in enumerate(rows.sources)
        )
        validation_file = None
        if rows.validation:
            validation_file = write_examples(rows.validation, work_dir / "validation.jsonl")
    return TrainingJob(
        recipe=recipe,
        base_folder=base_folder(base, platform),
        base_name=base.uri,
        base_revision=base.fingerprint_sha256,
        data_file=data_file,
        work_dir=work_dir,
        more_data_files=tuple(more_data_files),
        validation_file=validation_file,
    )


def stored_checkpoints(job: TrainingJob, platform: Platform) -> CheckpointStore | None:
    """Return the checkpoints of a job in the artifact store; None if the platform has no place."""
    if not platform.checkpoints_uri:
        return None
    return CheckpointStore(platform.store, child_uri(platform.checkpoints_uri, job.identity()))


def remove_checkpoints(checkpoints: CheckpointStore | None) -> None:
    """Remove the checkpoints of a training whose result is registered, if the store allows it."""
    if checkpoints is not None:
        with suppress(StoreError):
            checkpoints.clear()


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
    trained. A killed run resumes from its last checkpoint: on the same worker, or on any worker if
    the platform has a place for checkpoints. `preflight` checks before the first step that
    evaluation and registration are possible. `on_event` gets the training events, `on_progress` the
    progress of the evaluation.

    Raises TrainingError, OutOfMemoryError, DataError, InvalidSpecError or NotFoundError. Nothing is
    registered then.
    """
    resolved, base = resolve_recipe(recipe, platform)
    existing = _registered(resolved, base, platform)
    if existing is not None:
        return existing
    check_registration(resolved.adapter, base.family, platform)
    rows = read_training_rows(resolved, platform.store)
    check_suites(base, resolved.suites, platform)
    leakage = count_leakage(rows.all, resolved.suites, platform.store)
    check_synthetic_prompts(resolved, len(rows.training), platform.store)

    tags = base.ref.labels | {"adapter": resolved.adapter}
    with platform.runs.run(f"train {resolved.adapter} on {base}", tags=tags) as run:
        run.params(_params(resolved))
        for source in resolved.sources:
            run.dataset(resolved.adapter, source)
        run.metrics({f"leakage_points/{found.suite}": found.points for found in leakage}, 0)

        def on_training_event(event: Event) -> None:
            if isinstance(event, events.TrainingMetrics | events.ValidationMetrics):
                run.metrics(event.metrics, event.step)
            on_event(event)

        job = job_on(base, resolved, rows, platform)
        run.file(_write_recipe(resolved, job.work_dir))  # fails early if files cannot be stored
        prompts = write_synthetic_prompts(job, rows.training, platform.store, on_event=on_event)
        checkpoints = stored_checkpoints(job, platform)
        result = fit(job, on_event=continued(job, checkpoints, on_training_event))
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
    remove_checkpoints(checkpoints)
    return version


def _pinned(settings: SyntheticPrompts | None, platform: Platform) -> SyntheticPrompts | None:
    if settings is None or settings.approved is None or settings.approved.sha256:
        return settings
    return replace(settings, approved=pin(settings.approved, platform.store))


def _registered(
    recipe: TrainingRecipe, base: BaseVersion, platform: Platform
) -> AdapterVersion | None:
    if platform.registry.registered_name(recipe.adapter) != recipe.adapter:
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
    compute = {f"compute.{k}": v for k, v in asdict(recipe.compute).items()}
    options = {f"{recipe.spec.peft_type}.{k}": v for k, v in recipe.spec.options.items()}
    return {
        **asdict(recipe.perturbation),
        **optimizer,
        **compute,
        **options,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "processes": recipe.processes,
        "packing": recipe.packing,
        "objective": recipe.objective,
        "train_on_prompt": recipe.train_on_prompt,
        "data": ", ".join(source.uri for source in recipe.sources),
    }


def _tags(
    recipe: TrainingRecipe, result: TrainingResult, evaluations: Mapping[str, Evaluation]
) -> dict[str, str]:
    return {
        "masking_p": str(recipe.perturbation.masking_p),
        "dropping_p": str(recipe.perturbation.dropping_p),
        "seed": str(recipe.seed),
        "data_sha256": ",".join(source.sha256 for source in recipe.sources),
        **result.tags,
        **{f"score.{suite}": f"{item.score:.2f}" for suite, item in evaluations.items()},
    }


def _write_recipe(recipe: TrainingRecipe, folder: Path) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(asdict(recipe), indent=2))
    return path
