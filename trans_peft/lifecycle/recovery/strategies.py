"""The rungs beyond direct transfer: how each makes a candidate for the new base.

A rung that cannot be tried says why, in words, and the verdict so far stands. All of them read the
adapter's own training rows and none of the items that judge, so nothing about those was chosen to
look good; that each rung is a further chance to pass is what `GatePolicy.per_strategy` pays for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trans_peft.data import Example, full_ids, prompt_ids, read_examples, write_examples
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryPolicy, RecoveryStrategy
from trans_peft.errors import (
    AdapterError,
    DataError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    TrainingCancelled,
    TrainingError,
)
from trans_peft.lifecycle.evaluations import base_folder
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import Platform
from trans_peft.text.saved_template import saved_template

__all__ = ["Candidate", "CandidateInputs", "candidate", "recipe_on"]

_SEARCH_ROWS = 64


@dataclass(frozen=True)
class Candidate:
    """Bytes that may become the adapter's version on the new base."""

    strategy: RecoveryStrategy
    folder: Callable[[], Path]
    weights_sha256: str
    note: str = ""


@dataclass(frozen=True)
class CandidateInputs:
    """What candidates for `base` are made of: the bytes of `source`, a PEFT folder from `folder`.

    What is made lies in `scratch`, or among the platform's trainings.
    """

    source: AdapterVersion
    folder: Callable[[], Path]
    base: BaseVersion
    recovery: RecoveryPolicy
    platform: Platform
    scratch: Path


def candidate(strategy: RecoveryStrategy, of: CandidateInputs) -> Candidate | str:
    """Make what a rung would put on the base, or say why it makes nothing.

    TrainingCancelled where somebody ends it.
    """
    if strategy is RecoveryStrategy.DIRECT:
        return Candidate(strategy, of.folder, of.source.weights_sha256)
    recipe = of.source.recipe
    if recipe is None:
        return "how it was trained is not known, so there are no rows to read"
    if strategy is RecoveryStrategy.RETRAINED:
        return "left to a training run of its own"
    try:
        rows = read_examples(recipe.data, of.platform.store)
    except (NotFoundError, IntegrityError, DataError) as error:
        return f"its training rows are not to be had: {error}"
    return (
        _rescaled(of, rows) if strategy is RecoveryStrategy.RESCALED else _retuned(of, recipe, rows)
    )


def recipe_on(recipe: TrainingRecipe, base: BaseVersion) -> TrainingRecipe:
    """Return the recipe that trains the same adapter anew on another base."""
    return replace(recipe, base_version=base.version)


def _rescaled(of: CandidateInputs, rows: Sequence[Example]) -> Candidate | str:
    """Take the factor under which the first training rows are likeliest on the new base."""
    from trans_peft.models import load_base
    from trans_peft.transfer.scaling import has_scale, rescaled

    folder = of.folder()
    if not has_scale(folder):
        return f"a {of.source.method} adapter has no scale"
    loaded = load_base(base_folder(of.base, of.platform), of.source.suites[0].dtype)
    found = {1.0: _loss(loaded, folder, rows[:_SEARCH_ROWS])}
    for factor in of.recovery.scales:
        scaled = rescaled(folder, of.scratch / f"rescaled-{factor:g}", factor)
        found[factor] = _loss(loaded, scaled, rows[:_SEARCH_ROWS])
    best = min(found, key=lambda factor: (found[factor], abs(factor - 1)))
    if best == 1:
        return "no factor makes its training rows likelier than they are"
    made = of.scratch / f"rescaled-{best:g}"
    note = f"scale x {best:g}, {found[1.0]:.3f} -> {found[best]:.3f} nats a row"
    return Candidate(RecoveryStrategy.RESCALED, lambda: made, adapter_weights_sha256(made), note)


def _loss(loaded: Any, folder: Path, rows: Sequence[Example]) -> float:
    """Return the negative log-likelihood of the answers, nats a row."""
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.validation.decoding.likelihoods import log_likelihoods

    template = saved_template(folder)
    prompts = prompt_ids(rows, loaded.tokenizer, template)
    wholes = full_ids(rows, loaded.tokenizer, template)
    asked = [
        (prompt, [whole[len(prompt) :]]) for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    with attached(loaded.model, folder) as model:
        return -sum(found for (found,) in log_likelihoods(model, asked)) / len(asked)


def _retuned(
    of: CandidateInputs, recipe: TrainingRecipe, rows: Sequence[Example]
) -> Candidate | str:
    """Go on training from the old weights, by the same recipe, for a few steps."""
    from trans_peft.training.job import TrainingJob
    from trans_peft.training.launch import fit

    steps = of.recovery.retune_steps
    optimizer = replace(
        recipe.optimizer, steps=steps, warmup_steps=min(recipe.optimizer.warmup_steps, steps // 10)
    )
    job = TrainingJob(
        recipe=replace(recipe_on(recipe, of.base), optimizer=optimizer),
        base_folder=base_folder(of.base, of.platform),
        base_name=of.base.uri,
        base_revision=of.base.fingerprint_sha256,
        data_file=write_examples(rows, of.scratch / "rows.jsonl"),
        work_dir=of.platform.work_dir / "training",
        start=of.folder(),
    )
    job = replace(job, work_dir=job.work_dir / f"retune-{job.identity()[:16]}")
    try:
        result = fit(job, on_event=lambda event: None)
    except TrainingCancelled:
        raise
    except (TrainingError, DataError, AdapterError, InvalidSpecError) as error:
        return f"training failed: {error}".replace(str(job.start), str(of.source))
    note = f"{steps} steps, {result.seconds:.0f} s of training"
    return Candidate(RecoveryStrategy.RETUNED, lambda: result.folder, result.weights_sha256, note)
