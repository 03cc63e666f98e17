"""The strategy `compensated`: restore the outputs of the old base on the adapter's own inputs.

No weight is trained. The prompts and the teacher's answers are in memory only.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from trans_peft.data import Example, prompt_ids
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import (
    AdapterError,
    DataError,
    EvaluationError,
    InvalidSpecError,
    UnsupportedModelError,
)
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.recovery.candidates import Candidate, CandidateInputs
from trans_peft.lifecycle.recovery.prompts import prompts_for
from trans_peft.lifecycle.recovery.teacher import UNUSABLE, why_no_teacher
from trans_peft.models import adapter_weights_sha256
from trans_peft.text.saved_template import saved_template

if TYPE_CHECKING:
    from torch import Tensor

    from trans_peft.transfer.module_inputs import ModuleInputs

__all__ = ["answering_inputs", "compensated"]


def compensated(inputs: CandidateInputs) -> Candidate | str:
    """Return the compensated candidate, or the reason why there is none."""
    from trans_peft.bases.drift import weight_pairs
    from trans_peft.transfer.compensation import compensate
    from trans_peft.transfer.low_rank_matrices import not_compensable
    from trans_peft.validation.decoding.batching import is_out_of_memory

    source, policy = inputs.source, inputs.recovery.compensation
    assert policy is not None
    if reason := why_no_teacher(inputs, policy):
        return reason
    folder, target = inputs.folder(), inputs.scratch / "compensated"
    if reason := not_compensable(folder):
        return reason
    try:
        prompts = prompts_for(source, folder, policy, inputs.platform)
        old_base = base_folder(inputs.trained_on, inputs.platform)
        new_base = base_folder(inputs.base, inputs.platform)
        suite = max(source.suites, key=lambda suite: suite.max_new_tokens)
        pairs = weight_pairs(old_base, new_base)
        read, answered = answering_inputs(
            folder,
            old_base,
            suite,
            prompts.examples,
            on_answers=inputs.reporter(
                "answers for compensation", "prompts", base=inputs.trained_on
            ),
            on_inputs=inputs.reporter("inputs for compensation", "prompts", base=inputs.trained_on),
        )
        weights = _reporting(
            pairs,
            {module.weight for module in read.values()},
            inputs.reporter("matrices for compensation", "modules"),
        )
        found = compensate(
            folder, weights, read, policy.rank, target, output_layer=policy.output_layer
        )
    except UNUSABLE as error:
        return f"its prompts or its old base cannot be used: {error}"
    except (AdapterError, EvaluationError, InvalidSpecError, UnsupportedModelError) as error:
        return f"compensation failed: {error}".replace(str(folder), str(source))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return f"compensation failed: out of memory: {error}"
    note = f"{prompts.note}, {answered} of them answered; rank {policy.rank}; {found}"
    return Candidate(
        RecoveryStrategy.COMPENSATED, lambda: target, adapter_weights_sha256(target), note
    )


def _reporting(
    weights: "Iterable[tuple[str, Tensor, Tensor]]",
    compensated: Collection[str],
    report: Callable[[int, int], None],
) -> "Iterator[tuple[str, Tensor, Tensor]]":
    """Yield the weights, and report how many of the compensated ones the consumer has done."""
    done = 0
    for weight in weights:
        yield weight
        if weight[0] in compensated:
            done += 1
            report(done, len(compensated))


def answering_inputs(
    folder: Path,
    old_base: Path,
    suite: Suite,
    prompts: Sequence[Example],
    *,
    on_answers: Callable[[int, int], None] = lambda done, total: None,
    on_inputs: Callable[[int, int], None] = lambda done, total: None,
) -> "tuple[Mapping[str, ModuleInputs], int]":
    """Return the inputs of the modules while an adapter on its old base answers prompts.

    The second value is the number of prompts that were answered.

    The first prompts that have `MAX_TOKENS` together are answered, and at least one. Prompts with
    more tokens are left out if there are others. `folder` is the PEFT folder. The suite gives the
    dtype and the decoding settings; no item of it is read.

    Raises DataError if no prompt fits into the base's context together with an answer.
    """
    from trans_peft.models import load_base
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.transfer.module_inputs import MAX_TOKENS, module_inputs
    from trans_peft.validation.decoding.generation import generate
    from trans_peft.validation.evaluate import context_of

    old = load_base(old_base, suite.dtype)
    ids = prompt_ids(prompts, old.tokenizer, saved_template(folder))
    context = context_of(old.model)
    if context is not None:
        ids = [prompt for prompt in ids if len(prompt) + suite.max_new_tokens <= context]
    if not ids:
        raise DataError(
            "no prompt fits into the context of the old base together with an answer",
            expected=f"{context} tokens, of which {suite.max_new_tokens} for the answer",
            do="pass shorter prompts",
        )
    ids = [prompt for prompt in ids if len(prompt) <= MAX_TOKENS] or ids[:1]
    ends = accumulate(map(len, ids))
    ids = [prompt for prompt, end in zip(ids, ends, strict=True) if end <= MAX_TOKENS] or ids[:1]
    with attached(old.model, folder) as model:
        answers = generate(
            model,
            old.tokenizer,
            ids,
            max_new_tokens=suite.max_new_tokens,
            stop=suite.stop,
            on_progress=on_answers,
        )
    rows = [[*prompt, *answer] for prompt, answer in zip(ids, answers.ids, strict=True)]
    return module_inputs(old.model, folder, rows, on_inputs), len(rows)
