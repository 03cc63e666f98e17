"""Recovery strategies: how each one makes a candidate for the new base.

A strategy that cannot be applied returns the reason as text, and the verdict so far remains. No
strategy trains on the items of a suite or selects by them, so that the gate's levels hold.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trans_peft.data import Example, full_ids, prompt_ids, write_examples
from trans_peft.data.training_rows import TrainingRows, read_training_rows
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import (
    AdapterError,
    DataError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    TrainingCancelled,
    TrainingError,
)
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.recovery.candidates import Candidate, CandidateInputs, recipe_on
from trans_peft.lifecycle.recovery.compensation import compensated
from trans_peft.lifecycle.recovery.distillation import distilled
from trans_peft.models import adapter_weights_sha256
from trans_peft.text.saved_template import saved_template

__all__ = ["make_candidate"]

_SEARCH_ROWS = 64  # training rows that are read to select a scale factor


def make_candidate(strategy: RecoveryStrategy, inputs: CandidateInputs) -> Candidate | str:
    """Return the candidate of a strategy, or the reason why there is none.

    Raises TrainingCancelled if the training is cancelled.
    """
    if strategy is RecoveryStrategy.DIRECT:
        return Candidate(strategy, inputs.folder, inputs.source.weights_sha256)
    if strategy is RecoveryStrategy.COMPENSATED:
        return compensated(inputs)
    if strategy is RecoveryStrategy.DISTILLED:
        return distilled(inputs)
    recipe = inputs.source.recipe
    if recipe is None:
        return "the adapter has no recipe, so its training rows are unknown"
    if strategy is RecoveryStrategy.RETRAINED:
        return "runs as a training flow of its own"
    try:
        rows = read_training_rows(recipe, inputs.platform.store)
    except (NotFoundError, IntegrityError, DataError) as error:
        return f"its training rows cannot be read: {error}"
    return (
        _rescaled(inputs, rows.training)
        if strategy is RecoveryStrategy.RESCALED
        else _retuned(inputs, recipe, rows)
    )


def _rescaled(inputs: CandidateInputs, rows: Sequence[Example]) -> Candidate | str:
    """Scale the adapter by the factor with the highest likelihood of its first training rows."""
    from trans_peft.models import load_base
    from trans_peft.transfer.scaling import has_scale, rescaled

    folder = inputs.folder()
    if not has_scale(folder):
        return f"an adapter of the type {inputs.source.method} has no scale"
    loaded = load_base(base_folder(inputs.base, inputs.platform), inputs.source.suites[0].dtype)
    found = {1.0: _loss(loaded, folder, rows[:_SEARCH_ROWS])}
    for factor in inputs.recovery.scales:
        candidate = rescaled(folder, inputs.scratch / f"rescaled-{factor:g}", factor)
        found[factor] = _loss(loaded, candidate, rows[:_SEARCH_ROWS])
    best = min(found, key=lambda factor: (found[factor], abs(factor - 1)))
    if best == 1:
        return "no factor increases the likelihood of its training rows"
    scaled = inputs.scratch / f"rescaled-{best:g}"
    note = f"scale x {best:g}, {found[1.0]:.3f} -> {found[best]:.3f} nats per row"
    return Candidate(
        RecoveryStrategy.RESCALED, lambda: scaled, adapter_weights_sha256(scaled), note
    )


def _loss(loaded: Any, folder: Path, rows: Sequence[Example]) -> float:
    """Return the mean negative log-likelihood of the completions, in nats per row."""
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.validation.decoding.likelihoods import log_likelihoods

    template = saved_template(folder)
    prompts = prompt_ids(rows, loaded.tokenizer, template)
    wholes = full_ids(rows, loaded.tokenizer, template)
    pairs = [
        (prompt, [whole[len(prompt) :]]) for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    with attached(loaded.model, folder) as model:
        return -sum(found for (found,) in log_likelihoods(model, pairs)) / len(pairs)


def _retuned(
    inputs: CandidateInputs, recipe: TrainingRecipe, rows: TrainingRows
) -> Candidate | str:
    """Continue training from the source's weights on the new base for a few steps."""
    from trans_peft.training.events import on_steps
    from trans_peft.training.job import TrainingJob
    from trans_peft.training.launch import fit

    steps = inputs.recovery.retune_steps
    optimizer = recipe.optimizer
    tenth = steps // 10
    warmup_steps = tenth if optimizer.warmup_ratio else min(optimizer.warmup_steps, tenth)
    optimizer = optimizer.for_steps(steps, warmup_steps)
    data_file, *more_data_files = (
        write_examples(examples, inputs.scratch / f"rows{number or ''}.jsonl")
        for number, examples in enumerate(rows.sources)
    )
    job = TrainingJob(
        recipe=replace(recipe_on(recipe, inputs.base), optimizer=optimizer, validation=None),
        base_folder=base_folder(inputs.base, inputs.platform),
        base_name=inputs.base.uri,
        base_revision=inputs.base.fingerprint_sha256,
        data_file=data_file,
        more_data_files=tuple(more_data_files),
        work_dir=inputs.platform.work_dir / "training",
        start=inputs.folder(),
    )
    job = replace(job, work_dir=job.work_dir / f"retune-{job.identity()[:16]}")
    try:
        result = fit(job, on_event=on_steps(inputs.reporter("re-tuning", "steps")))
    except TrainingCancelled:
        raise
    except (TrainingError, DataError, AdapterError, InvalidSpecError) as error:
        return f"training failed: {error}".replace(str(job.start), str(inputs.source))
    note = f"{steps} steps, {result.seconds:.0f} s of training"
    return Candidate(RecoveryStrategy.RETUNED, lambda: result.folder, result.weights_sha256, note)
