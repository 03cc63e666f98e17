"""Prompts for the recovery strategy `distilled`, from a file or written by the base itself.

No training row is read. Prompts that a suite asks, exactly or nearly, are left out, so that the
gate measures on prompts that the distillation has not seen.
"""

import random
from dataclasses import dataclass

from trans_peft.data import Example, read_examples, read_prompts
from trans_peft.data.overlap import distinct_from
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.data import DataSource
from trans_peft.domain.recovery import MIN_PROMPTS, DistillationPolicy
from trans_peft.errors import DataError
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.ports import Platform

__all__ = ["Prompts", "prompts_for"]


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts, and where they come from."""

    examples: tuple[Example, ...]
    note: str


def prompts_for(
    source: AdapterVersion, base: BaseVersion, policy: DistillationPolicy, platform: Platform
) -> Prompts:
    """Return at most `policy.prompts` prompts for an adapter.

    Raises DataError if there are fewer than `MIN_PROMPTS` distinct ones, or no source; and what
    `read_prompts` raises.
    """
    items = [
        example.prompt_text()
        for suite in source.suites
        for example in read_examples(suite.data, platform.store, limit=suite.limit)
    ]
    if policy.prompts_uri:
        uri = policy.prompts_of(source.adapter)
        read = read_prompts(DataSource(uri), platform.store)
        shuffled = random.Random(0).sample(read.prompts, len(read.prompts))
        found = distinct_from(shuffled, items, text=Example.prompt_text, limit=policy.prompts)
        note = f"{len(found)} prompts of {uri}"
        if read.answered:
            note += f", whose {read.answered} answers were not used"
        if read.invalid:
            note += f"; {len(read.invalid)} rows are not valid prompts"
    else:
        approved = source.recipe.approved_prompts if source.recipe is not None else None
        if approved is None:
            raise DataError(
                f"there are no prompts for {source.adapter}",
                expected="prompts_uri in the policy, or approved_prompts in the recipe",
                do="name a file with recent prompts, or train with prompts that may be kept",
            )
        from trans_peft.models import load_base
        from trans_peft.training.written_prompts import like_examples

        examples = read_prompts(approved, platform.store).prompts
        loaded = load_base(base_folder(base, platform), source.suites[0].dtype)
        found = like_examples(loaded, examples, items, policy.prompts)
        note = f"{len(found)} prompts written by {base} like {len(examples)} approved ones"
    if len(found) < MIN_PROMPTS:
        raise DataError(
            f"there are too few prompts for {source.adapter}",
            expected=f"at least {MIN_PROMPTS} that differ from each other and from the suites",
            found=note,
            do="add prompts of this adapter's task",
        )
    return Prompts(tuple(found), note)
