"""Distill an adapter from its old base into a new one, with prompts and without labels.

Teacher and student are in memory one after the other.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trans_peft.data import Example, prompt_ids, write_examples
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import MIN_PROMPTS, DistillationPolicy
from trans_peft.errors import DataError
from trans_peft.models import load_base, release_base
from trans_peft.text.saved_template import saved_template
from trans_peft.training.distillation import TeacherTargets, amplified
from trans_peft.training.events import on_steps
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.launch import fit
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.evaluate import context_of

__all__ = ["Distillation", "Distilled"]

_HELD_OUT = 10  # one prompt in this many
_TOP = 64  # tokens of a distribution that are kept


@dataclass(frozen=True)
class Distilled:
    """A distilled adapter.

    Attributes:
        training: the result of the training run.
        teacher_s: seconds in which the teacher answered.
        held_out: number of held-out prompts.
        before: divergence of the adapter on the new base from the teacher on held-out prompts, in
            nats per token, before the training.
        after: the same after the training.
    """

    training: TrainingResult
    teacher_s: float
    held_out: int
    before: float
    after: float

    @property
    def change(self) -> str:
        """The change of the divergence, as text."""
        return (
            f"{self.before:.3g} -> {self.after:.3g} nats per token on {self.held_out} held-out "
            "prompts"
        )


@dataclass(frozen=True)
class Distillation:
    """One adapter to distill.

    Attributes:
        adapter: its PEFT folder.
        old_base: folder of the base that it was trained on.
        job: a training run on the new base from the adapter's weights. Its recipe gives the type of
            the adapter and the perturbation; its data file and its targets are not used.
        suite: gives the dtype and the decoding settings of the teacher's answers. No item is read.
        policy: the settings.
        on_answers: called with (prompts answered, all prompts).
        on_steps: called with (training steps done, all steps).
    """

    adapter: Path
    old_base: Path
    job: TrainingJob
    suite: Suite
    policy: DistillationPolicy
    on_answers: Callable[[int, int], None] = lambda done, total: None
    on_steps: Callable[[int, int], None] = lambda done, total: None

    def run(self, prompts: Sequence[Example], scratch: Path) -> Distilled:
        """Answer the prompts, train on nine tenths of the answers, and measure on the others.

        `scratch` is a folder for the prompts and the answers. Raises DataError if fewer than
        `MIN_PROMPTS` prompts fit into the recipe's `max_length` together with their answers, and
        what `trans_peft.training.launch.fit` raises.
        """
        started_s = time.monotonic()
        targets = self._teacher(prompts)
        teacher_s = time.monotonic() - started_s
        limit = self.job.recipe.optimizer.max_length
        targets = targets.at_most(limit)
        if len(targets) < MIN_PROMPTS:
            raise DataError(
                "too few prompts can be used for distillation",
                expected=f"{MIN_PROMPTS} that have at most {limit} tokens with their answers "
                "(max_length of the recipe)",
                found=f"{len(targets)} of {len(prompts)}",
                do="add shorter prompts",
            )
        rows = range(len(targets))
        held_out = targets.select(rows[::_HELD_OUT])
        job = replace(
            self.job,
            recipe=self._recipe(),
            data_file=write_examples(prompts, scratch / "prompts.jsonl"),
            targets=targets.select([row for row in rows if row % _HELD_OUT]).write(
                scratch / "targets.safetensors"
            ),
            start=self.adapter,
        )
        job = replace(job, work_dir=job.work_dir / f"distill-{job.identity()[:16]}")
        before = self._divergence(held_out, self.adapter)
        release_base()  # the training process loads its own
        result = fit(job, on_event=on_steps(self.on_steps))
        after = self._divergence(held_out, result.folder)
        return Distilled(result, teacher_s, len(held_out), before, after)

    def _recipe(self) -> TrainingRecipe:
        policy, recipe = self.policy, self.job.recipe
        # The recipe's batch size fits into the memory of the worker.
        of_process = max(1, policy.batch_size // recipe.processes)
        batch_size = min(recipe.optimizer.batch_size, of_process)
        optimizer = replace(
            recipe.optimizer.for_steps(policy.steps, policy.steps // 10),
            batch_size=batch_size,
            gradient_accumulation=of_process // batch_size,
            learning_rate=policy.learning_rate,
        )
        return replace(recipe.for_answers(), optimizer=optimizer)

    def _teacher(self, prompts: Sequence[Example]) -> TeacherTargets:
        old = load_base(self.old_base, self.suite.dtype)
        ids = prompt_ids(prompts, old.tokenizer, saved_template(self.adapter))
        # An answer has at least one token. Longer prompts would not be used.
        longest = self.job.recipe.optimizer.max_length - 1
        if (context := context_of(old.model)) is not None:
            longest = min(longest, context - self.suite.max_new_tokens)
        ids = [prompt for prompt in ids if len(prompt) <= longest]
        with attached(old.model, self.adapter) as model:
            answers = generate(
                model,
                old.tokenizer,
                ids,
                max_new_tokens=self.suite.max_new_tokens,
                stop=self.suite.stop,
                top=_TOP,
                on_progress=self.on_answers,
            )
        targets = TeacherTargets.of(ids, answers)
        if self.policy.beta is None:
            return targets
        before = targets.along(old.model)
        del old, model  # one base at a time
        after = targets.along(load_base(self.job.base_folder, self.suite.dtype).model)
        return amplified(targets, before, after, self.policy.beta)

    def _divergence(self, targets: TeacherTargets, adapter: Path) -> float:
        base = load_base(self.job.base_folder, self.suite.dtype)
        with attached(base.model, adapter) as model:
            return targets.divergence(model)
