"""Prompts for the recovery strategies without training rows, from a file or kept with the adapter.

Prompts that a suite asks, exactly or nearly, are left out, so that the gate measures on prompts
that the recovery has not seen.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from trans_peft.data import Example, read_prompts
from trans_peft.data.overlap import distinct_from
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.data import DataSource
from trans_peft.domain.recovery import MIN_PROMPTS, PromptsPolicy
from trans_peft.errors import DataError
from trans_peft.lifecycle.synthetic_prompts import kept_prompts, suite_prompts
from trans_peft.ports import Platform

__all__ = ["Prompts", "prompts_for"]


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts, and where they come from."""

    examples: tuple[Example, ...]
    note: str


def prompts_for(
    source: AdapterVersion, folder: Path, policy: PromptsPolicy, platform: Platform
) -> Prompts:
    """Return at most `policy.prompts` prompts for an adapter, whose PEFT folder is `folder`.

    Raises DataError if there are fewer than `MIN_PROMPTS` distinct ones, and what `read_prompts`
    and `kept_prompts` raise.
    """
    items = suite_prompts(source.suites, platform.store)
    if policy.prompts_uri:
        uri = policy.prompts_of(source.adapter)
        read, origin = read_prompts(DataSource(uri), platform.store), f"of {uri}"
    else:
        read, origin = kept_prompts(folder), "that were kept with the adapter"
    shuffled = random.Random(0).sample(read.prompts, len(read.prompts))
    found = distinct_from(shuffled, items, text=Example.prompt_text, limit=policy.prompts)
    note = f"{len(found)} prompts {origin}"
    if read.answered and policy.prompts_uri:
        note += f", whose {read.answered} answers were not used"
    if read.invalid:
        note += f"; {len(read.invalid)} rows are not valid prompts"
    if len(found) < MIN_PROMPTS:
        raise DataError(
            f"there are too few prompts for {source.adapter}",
            expected=f"at least {MIN_PROMPTS} that differ from each other and from the suites",
            found=note,
            do="add prompts of this adapter's task",
        )
    return Prompts(tuple(found), note)
