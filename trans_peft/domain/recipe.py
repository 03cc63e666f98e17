"""How an adapter is trained: everything a result depends on, in one value."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.conventions import BASE_ALIASES
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.names import name_problem
from trans_peft.domain.spec import AdapterSpec
from trans_peft.errors import InvalidSpecError

__all__ = ["OptimizerSettings", "Perturbation", "TrainingRecipe"]


@dataclass(frozen=True)
class Perturbation:
    """Trans-PEFT's two perturbations of the frozen base while an adapter is trained on it.

    `masking_p` (p_m, eq. 4-5): chance that an intermediate neuron of a FFN is masked in one forward
    pass. `dropping_p` (p_d, eq. 6-7): chance that a whole FFN sub-layer is dropped. `granularity`:
    one mask of shape (d_ff,) per forward (`neuron`, the formula) or one bit per element of
    (batch, sequence, d_ff) (`element`, the authors' code). `where`: which sub-layers are perturbed
    (the paper's fig. 10). `spared_layers`: layers left alone. It belongs to the recipe, never to
    the adapter: nothing of it is in the saved weights.

    Without arguments it is off: plain fine-tuning. To say more of it while both chances are zero
    is an InvalidSpecError, because that asks for a perturbation that would not happen.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    masking_p: float = 0.0
    dropping_p: float = 0.0
    granularity: Literal["neuron", "element"] = "neuron"
    where: Literal["ffn", "attention", "both"] = "ffn"
    spared_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} must lie in [0, 1), not {value}"
            for name, value in (("masking_p", self.masking_p), ("dropping_p", self.dropping_p))
            if math.isnan(value) or not 0 <= value < 1
        ]
        if self.granularity not in ("neuron", "element"):
            problems.append(f"granularity must be neuron or element, not {self.granularity!r}")
        if self.where not in ("ffn", "attention", "both"):
            problems.append(f"where must be ffn, attention or both, not {self.where!r}")
        negative = [layer for layer in self.spared_layers if layer < 0]
        if negative:
            problems.append(f"spared_layers must not be negative, found {negative}")
        asked = {
            "granularity": self.granularity != "neuron",
            "where": self.where != "ffn",
            "spared_layers": bool(self.spared_layers),
        }
        if self.is_off and any(asked.values()):
            problems.append(
                f"{', '.join(name for name, said in asked.items() if said)} is given while "
                "masking_p and dropping_p are both 0, so that nothing would be perturbed: give one "
                "of them, or leave the perturbation out for plain fine-tuning"
            )
        if problems:
            raise InvalidSpecError(f"the perturbation cannot be used: {'; '.join(problems)}")

    @property
    def is_off(self) -> bool:
        """Whether nothing is perturbed: plain fine-tuning."""
        return self.masking_p == 0 and self.dropping_p == 0


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a cosine schedule. `batch_size` is per process and per micro-step."""

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
        problems = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in ("steps", "batch_size", "gradient_accumulation", "max_length")
            if getattr(self, name) < 1
        ]
        if not self.learning_rate > 0:
            problems.append(f"learning_rate must be positive, not {self.learning_rate}")
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps must not be negative, not {self.warmup_steps}")
        if problems:
            raise InvalidSpecError(f"the optimiser cannot run: {'; '.join(problems)}")


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything one adapter's weights depend on.

    `base_version` is a version ("v1") or an alias of the base ("serving", "champion"); it is
    resolved once, when training starts, and the resolved version is what gets recorded.
    `dtype` is that of the frozen base while the adapter is trained: "nf4" is QLoRA (its linear
    layers in 4 bits, computing in bfloat16). Evaluations, here and on every new base, never see it:
    they run on the base as it was published, in the dtype of their suite. `processes` are started
    by `accelerate launch`. `suites` are what it is judged by, now and on every new base.
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
    dtype: Literal["float32", "bfloat16", "nf4"] = "float32"
    seed: int = 42
    processes: int = 1
    packing: bool = False
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        problems = [
            problem
            for what in ("adapter", "family")
            if (problem := name_problem(what, getattr(self, what)))
        ]
        if self.base_version not in BASE_ALIASES and (
            problem := name_problem("base_version", self.base_version)
        ):
            problems.append(problem)
        if not self.suites:
            problems.append(
                "no suite: without one it can never be judged on a new base; name at least one"
            )
        names = [suite.name for suite in self.suites]
        if len(set(names)) != len(names):
            problems.append(f"suites share a name: {names}")
        if self.processes < 1 or self.checkpoint_steps < 1:
            problems.append("processes and checkpoint_steps must be at least 1")
        if problems:
            raise InvalidSpecError(f"the recipe cannot be used: {'; '.join(problems)}")

    @property
    def sha256(self) -> str:
        """Hash of the whole recipe: names the work folder, so that a rerun resumes its own."""
        return content_sha256(self)
