"""Recovery strategies for adapters that do not pass on a new base with direct transfer."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.errors import InvalidSpecError

__all__ = ["RecoveryPolicy", "RecoveryStrategy", "StrategyAttempt"]


class RecoveryStrategy(StrEnum):
    """The strategies, in the order in which they are tried. The first that passes ends the search.

    docs/verdicts.md describes what each strategy does.
    """

    DIRECT = "direct"
    RESCALED = "rescaled"
    RETUNED = "re-tuned"
    RETRAINED = "retrained"


@dataclass(frozen=True)
class RecoveryPolicy:
    """The strategies that are tried after direct transfer. By default there are none.

    All strategies use the adapter's training rows. None of them reads an item of a suite.

    Attributes:
        scales: factors for the adapter's scale. The factor under which the training rows are most
            likely on the new base is tried. Positive, distinct, and without 1.
        retune_steps: optimizer steps of further training on the new base, from the old weights. 0
            switches re-tuning off.
        retrain: whether a separate flow run trains the adapter on the new base with its recipe.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
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
            problems.append("scales must not contain 1, because direct transfer is always tried")
        if len(set(self.scales)) != len(self.scales):
            problems.append(f"scales must be distinct, not {list(self.scales)}")
        if self.retune_steps < 0:
            problems.append(f"retune_steps must be at least 0, not {self.retune_steps}")
        if problems:
            raise InvalidSpecError(f"the recovery policy is invalid: {'; '.join(problems)}")

    @property
    def strategies(self) -> tuple[RecoveryStrategy, ...]:
        """The strategies of this policy, direct transfer first."""
        enabled = {
            RecoveryStrategy.RESCALED: bool(self.scales),
            RecoveryStrategy.RETUNED: self.retune_steps > 0,
            RecoveryStrategy.RETRAINED: self.retrain,
        }
        return (RecoveryStrategy.DIRECT, *(strategy for strategy, on in enabled.items() if on))


@dataclass(frozen=True)
class StrategyAttempt:
    """The result of one recovery strategy.

    Attributes:
        strategy: the strategy.
        verdict: the gate's verdict; empty if the strategy could not be tried.
        reason: the reason for the verdict, or why the strategy could not be tried.
        seconds: duration of making, evaluating and judging the candidate.
        note: settings of the candidate, such as the factor or the number of steps.
    """

    strategy: RecoveryStrategy
    verdict: str
    reason: str
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.strategy}{note}: {self.verdict or 'not tried'}, {self.seconds:.0f} s"
