"""When a base version may serve: the policy that a person's wish (`champion`) is held against."""

from dataclasses import dataclass
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.names import name_problem
from trans_peft.errors import InvalidSpecError

__all__ = ["PromotionPolicy"]


@dataclass(frozen=True)
class PromotionPolicy:
    """How much of a fleet must serve on a base version before the fleet may move to it.

    `min_serving_share`: of the family's live adapters, those with their alias on that base, by
    verdict or by a person's hand (0 to 1). `required_adapters`: names that must be among them; one
    of another family is not asked here. `free_rollback`: a base that served before may serve again
    at once, however many adapters serve there and whatever verdict is missing.

    It decides what serves, never what a verdict is: no verdict's key depends on it.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    min_serving_share: float = 0.9
    required_adapters: tuple[str, ...] = ()
    free_rollback: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.min_serving_share <= 1:
            problems.append(f"min_serving_share must lie in [0, 1], not {self.min_serving_share}")
        problems += filter(
            None, (name_problem("a required adapter", name) for name in self.required_adapters)
        )
        if problems:
            raise InvalidSpecError(f"the promotion policy cannot be used: {'; '.join(problems)}")
