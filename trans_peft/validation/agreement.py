"""Compare an adapter's outputs on two bases without labels.

There are two figures. Agreement is the share of prompts whose greedy answers are the same text on
both bases; it is computed from answer hashes, so no text has to be stored. KL is the divergence of
the next-token distribution on the new base from that on the old base, along the answer that was
given on the old base (`trans_peft.validation.decoding.next_tokens`). Both measure how much the
outputs change, not whether they improve. docs/label-free.md contains measurements of their value.
"""

from dataclasses import dataclass

from trans_peft.domain.evaluation import Evaluation
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.pairing import check_same_questions

__all__ = ["Agreement", "equal_answers"]


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of an adapter, or of the bare base, agree on two bases.

    Attributes:
        prompts: number of prompts.
        equal: number of prompts whose greedy answers are the same text.
        kl: mean KL of the next-token distributions, in nats per token.
        positions: number of token positions in `kl`.
    """

    prompts: int
    equal: int
    kl: float
    positions: int

    @property
    def points(self) -> float:
        """Share of equal answers, in percent."""
        return 100 * self.equal / self.prompts


def equal_answers(old: Evaluation, new: Evaluation) -> int:
    """Return the number of items with exactly the same answer in two evaluations.

    Raises:
        InvalidSpecError: the evaluations differ in items or decoding, or lack answer hashes.
    """
    check_same_questions(old, new)
    old_hashes = {item.id: item.answer_sha256 for item in old.items}
    if not all(old_hashes.values()) or not all(item.answer_sha256 for item in new.items):
        raise InvalidSpecError(
            f"suite {old.suite!r}: an evaluation has items without answer hashes",
            do="evaluate the suite again with this version of trans-peft",
        )
    return sum(old_hashes[item.id] == item.answer_sha256 for item in new.items)
