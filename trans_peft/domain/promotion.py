"""Promotion policy: when the fleet may move to the base version with the alias `champion`."""

from dataclasses import dataclass
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.names import name_problem
from trans_peft.errors import InvalidSpecError

__all__ = ["PromotionPolicy"]


@dataclass(frozen=True)
class PromotionPolicy:
    """The part of a fleet that must serve on a base version before the fleet may move to it.

    The policy decides which base serves. It does not affect verdicts or their keys.

    Attributes:
        min_serving_share: Required share (0 to 1) of the family's live adapters that serve on the
            base, by verdict or by manual override.
        required_adapters: Adapters that must serve on it. Adapters of other families are ignored.
        free_rollback: Whether a base that served before may serve again at once, regardless of the
            other fields and of missing verdicts.
        fdr: Largest expected share of wrongly passed adapters among those that serve on a base by
            verdict. An adapter that passed serves only if e-BH selects it at this target. Needs a
            sequential gate policy. None: every adapter that passed serves.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    min_serving_share: float = 0.9
    required_adapters: tuple[str, ...] = ()
    free_rollback: bool = True
    fdr: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.min_serving_share <= 1:
            problems.append(f"min_serving_share must lie in [0, 1], not {self.min_serving_share}")
        if self.fdr is not None and not 0 < self.fdr < 1:
            problems.append(f"fdr must lie in (0, 1), not {self.fdr}")
        problems += filter(
            None, (name_problem("a required adapter", name) for name in self.required_adapters)
        )
        if problems:
            raise InvalidSpecError(f"the promotion policy is invalid: {'; '.join(problems)}")
