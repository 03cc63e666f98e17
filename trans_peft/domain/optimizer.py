"""How long an adapter is trained, with which optimizer, and at which learning rates."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.field_checks import choice_problems, count_problems, interval_problems
from trans_peft.domain.identity import ADDED_LATER
from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import InvalidSpecError

__all__ = ["MAX_TRAINED_ROWS", "OptimizerSettings"]

MAX_TRAINED_ROWS = 100_000_000
"""Rows of a whole run, repetitions included. Training keeps the order of all of them in memory."""

_DEFAULT_STEPS = 100

_ROUNDING = 1e-12
"""Bound of the relative error of a product of float64 numbers: 1.1 * 100 is 110.00000000000001."""

_Optimizer = Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]
_Schedule = Literal["cosine", "linear", "constant"]

_COUNTS = {
    "steps": (1, 10_000_000),
    "batch_size": (1, 1_000_000),
    "gradient_accumulation": (1, 1_000_000),
    "warmup_steps": (0, 10_000_000),
    "max_length": (2, 10_000_000),
}
_INTERVALS = {
    "warmup_ratio": (0.0, 1.0),
    "neftune_alpha": (0.0, 1000.0),
    "loraplus_lr_ratio": (1.0, 1000.0),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW, of its learning rate, and of the rows of a step.

    `docs/training.md` has the default of each field with its reason. InvalidSpecError, with all
    problems at once, for a value outside its range, for `epochs` together with `steps`, and for
    `warmup_ratio` together with `warmup_steps`.

    Attributes:
        learning_rate: peak of the schedule. Above 0, at most 10.
        steps: optimizer steps of the run. At most 10,000,000; 100 if `epochs` is not given either.
        batch_size: rows per process and micro-step.
        gradient_accumulation: micro-steps per optimizer step.
        warmup_steps: steps before the peak, with a linear rise. Fewer than the steps of the run.
        weight_decay: AdamW's decoupled decay. At least 0, and less than 1 over the highest learning
            rate, which is learning_rate * loraplus_lr_ratio, because a step multiplies a weight by
            1 - its rate * weight_decay.
        max_grad_norm: norm to which gradients are clipped. 0 switches clipping off.
        max_length: tokens after which a row is cut. At least 2, a prompt token and an answer token.
        epochs: passes over the rows, instead of `steps`. Above 0, at most 10,000. `for_rows`
            computes the steps.
        warmup_ratio: share of the steps before the peak, instead of `warmup_steps`. In [0, 1).
        schedule: learning rate after the warm-up: `cosine` and `linear` fall to 0.
        name: the optimizer, as transformers names it. The 8-bit and paged ones need bitsandbytes
            and a GPU.
        betas: AdamW's decay rates of the two moments. Each in [0, 1).
        epsilon: AdamW's term in the denominator. Above 0, at most 1.
        loraplus_lr_ratio: learning rate of LoRA's B, with its bias, over that of its A and of all
            other weights (LoRA+, Hayou et al. 2024). A and B of an embedding have PEFT's rate of
            1e-6 instead. 1 gives all weights the same rate.
        neftune_alpha: scale of the uniform noise on the embeddings of a training row (NEFTune, Jain
            et al. 2023). 0 adds none.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    learning_rate: float = 3e-4
    steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    epochs: float | None = field(default=None, metadata=ADDED_LATER)
    warmup_ratio: float = field(default=0.0, metadata=ADDED_LATER)
    schedule: _Schedule = field(default="cosine", metadata=ADDED_LATER)
    name: _Optimizer = field(default="adamw_torch_fused", metadata=ADDED_LATER)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=ADDED_LATER)
    epsilon: float = field(default=1e-8, metadata=ADDED_LATER)
    loraplus_lr_ratio: float = field(default=1.0, metadata=ADDED_LATER)
    neftune_alpha: float = field(default=0.0, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", _DEFAULT_STEPS)
        counts = dict(_COUNTS)
        if self.steps is None:
            del counts["steps"]
        problems = count_problems(self, counts) + interval_problems(self, _INTERVALS)
        problems += choice_problems(self, schedule=_Schedule, name=_Optimizer)
        problems += self._number_problems()
        if self.steps is not None and self.epochs is not None:
            problems.append(
                f"steps={self.steps!r} and epochs={self.epochs!r} are both given: remove one"
            )
        if self.warmup_steps and self.warmup_ratio:
            problems.append(
                f"warmup_steps={self.warmup_steps!r} and warmup_ratio={self.warmup_ratio!r} are "
                "both given: remove one"
            )
        if not problems and self.steps is not None:
            if self.warmup_steps >= self.steps:
                problems.append(
                    f"warmup_steps must be less than steps={self.steps}, not {self.warmup_steps}"
                )
            problems += self.row_problems(1)
        if problems:
            raise InvalidSpecError(f"the optimizer settings are invalid: {'; '.join(problems)}")
        if self.epochs is not None:  # 3 and 3.0 have one hash
            object.__setattr__(self, "epochs", float(self.epochs))

    def _number_problems(self) -> list[str]:
        problems = []
        learning_rate_is_valid = (
            is_finite_number(self.learning_rate) and 0 < self.learning_rate <= 10
        )
        if not learning_rate_is_valid:
            problems.append(
                f"learning_rate must be above 0 and at most 10, not {self.learning_rate!r}"
            )
        if not (is_finite_number(self.weight_decay) and self.weight_decay >= 0):
            problems.append(f"weight_decay must be finite and at least 0, not {self.weight_decay}")
        elif learning_rate_is_valid and is_finite_number(self.loraplus_lr_ratio):
            highest = self.learning_rate * max(1, self.loraplus_lr_ratio)
            if highest * self.weight_decay >= 1:
                rate = "learning_rate"
                if highest != self.learning_rate:
                    rate = "(learning_rate * loraplus_lr_ratio)"
                problems.append(
                    f"weight_decay must be less than 1 / {rate} = {1 / highest:g}, "
                    f"not {self.weight_decay!r}"
                )
        if not (is_finite_number(self.max_grad_norm) and self.max_grad_norm >= 0):
            problems.append(
                f"max_grad_norm must be finite and at least 0 (0: no clipping), "
                f"not {self.max_grad_norm!r}"
            )
        if self.epochs is not None and not (
            is_finite_number(self.epochs) and 0 < self.epochs <= 10_000
        ):
            problems.append(f"epochs must be above 0 and at most 10,000, not {self.epochs!r}")
        if not (
            isinstance(self.betas, tuple)
            and len(self.betas) == 2
            and all(is_finite_number(beta) and 0 <= beta < 1 for beta in self.betas)
        ):
            problems.append(f"betas must be two numbers in [0, 1), not {self.betas!r}")
        if not (is_finite_number(self.epsilon) and 0 < self.epsilon <= 1):
            problems.append(f"epsilon must be above 0 and at most 1, not {self.epsilon!r}")
        return problems

    def row_problems(self, processes: int) -> list[str]:
        """Return a problem if the run trains on more rows than its order can hold."""
        rows = (self.steps or 0) * self.rows_per_step(processes)
        if rows <= MAX_TRAINED_ROWS:
            return []
        return [
            f"steps * batch_size * gradient_accumulation * processes must be at most "
            f"{MAX_TRAINED_ROWS:,} rows, not {rows:,}"
        ]

    def rows_per_step(self, processes: int) -> int:
        """Return the rows of one optimizer step, over all processes."""
        return self.batch_size * self.gradient_accumulation * processes

    @property
    def duration(self) -> str:
        """The length of the run as text: "100 steps of 16 rows", "3 epochs in steps of 16 rows"."""
        length = (
            f"{self.steps} steps" if self.epochs is None else f"{self.epochs:g} epochs in steps"
        )
        return f"{length} of {self.batch_size} rows"

    def for_steps(self, steps: int, warmup_steps: int) -> "OptimizerSettings":
        """Return these settings for a run of another length."""
        return replace(self, steps=steps, epochs=None, warmup_steps=warmup_steps, warmup_ratio=0.0)

    def for_rows(self, rows: float, processes: int) -> "OptimizerSettings":
        """Return these settings with `steps` and `warmup_steps`, for an epoch of `rows` rows.

        The last step of the last epoch is full: it takes its missing rows from a further epoch.
        InvalidSpecError if the warm-up is not shorter than the run, or the run is too long.
        """
        steps = self.steps
        if steps is None:
            assert self.epochs is not None  # see __post_init__
            exact = self.epochs * rows / self.rows_per_step(processes)
            steps = math.ceil(exact * (1 - _ROUNDING))
        warmup_steps = self.warmup_steps
        if self.warmup_ratio:
            warmup_steps = min(math.ceil(self.warmup_ratio * steps), steps - 1)
        found = self.for_steps(steps, warmup_steps)
        if problems := found.row_problems(processes):
            raise InvalidSpecError(f"the optimizer settings are invalid: {'; '.join(problems)}")
        return found
