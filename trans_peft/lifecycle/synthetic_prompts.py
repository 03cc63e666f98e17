"""Prompts that are written during a training and kept with the adapter, in its PEFT folder."""

import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trans_peft.data import Example, read_examples, read_prompts, write_examples
from trans_peft.data.parsing import PromptRows, prompts_in
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.domain.recipe import Perturbation, SyntheticPrompts, TrainingRecipe
from trans_peft.domain.recovery import MIN_PROMPTS
from trans_peft.errors import DataError, NotFoundError, listed
from trans_peft.files import atomic_write
from trans_peft.ports import ArtifactStore
from trans_peft.training.dp_sgd import DpSgd, noise_multiplier
from trans_peft.training.events import Event, MemoryEstimated, TrainingMetrics
from trans_peft.training.job import TrainingJob
from trans_peft.training.launch import fit

__all__ = [
    "check_synthetic_prompts",
    "keep_prompts",
    "kept_prompts",
    "suite_prompts",
    "write_synthetic_prompts",
]

_NAME = "synthetic_prompts.jsonl"
_HOW_TO_GET_MORE = {
    False: "approve more prompts, train the prompt model with more steps, or remove "
    "synthetic_prompts from the recipe",
    True: "give privacy a larger batch_size or epsilon, or approve prompts instead. Prompts that a "
    "second training writes add their epsilon and delta to those of this one",
}
"""By whether the prompt model has differential privacy."""


def check_synthetic_prompts(recipe: TrainingRecipe, rows: int, store: ArtifactStore) -> None:
    """Check a recipe's synthetic prompts before a model is loaded. `rows` are its training rows.

    Raises DataError for approved prompts that are no prompts. If the recipe asks for privacy,
    raises what `trans_peft.training.dp_sgd.noise_multiplier` raises.
    """
    settings = recipe.synthetic_prompts
    if settings is None:
        return
    if settings.privacy is not None:
        noise_multiplier(settings.privacy, rows, settings.steps)
    if settings.approved is None:
        return
    found = read_prompts(settings.approved, store)
    if found.invalid or not found.prompts:
        raise DataError(
            f"{settings.approved.uri}: {len(found.invalid)} rows are no prompts",
            expected="rows with prompt, messages or instruction; the answer is optional",
            found=listed(found.invalid) or "no rows",
            do="correct or remove these rows",
        )


def suite_prompts(suites: Sequence[Suite], store: ArtifactStore) -> list[str]:
    """Return the prompts of all items of the suites, which must not be learned from."""
    return [
        example.prompt_text()
        for suite in suites
        for example in read_examples(suite.data, store, limit=suite.limit)
    ]


def write_synthetic_prompts(
    job: TrainingJob,
    examples: Sequence[Example],
    store: ArtifactStore,
    *,
    on_event: Callable[[Event], None],
) -> int:
    """Write the prompts of a job's recipe into its work folder, and return their number.

    `examples` are the training rows. Without `synthetic_prompts` in the recipe, nothing is written.
    Prompts from an earlier call with the same work folder remain. The prompt model is deleted once
    it has written the prompts. Raises DataError if there are fewer than `MIN_PROMPTS`, and what
    `trans_peft.training.launch.fit` raises.
    """
    from trans_peft.models import load_base, release_base
    from trans_peft.training.prompt_writing import like_examples

    recipe, settings = job.recipe, job.recipe.synthetic_prompts
    if settings is None:
        return 0
    file = job.work_dir / _NAME
    if file.exists():
        return file.read_bytes().count(b"\n")
    items = suite_prompts(recipe.suites, store)
    if settings.approved is not None:
        approved = read_prompts(settings.approved, store).prompts
        base = load_base(job.base_folder, recipe.suites[0].dtype)
        written = like_examples(base, approved, items, settings.count, recipe.seed)
        del base
    else:
        written = _of_prompt_model(job, settings, examples, items, on_event)
    release_base()  # the training process loads its own
    if len(written) < MIN_PROMPTS:
        raise DataError(
            f"{len(written)} synthetic prompts could be written for {recipe.adapter}",
            expected=f"at least {MIN_PROMPTS} that differ from each other and from the suites, and "
            "that repeat no rare part of the training prompts (which only privacy allows)",
            do=_HOW_TO_GET_MORE[settings.privacy is not None],
        )
    write_examples(written, file.with_suffix(".partial")).replace(file)
    return len(written)


def _of_prompt_model(
    job: TrainingJob,
    settings: SyntheticPrompts,
    examples: Sequence[Example],
    items: Sequence[str],
    on_event: Callable[[Event], None],
) -> list[Example]:
    """Train a prompt model, and return the prompts that it writes. The model is deleted."""
    from trans_peft.models import load_base
    from trans_peft.training.prompt_writing import (
        PromptLimits,
        PromptTraits,
        prompt_model_rows,
        sampled,
    )

    recipe, privacy = job.recipe, settings.privacy
    folder, deleted = job.work_dir / "prompt-model", job.work_dir / "prompt-model.deleted"
    shutil.rmtree(deleted, ignore_errors=True)  # left over by a run that was killed
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = recipe.optimizer.for_steps(settings.steps, settings.steps // 10)
    learned = replace(recipe.for_answers(), optimizer=optimizer, perturbation=Perturbation())
    traits, dp_sgd, report = PromptTraits.of(examples), None, on_event
    if privacy is not None:
        # All rows of a file have one shape, so that of the first one shows nothing else of it.
        traits = PromptTraits.independent_of_rows(chat=examples[0].messages is not None)
        dp_sgd = DpSgd.meeting(privacy, len(examples), settings.steps, _secret_key(folder))
        learned, report = _on_single_rows(learned, privacy), _without_figures(on_event)
    rows = prompt_model_rows(examples, traits.separator)
    result = fit(
        replace(
            job,
            recipe=learned,
            data_file=write_examples(rows, folder / "data.jsonl"),
            more_data_files=(),
            validation_file=None,
            work_dir=folder,
            dp_sgd=dp_sgd,
        ),
        on_event=report,
    )
    written = sampled(
        load_base(job.base_folder, recipe.suites[0].dtype),
        result.folder,
        traits,
        items,
        PromptLimits(settings.count, recipe.optimizer.max_length),
        recipe.seed,
    )
    folder.rename(deleted)  # a folder without its key, or with a part of its files, cannot resume
    shutil.rmtree(deleted)
    return written


def _on_single_rows(recipe: TrainingRecipe, privacy: PrivacySettings) -> TrainingRecipe:
    """Return the recipe with micro-steps of one row, in one process.

    Gradients are clipped row by row, and not once more after the noise was added.
    """
    optimizer = replace(
        recipe.optimizer, batch_size=1, gradient_accumulation=privacy.batch_size, max_grad_norm=0.0
    )
    return replace(recipe, optimizer=optimizer, processes=1)


def _secret_key(folder: Path) -> str:
    """Return the key of a private training, which a resumed run reads again.

    The recipe does not contain it: whoever knows the key can compute the noise and subtract it.
    """
    file = folder / "secret_key"
    if not file.exists():
        atomic_write(file, secrets.token_hex(16), mode=0o600)
    return file.read_text()


def _without_figures(on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return a callback that drops losses and estimates, which depend on rows and have no noise."""

    def report(event: Event) -> None:
        if not isinstance(event, TrainingMetrics | MemoryEstimated):
            on_event(event)

    return report


def keep_prompts(origin: Path, adapter: Path) -> None:
    """Copy the prompts in a work folder or a PEFT folder, if it has any, to a PEFT folder."""
    if (origin / _NAME).exists():
        shutil.copyfile(origin / _NAME, adapter / _NAME)


def kept_prompts(folder: Path) -> PromptRows:
    """Return the prompts in a PEFT folder or a work folder. NotFoundError if there are none."""
    file = folder / _NAME
    if not file.exists():
        raise NotFoundError(
            "no prompts are kept with the adapter",
            expected=f"the file {_NAME}, which the training writes",
            do="name prompts in the policy (prompts_uri), or train the adapter again",
        )
    return prompts_in(file.read_bytes(), _NAME)
