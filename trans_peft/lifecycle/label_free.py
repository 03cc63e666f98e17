"""How much an adapter's answers change with its base, beside how much the base's own do.

For places where no labelled data may be kept: what is stored are the recorded answers to prompts
that anybody may read. No verdict follows from it (docs/label-free.md).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from trans_peft.data import prompt_ids, read_examples
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation, Suite
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.evaluations import ProgressCallback, base_folder, evaluate_on
from trans_peft.models import adapter_weights_sha256
from trans_peft.ports import Platform
from trans_peft.text.saved_template import saved_template
from trans_peft.validation.agreement import (
    Agreement,
    NextTokens,
    equal_answers,
    mean_kl,
    next_tokens,
)
from trans_peft.validation.tokenized_suite import with_answers

__all__ = ["LabelFreeComparison", "compare_label_free"]


@dataclass(frozen=True)
class LabelFreeComparison:
    """What two bases changed in the answers of an adapter, and in those of the bare base."""

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
    """Return how far the answers to `prompts` agree on two bases, with the adapter and without.

    `prompts` is a pinned suite that keeps its answers; its completions and its rule decide nothing.
    Answers that the store holds are taken from there. Each base is loaded once. InvalidSpecError
    for a suite that keeps no answers or decodes none.
    """
    if prompts.is_choice or not prompts.keep_answers:
        raise InvalidSpecError(
            f"suite {prompts.name!r} cannot be compared without labels",
            expected="decoded answers, and keep_answers: true",
            found=f"scoring {prompts.scoring}, keep_answers: {prompts.keep_answers}",
            do="take public prompts, and let the suite keep what is answered to them",
        )
    sides = {adapter_weights_sha256(adapter): adapter, BARE: None}

    def answered(base: BaseVersion, before: dict[str, Evaluation] | None) -> dict[str, Evaluation]:
        return {
            weights: evaluate_on(
                base,
                [prompts],
                platform,
                adapter=None if folder is None else lambda: adapter,
                weights_sha256=weights,
                elsewhere=None if before is None else {prompts.name: before[weights]},
                on_progress=on_progress,
            )[prompts.name]
            for weights, folder in sides.items()
        }

    # All that is asked of the old base is asked before the new one takes its place in memory.
    said = answered(old, None)
    expected = {
        weights: _expected(said[weights], old, folder, prompts, platform)
        for weights, folder in sides.items()
    }
    says = answered(new, said)

    def agreement(weights: str, folder: Path | None) -> Agreement:
        before = expected[weights]
        after = _expected(said[weights], new, folder, prompts, platform, like=before)
        return Agreement(
            prompts=len(said[weights].items),
            equal=equal_answers(said[weights], says[weights]),
            kl=mean_kl(before, after),
            positions=len(before.rest),
        )

    return LabelFreeComparison(*(agreement(weights, folder) for weights, folder in sides.items()))


def _expected(
    said: Evaluation,
    base: BaseVersion,
    adapter: Path | None,
    prompts: Suite,
    platform: Platform,
    *,
    like: NextTokens | None = None,
) -> NextTokens:
    """Return what the adapter (None: the bare base) expects along answers that were recorded."""
    from trans_peft.models import load_base
    from trans_peft.transfer.load_adapter import attached

    loaded = load_base(base_folder(base, platform), prompts.dtype)
    examples = read_examples(prompts.data, platform.store, limit=prompts.limit)
    if any(example.id not in said.kept_answers for example in examples):
        raise InvalidSpecError(
            f"the stored answers to suite {prompts.name!r} on {base.version} have no texts",
            found="they were given while the suite did not keep its answers",
            do="give the suite another name, so that they are asked for again",
        )
    template = None if adapter is None else saved_template(adapter)
    asked = prompt_ids(examples, loaded.tokenizer, template)
    wholes = with_answers(
        loaded.tokenizer,
        [(e, ids, said.kept_answers[e.id]) for e, ids in zip(examples, asked, strict=True)],
    )
    pairs = [(ids, whole[len(ids) :]) for ids, whole in zip(asked, wholes, strict=True)]
    with nullcontext(loaded.model) if adapter is None else attached(loaded.model, adapter) as model:
        return next_tokens(model, pairs, like=like)
