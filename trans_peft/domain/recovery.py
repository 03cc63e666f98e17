"""What is tried where an adapter does not pass on a new base as it is, and what came of it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.errors import InvalidSpecError

__all__ = ["RecoveryPolicy", "RecoveryStrategy", "StrategyAttempt"]


class RecoveryStrategy(StrEnum):
    """The ladder, in the order in which it is climbed; it ends at the first that passes."""

    DIRECT = "direct"
    RESCALED = "rescaled"
    RETUNED = "re-tuned"
    RETRAINED = "trained anew"


@dataclass(frozen=True)
class RecoveryPolicy:
    """Which rungs there are beyond direct transfer: none by default.

    `scales`: factors of the adapter's own scale; the one that suits its training rows best on the
    new base is tried. `retune_steps`: steps of training that go on from the old weights there.
    `retrain`: train by the adapter's recipe on the new base, in a flow run of its own. All
    of them read training rows, never an item that judges.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    scales: tuple[float, ...] = ()
    retune_steps: int = 0
    retrain: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"scales must be positive and finite, not {scale}"
            for scale in self.scales
            if not 0 < scale < float("inf")
        ]
        if 1 in self.scales:
            problems.append("a scale of 1 is direct transfer, which is tried anyway")
        if len(set(self.scales)) != len(self.scales):
            problems.append("scales are given twice")
        if self.retune_steps < 0:
            problems.append(f"retune_steps must not be negative, not {self.retune_steps}")
        if problems:
            raise InvalidSpecError(f"the recovery policy cannot be used: {'; '.join(problems)}")

    @property
    def strategies(self) -> tuple[RecoveryStrategy, ...]:
        """The rungs of the ladder, direct transfer first."""
        beyond = {
            RecoveryStrategy.RESCALED: bool(self.scales),
            RecoveryStrategy.RETUNED: self.retune_steps > 0,
            RecoveryStrategy.RETRAINED: self.retrain,
        }
        return (RecoveryStrategy.DIRECT, *(strategy for strategy, on in beyond.items() if on))


@dataclass(frozen=True)
class StrategyAttempt:
    """One rung that was tried. `verdict` is empty where it could not be, and `reason` says why.

    `note` says what it was made with (the factor, the steps). `seconds` is its whole cost on this
    machine: making it, evaluating it, judging it.
    """

    strategy: RecoveryStrategy
    verdict: str
    reason: str
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        made = f" ({self.note})" if self.note else ""
        return f"{self.strategy}{made}: {self.verdict or 'not tried'}, {self.seconds:.0f} s"
