"""Compare the answers of an adapter on two base versions without labels.

For data that must not be stored with labels: the evaluation store keeps the answers to public
prompts. No verdict follows from the comparison (docs/label-free.md).
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from trans_peft.data import prompt_ids, read_examples
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation, Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import (
    BARE_BASE,
    EvaluationSubject,
    evaluate_on,
)
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import Platform
from trans_peft.text.saved_template import saved_template
from trans_peft.validation.agreement import (
    Agreement,
    equal_answers,
)
from trans_peft.validation.decoding.next_tokens import NextTokens, mean_kl, next_tokens
from trans_peft.validation.tokenized_suite import with_answers

__all__ = ["LabelFreeComparison", "compare_label_free"]


@dataclass(frozen=True)
class LabelFreeComparison:
    """How far the answers on two base versions agree.

    Attributes:
        adapter: The agreement of the adapter's answers.
        bare: The agreement of the bare base's answers.
    """

    adapter: Agreement
    bare: Agreement


def compare_label_free(
    adapter: Path,
    old: BaseVersion,
    new: BaseVersion,
    prompts: Suite,
    platform: Platform,
    *,
    on_progress: ProgressCallback | None = None,
) -> LabelFreeComparison:
    """Return how far answers to `prompts` agree on two bases, with an adapter and without.

    `adapter` is a PEFT folder. `prompts` is a pinned suite with `keep_answers`; its completions and
    its scoring rule have no effect. Stored answers are reused. Each base is loaded once. Raises
    InvalidSpecError for a suite that keeps no answers, decodes none or samples them.
    """
    if prompts.is_choice or prompts.is_sampled or not prompts.keep_answers:
        raise InvalidSpecError(
            f"suite {prompts.name!r} cannot be compared without labels",
            expected="greedy answers (no temperature), and keep_answers: true",
            found=f"scoring {prompts.scoring}, temperature: {prompts.temperature}, "
            f"keep_answers: {prompts.keep_answers}",
            do="use public prompts, and set keep_answers in the suite",
        )
    weights_sha256 = adapter_weights_sha256(adapter)
    subjects = (EvaluationSubject("adapter", weights_sha256, lambda: adapter), BARE_BASE)

    def evaluated(base: BaseVersion, subject: EvaluationSubject) -> Evaluation:
        found = evaluate_on(base, [prompts], platform, subject, on_progress=on_progress)
        return found[prompts.name]

    # Everything on the old base is computed first: only one base is in memory at a time.
    before = [evaluated(old, subject) for subject in subjects]
    tokens_before = [
        _next_tokens(answers, old, subject, prompts, platform)
        for answers, subject in zip(before, subjects, strict=True)
    ]
    after = [
        evaluated(new, replace(subject, reference={prompts.name: answers}))
        for answers, subject in zip(before, subjects, strict=True)
    ]
    agreements = []
    for index, subject in enumerate(subjects):
        tokens = tokens_before[index]
        tokens_after = _next_tokens(before[index], new, subject, prompts, platform, like=tokens)
        agreements.append(
            Agreement(
                prompts=len(before[index].items),
                equal=equal_answers(before[index], after[index]),
                kl=mean_kl(tokens, tokens_after),
                positions=len(tokens.rest),
            )
        )
    return LabelFreeComparison(*agreements)


def _next_tokens(
    recorded: Evaluation,
    base: BaseVersion,
    subject: EvaluationSubject,
    prompts: Suite,
    platform: Platform,
    *,
    like: NextTokens | None = None,
) -> NextTokens:
    """Return the subject's distributions of the next token along recorded answers."""
    from trans_peft.models import load_base
    from trans_peft.transfer.load_adapter import attached

    loaded = load_base(base_folder(base, platform), prompts.dtype)
    examples = read_examples(prompts.data, platform.store, limit=prompts.limit)
    if any(example.id not in recorded.kept_answers for example in examples):
        raise InvalidSpecError(
            f"the stored answers to suite {prompts.name!r} on {base.version} have no texts",
            found="an evaluation that was stored before the suite had keep_answers: true",
            do="give the suite another name, so that it is evaluated again",
        )
    folder = None if subject.folder is None else subject.folder()
    template = None if folder is None else saved_template(folder)
    prompt_tokens = prompt_ids(examples, loaded.tokenizer, template)
    wholes = with_answers(
        loaded.tokenizer,
        [
            (example, ids, recorded.kept_answers[example.id])
            for example, ids in zip(examples, prompt_tokens, strict=True)
        ],
    )
    pairs = [(ids, whole[len(ids) :]) for ids, whole in zip(prompt_tokens, wholes, strict=True)]
    with nullcontext(loaded.model) if folder is None else attached(loaded.model, folder) as model:
        return next_tokens(model, pairs, like=like)
