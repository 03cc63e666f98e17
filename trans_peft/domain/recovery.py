"""Recovery strategies for adapters that do not pass on a new base with direct transfer."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.identity import ADDED_LATER
from trans_peft.errors import InvalidSpecError

__all__ = [
    "COMPENSABLE_TYPES",
    "MIN_PROMPTS",
    "CompensationPolicy",
    "DistillationPolicy",
    "PromptsPolicy",
    "RecoveryPolicy",
    "RecoveryStrategy",
    "StrategyAttempt",
]


COMPENSABLE_TYPES = frozenset({"BOTTLENECK", "LORA"})
"""Types of adapters that can be compensated, in PEFT's spelling. DoRA is a LORA with an option."""

MIN_PROMPTS = 32
"""Prompts below which `compensated` and `distilled` are not tried."""


class RecoveryStrategy(StrEnum):
    """The strategies, in the order in which they are tried. The first that passes ends the search.

    docs/verdicts.md describes what each strategy does.
    """

    DIRECT = "direct"
    RESCALED = "rescaled"
    COMPENSATED = "compensated"
    DISTILLED = "distilled"
    RETUNED = "re-tuned"
    RETRAINED = "retrained"


_ADAPTER = "{adapter}"


@dataclass(frozen=True)
class PromptsPolicy:
    """Prompts of the strategies that read no training row.

    Attributes:
        prompts_uri: file of prompts, such as recent traffic; "{adapter}" stands for the adapter's
            name. Empty: the adapter's own prompts (`synthetic_prompts` of its recipe).
        prompts: number of prompts that the adapter answers on the base that it was trained on.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    prompts_uri: str = ""
    prompts: int = 320

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, not {getattr(self, name)}"
            for name, least in {"prompts": MIN_PROMPTS, **self._least()}.items()
            if getattr(self, name) < least
        ]
        if "{" in self.prompts_uri.replace(_ADAPTER, ""):
            problems.append(f"prompts_uri may contain {_ADAPTER} only, found {self.prompts_uri!r}")
        problems += self._problems()
        if problems:
            name = type(self).__name__.removesuffix("Policy").lower()
            raise InvalidSpecError(f"the {name} policy is invalid: {'; '.join(problems)}")

    def _least(self) -> dict[str, int]:
        """Return the smallest value of each further field that is a number of things."""
        return {}

    def _problems(self) -> list[str]:
        """Return the problems of further fields."""
        return []

    def prompts_of(self, adapter: str) -> str:
        """Return the URI of an adapter's prompts."""
        return self.prompts_uri.replace(_ADAPTER, adapter)


@dataclass(frozen=True)
class CompensationPolicy(PromptsPolicy):
    """Settings of the strategy `compensated`, which trains nothing and reads no training row.

    A matrix of low rank is added to the adapter in every linear module that the update changed. It
    restores the module's outputs on the inputs that the adapter has while it answers the prompts.

    Attributes:
        rank: rank of these matrices. The adapter's rank grows by it.
        output_layer: whether the output layer (`lm_head`) is compensated as well, if the adapter
            does not adapt it already. Some servers load no LoRA matrices for it, such as vLLM on
            Qwen2.5, and merging them into a base with tied embeddings changes the input embedding.
    """

    rank: int = 16
    output_layer: bool = True

    def _least(self) -> dict[str, int]:
        return {"rank": 1}


@dataclass(frozen=True)
class DistillationPolicy(PromptsPolicy):
    """Settings of the strategy `distilled`, which reads no training row.

    The adapter on the base that it was trained on answers prompts (the teacher). A tenth of them is
    held out. The adapter on the new base is trained on the teacher's probabilities, from its old
    weights.

    Attributes:
        steps: optimizer steps.
        batch_size: prompts per step, over all processes. Micro-batches are not larger than the
            recipe's.
        learning_rate: largest learning rate of AdamW; it follows a cosine.
        beta: None: the teacher's probabilities are those of the adapter on its old base. Otherwise
            they are those of the new base, changed by `beta` times the adapter's change on the old
            base, which keeps what the update improved.
    """

    steps: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    beta: float | None = None

    def _least(self) -> dict[str, int]:
        return {"steps": 1, "batch_size": 1}

    def _problems(self) -> list[str]:
        problems = []
        if not 0 < self.learning_rate <= 1:
            problems.append(f"learning_rate must lie in (0, 1], not {self.learning_rate}")
        if self.beta is not None and not 0 < self.beta <= 10:
            problems.append(f"beta must lie in (0, 10], not {self.beta}")
        return problems


@dataclass(frozen=True)
class RecoveryPolicy:
    """The strategies that are tried after direct transfer. By default there are none.

    No strategy is trained on an item of a suite. `compensated` and `distilled` read no training row
    either; the other strategies do.

    Attributes:
        scales: factors for the adapter's scale. The factor under which the training rows are most
            likely on the new base is tried. Positive, distinct, and without 1.
        compensation: settings of the strategy `compensated`. None switches it off.
        distillation: settings of the strategy `distilled`. None switches it off.
        retune_steps: optimizer steps of further training on the new base, from the old weights. 0
            switches re-tuning off.
        retrain: whether a separate flow run trains the adapter on the new base with its recipe.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    scales: tuple[float, ...] = ()
    compensation: CompensationPolicy | None = field(default=None, metadata=ADDED_LATER)
    distillation: DistillationPolicy | None = field(default=None, metadata=ADDED_LATER)
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
            RecoveryStrategy.COMPENSATED: self.compensation is not None,
            RecoveryStrategy.DISTILLED: self.distillation is not None,
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
        if not self.verdict:
            return f"{self.strategy}: not tried ({self.reason})"
        note = f" ({self.note})" if self.note else ""
        # Evaluations that were made before, or together with others, are not in the seconds.
        took = f", {self.seconds:.0f} s" if self.seconds >= 0.5 else ""
        return f"{self.strategy}{note}: {self.verdict}{took}"
