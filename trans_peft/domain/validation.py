"""Validation during training: which rows are held out, how often, and what follows from it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.data import DataSource
from trans_peft.domain.field_checks import choice_problems, count_problems
from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import InvalidSpecError

__all__ = ["ValidationSettings"]

_Keep = Literal["best", "last"]
_COUNTS = {"every_steps": (1, 10_000_000), "stop_after": (0, 10_000)}


@dataclass(frozen=True)
class ValidationSettings:
    """The loss on rows that are not trained on, computed during the training.

    InvalidSpecError, with all problems at once, for a value outside its range, and unless exactly
    one of `data` and `share` is given.

    Attributes:
        data: validation rows. No prompt of theirs may be a prompt of the training rows.
        share: share of the training rows to hold out instead, at most 0.5. The hash of a row's
            prompt decides, so that every seed holds out the same rows, and rows with one prompt are
            on one side.
        every_steps: steps between two computations of the loss. The last step has one as well.
        stop_after: computations in a row without a lower loss after which the training stops. 0:
            it does not stop. (stop_after + 1) * every_steps must be less than the steps of the run.
        keep: weights that become the adapter: those with the lowest loss, or those of the last
            step.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    data: DataSource | None = None
    share: float = 0.0
    every_steps: int = 50
    stop_after: int = 0
    keep: _Keep = "best"

    def __post_init__(self) -> None:
        problems = count_problems(self, _COUNTS) + choice_problems(self, keep=_Keep)
        if not (is_finite_number(self.share) and 0 <= self.share <= 0.5):
            problems.append(f"share must lie in [0, 0.5], not {self.share!r}")
        elif (self.data is None) == (self.share == 0):
            problems.append("give either data, a file of validation rows, or share, of the rows")
        if problems:
            raise InvalidSpecError(f"the validation settings are invalid: {'; '.join(problems)}")
