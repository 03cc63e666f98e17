"""The strategy `distilled`: train the adapter on the new base to answer as it did on the old one.

The prompts and the teacher's answers wait in the scratch folder of the transfer, and are deleted
with it.
"""

from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import (
    AdapterError,
    EvaluationError,
    InvalidSpecError,
    TrainingCancelled,
    TrainingError,
    UnsupportedModelError,
)
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.recovery.candidates import Candidate, CandidateInputs, recipe_on
from trans_peft.lifecycle.recovery.prompts import prompts_for
from trans_peft.lifecycle.recovery.readiness import why_not_distilled
from trans_peft.lifecycle.recovery.teacher import UNUSABLE, why_no_teacher

__all__ = ["distilled"]


def distilled(inputs: CandidateInputs) -> Candidate | str:
    """Return the distilled candidate, or the reason why there is none.

    There is none if the divergence from the teacher on held-out prompts does not fall. Raises
    TrainingCancelled if the training is cancelled.
    """
    from trans_peft.training.distill import Distillation
    from trans_peft.training.job import TrainingJob
    from trans_peft.validation.decoding.batching import is_out_of_memory

    source, base, platform = inputs.source, inputs.base, inputs.platform
    policy, recipe = inputs.recovery.distillation, source.recipe
    assert policy is not None
    if recipe is None:
        return why_not_distilled(source, policy)
    if reason := why_no_teacher(inputs, policy):
        return reason
    folder = inputs.folder()
    try:
        prompts = prompts_for(source, folder, policy, platform)
        found = Distillation(
            adapter=folder,
            old_base=base_folder(inputs.trained_on, platform),
            job=TrainingJob(
                recipe=recipe_on(recipe, base),
                base_folder=base_folder(base, platform),
                base_name=base.uri,
                base_revision=base.fingerprint_sha256,
                data_file=inputs.scratch / "prompts.jsonl",
                work_dir=platform.work_dir / "training",
            ),
            suite=max(source.suites, key=lambda suite: suite.max_new_tokens),
            policy=policy,
            on_answers=inputs.reporter(
                "answers for distillation", "prompts", base=inputs.trained_on
            ),
            on_steps=inputs.reporter("distillation", "steps"),
        ).run(prompts.examples, inputs.scratch)
    except TrainingCancelled:
        raise
    except UNUSABLE as error:
        return f"its prompts or its old base cannot be used: {error}"
    except (
        AdapterError,
        EvaluationError,
        InvalidSpecError,
        TrainingError,
        UnsupportedModelError,
    ) as error:
        return f"distillation failed: {error}".replace(str(folder), str(source))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return f"distillation failed: out of memory: {error}"
    if not found.after < found.before:
        return f"the divergence from its answers on the old base does not fall: {found.change}"
    result = found.training
    note = (
        f"{prompts.note}; {result.steps} steps, {found.teacher_s:.0f} s for the teacher's answers, "
        f"{result.seconds:.0f} s of training; {found.change}"
    )
    return Candidate(RecoveryStrategy.DISTILLED, lambda: result.folder, result.weights_sha256, note)
