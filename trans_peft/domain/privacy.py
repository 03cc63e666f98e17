"""Differential privacy of a training: the guarantee, and what bounds the effect of one row."""

from dataclasses import dataclass
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.field_checks import count_problems
from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import InvalidSpecError

__all__ = ["PrivacySettings"]

_MAX_EPSILON = 100.0
_MIN_DELTA = 1e-10  # the accountant's sums of float64 are not exact far below


@dataclass(frozen=True)
class PrivacySettings:
    """(epsilon, delta)-differential privacy of a training, with a row as the unit.

    For each set of results, its probability with a row is at most exp(epsilon) times the
    probability without that row, plus delta (Dwork et al. 2006). The training is DP-SGD (Abadi et
    al. 2016): each step draws every row with probability `batch_size` / rows, clips the gradient of
    each drawn row, and adds Gaussian noise to the sum. InvalidSpecError, with all problems at once,
    for a value outside its range.

    Attributes:
        epsilon: bound of the log-ratio. Above 0, at most 100.
        delta: probability that the bound may fail. From 1e-10; it must be less than 1 / rows, which
            is checked once the rows are known.
        clip: norm to which the gradient of one row is clipped. Above 0.
        batch_size: expected number of rows of a step, at most the rows.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    epsilon: float
    delta: float = 1e-5
    clip: float = 1.0
    batch_size: int = 256

    def __post_init__(self) -> None:
        problems = count_problems(self, {"batch_size": (1, 1_000_000)})
        if not (is_finite_number(self.epsilon) and 0 < self.epsilon <= _MAX_EPSILON):
            problems.append(
                f"epsilon must be above 0 and at most {_MAX_EPSILON:g}, not {self.epsilon!r}"
            )
        if not (is_finite_number(self.delta) and _MIN_DELTA <= self.delta < 1):
            problems.append(f"delta must lie in [{_MIN_DELTA:g}, 1), not {self.delta!r}")
        if not (is_finite_number(self.clip) and self.clip > 0):
            problems.append(f"clip must be finite and above 0, not {self.clip!r}")
        if problems:
            raise InvalidSpecError(f"privacy is invalid: {'; '.join(problems)}")
        for name in ("epsilon", "delta", "clip"):  # 8 and 8.0 have one hash
            object.__setattr__(self, name, float(getattr(self, name)))
