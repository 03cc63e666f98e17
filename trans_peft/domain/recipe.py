"""How an adapter is trained: the settings that a training result depends on."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.conventions import BASE_ALIASES
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.identity import ADDED_LATER, content_sha256
from trans_peft.domain.names import name_problem
from trans_peft.domain.numbers import is_finite_number
from trans_peft.domain.recovery import MIN_PROMPTS
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import InvalidSpecError

__all__ = [
    "MAX_TRAINED_ROWS",
    "OptimizerSettings",
    "Perturbation",
    "SyntheticPrompts",
    "TrainingRecipe",
]

MAX_TRAINED_ROWS = 100_000_000
"""Rows of a whole run, repetitions included. Training keeps the order of all of them in memory."""

_Dtype = Literal["float32", "bfloat16", "nf4"]
_Granularity = Literal["neuron", "element"]
_Where = Literal["ffn", "attention", "both"]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count_problems(settings: Any, ranges: dict[str, tuple[int, int]]) -> list[str]:
    """Return a problem for each field that is not a whole number in its range."""
    return [
        f"{name} must be a whole number from {low} to {high:,}, not {value!r}"
        for name, (low, high) in ranges.items()
        if not (_is_whole(value := getattr(settings, name)) and low <= value <= high)
    ]


def _choice_problems(settings: Any, **choices: Any) -> list[str]:
    """Return a problem for each field whose value is not one of its literals."""
    return [
        f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(settings, name)!r}"
        for name, kind in choices.items()
        if getattr(settings, name) not in get_args(kind)
    ]


def _row_problems(optimizer: "OptimizerSettings", processes: int) -> list[str]:
    """Return a problem if the run trains on more rows than its order can hold."""
    per_step = optimizer.batch_size * optimizer.gradient_accumulation * processes
    rows = optimizer.steps * per_step
    if rows <= MAX_TRAINED_ROWS:
        return []
    return [
        f"steps * batch_size * gradient_accumulation * processes must be at most "
        f"{MAX_TRAINED_ROWS:,} rows, not {rows:,}"
    ]


@dataclass(frozen=True)
class Perturbation:
    """The two Trans-PEFT perturbations of the frozen base during fine-tuning.

    They belong to the recipe, not to the adapter: the saved weights contain nothing of them. The
    default values switch them off (plain fine-tuning). InvalidSpecError for a value outside its
    range, and for `granularity`, `where` or `spared_layers` while both probabilities are 0,
    because such a perturbation would have no effect.

    Attributes:
        masking_p: probability p_m that a forward pass masks an intermediate neuron of an FFN
            (eq. 4-5). In [0, 1).
        dropping_p: probability p_d that a forward pass drops a whole FFN sub-layer (eq. 6-7).
            In [0, 1).
        granularity: `neuron` draws one mask of shape (d_ff,) per forward pass, as in the paper's
            formula; `element` draws one bit per element of (batch, sequence, d_ff), as the
            authors' code does.
        where: the sub-layers to perturb (the paper's fig. 10).
        spared_layers: indices of layers that are not perturbed.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    masking_p: float = 0.0
    dropping_p: float = 0.0
    granularity: _Granularity = "neuron"
    where: _Where = "ffn"
    spared_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} must lie in [0, 1), not {value!r}"
            for name, value in (("masking_p", self.masking_p), ("dropping_p", self.dropping_p))
            if not (is_finite_number(value) and 0 <= value < 1)
        ]
        problems += _choice_problems(self, granularity=_Granularity, where=_Where)
        layers = self.spared_layers
        if invalid := [layer for layer in layers if not _is_whole(layer) or layer < 0]:
            problems.append(f"spared_layers must be layer indices from 0, found {invalid!r}")
        elif len(set(layers)) < len(layers):
            problems.append(f"spared_layers must name each layer once, found {list(layers)}")
        given = {
            "granularity": self.granularity != "neuron",
            "where": self.where != "ffn",
            "spared_layers": bool(layers),
        }
        if not problems and self.is_off and any(given.values()):
            problems.append(
                f"{', '.join(name for name, is_given in given.items() if is_given)} is given while "
                "masking_p and dropping_p are both 0, so that nothing would be perturbed: set one "
                "of them, or remove the perturbation for plain fine-tuning"
            )
        if problems:
            raise InvalidSpecError(f"the perturbation is invalid: {'; '.join(problems)}")

    @property
    def is_off(self) -> bool:
        """Whether nothing is perturbed: plain fine-tuning."""
        return self.masking_p == 0 and self.dropping_p == 0


_COUNTS = {
    "steps": (1, 10_000_000),
    "batch_size": (1, 1_000_000),
    "gradient_accumulation": (1, 1_000_000),
    "warmup_steps": (0, 10_000_000),
    "max_length": (2, 10_000_000),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and of its cosine schedule with linear warm-up.

    InvalidSpecError for a value outside its range.

    Attributes:
        learning_rate: peak of the schedule. Above 0, at most 10.
        steps: optimizer steps of the run. At most 10,000,000.
        batch_size: rows per process and micro-step.
        gradient_accumulation: micro-steps per optimizer step.
        warmup_steps: steps before the peak. Fewer than `steps`.
        weight_decay: AdamW's decoupled decay. At least 0, and less than 1 / learning_rate, because
            a step multiplies a weight by 1 - learning_rate * weight_decay.
        max_grad_norm: norm to which gradients are clipped. 0 switches clipping off.
        max_length: tokens after which a row is cut. At least 2, a prompt token and an answer token.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    learning_rate: float = 3e-4
    steps: int = 100
    batch_size: int = 16
    gradient_accumulation: int = 1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512

    def __post_init__(self) -> None:
        problems = _count_problems(self, _COUNTS)
        learning_rate_is_valid = (
            is_finite_number(self.learning_rate) and 0 < self.learning_rate <= 10
        )
        if not learning_rate_is_valid:
            problems.append(
                f"learning_rate must be above 0 and at most 10, not {self.learning_rate!r}"
            )
        if not (is_finite_number(self.weight_decay) and self.weight_decay >= 0):
            problems.append(f"weight_decay must be finite and at least 0, not {self.weight_decay}")
        elif learning_rate_is_valid and self.learning_rate * self.weight_decay >= 1:
            problems.append(
                f"weight_decay must be less than 1 / learning_rate = {1 / self.learning_rate:g}, "
                f"not {self.weight_decay!r}"
            )
        if not (is_finite_number(self.max_grad_norm) and self.max_grad_norm >= 0):
            problems.append(
                f"max_grad_norm must be finite and at least 0 (0: no clipping), "
                f"not {self.max_grad_norm!r}"
            )
        if not problems:
            if self.warmup_steps >= self.steps:
                problems.append(
                    f"warmup_steps must be less than steps={self.steps}, not {self.warmup_steps}"
                )
            problems += _row_problems(self, 1)
        if problems:
            raise InvalidSpecError(f"the optimizer settings are invalid: {'; '.join(problems)}")


_RECIPE_COUNTS = {
    "seed": (0, 2**31 - 1),
    "processes": (1, 1024),
    "checkpoint_steps": (1, 10_000_000),
}


@dataclass(frozen=True)
class SyntheticPrompts:
    """Prompts that are written during a training, for the recovery strategy `distilled`.

    Either the base writes them after a list of approved prompts, or a prompt model does: a second
    adapter with the recipe's spec, trained on the prompts of the training rows alone, and deleted
    after it wrote. InvalidSpecError unless exactly one of the two is given.

    Attributes:
        approved: file of prompts that the owner allows to keep, for instance 20 invented ones.
        steps: optimizer steps of the prompt model, with the recipe's batch size and learning rate.
        count: number of prompts to write.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    approved: DataSource | None = None
    steps: int = 0
    count: int = 320

    def __post_init__(self) -> None:
        problems = _count_problems(
            self, {"steps": (0, 10_000_000), "count": (MIN_PROMPTS, 100_000)}
        )
        if not problems and (self.approved is None) == (self.steps == 0):
            problems.append(
                "give either approved, a file of prompts that may be kept, or steps, the optimizer "
                "steps of a prompt model"
            )
        if problems:
            raise InvalidSpecError(f"synthetic_prompts is invalid: {'; '.join(problems)}")


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that the weights of one adapter depend on.

    InvalidSpecError, with all problems at once, for a value outside its range.

    Attributes:
        adapter: name of the adapter.
        family: name of the base family.
        data: training rows.
        suites: evaluation suites of the adapter, for this base and for every later one. At least
            one, with distinct names.
        base_version: version ("v1") or alias ("serving", "champion") of the base. It is resolved
            once, when training starts; the registry records the resolved version.
        spec: type and options of the adapter.
        perturbation: Trans-PEFT's perturbations.
        optimizer: settings of AdamW and its schedule.
        dtype: dtype of the frozen base during training. `nf4` is QLoRA: linear layers in 4 bits
            that compute in bfloat16. Evaluations use the dtype of their suite instead.
        seed: seed of the initial weights, the order of rows, dropout and the perturbations. From 0
            to 2**31 - 1.
        processes: processes that `accelerate launch` starts.
        packing: whether several rows share one sequence.
        checkpoint_steps: steps between two checkpoints.
        synthetic_prompts: prompts that are written during the training and kept with the adapter,
            for the recovery strategy `distilled` after an update of the base.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    adapter: str
    family: str
    data: DataSource
    suites: tuple[Suite, ...]
    base_version: str = "serving"
    spec: AdapterSpec = field(default_factory=AdapterSpec)
    perturbation: Perturbation = Perturbation()
    optimizer: OptimizerSettings = OptimizerSettings()
    dtype: _Dtype = "float32"
    seed: int = 42
    processes: int = 1
    packing: bool = False
    checkpoint_steps: int = 50
    synthetic_prompts: SyntheticPrompts | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = [
            problem
            for field_name in ("adapter", "family")
            if (problem := name_problem(field_name, getattr(self, field_name)))
        ]
        if self.base_version not in BASE_ALIASES and (
            problem := name_problem("base_version", self.base_version)
        ):
            problems.append(problem)
        if not self.suites:
            problems.append("suites must name at least one suite, to evaluate the adapter on bases")
        names = [suite.name for suite in self.suites]
        if len(set(names)) != len(names):
            problems.append(f"suites share a name: {names}")
        problems += _choice_problems(self, dtype=_Dtype)
        counts = _count_problems(self, _RECIPE_COUNTS)
        problems += counts or _row_problems(self.optimizer, self.processes)
        if problems:
            raise InvalidSpecError(f"the recipe is invalid: {'; '.join(problems)}")

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole recipe: names the work folder, so that a rerun resumes its own."""
        return content_sha256(self)
