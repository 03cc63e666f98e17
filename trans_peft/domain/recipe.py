"""How an adapter is trained: the settings that a training result depends on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.conventions import BASE_ALIASES
from trans_peft.domain.data import DataSource, TrainingSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.field_checks import (
    choice_problems,
    count_problems,
    interval_problems,
    is_whole,
)
from trans_peft.domain.identity import ADDED_LATER, content_sha256
from trans_peft.domain.names import name_problem
from trans_peft.domain.numbers import is_finite_number
from trans_peft.domain.optimizer import OptimizerSettings
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.domain.recovery import MIN_PROMPTS
from trans_peft.domain.spec import AdapterSpec
from trans_peft.domain.validation import ValidationSettings
from trans_peft.errors import InvalidSpecError

__all__ = [
    "OptimizerSettings",
    "Perturbation",
    "SyntheticPrompts",
    "TrainingRecipe",
]

_Dtype = Literal["float32", "bfloat16", "nf4"]
_Granularity = Literal["neuron", "element"]
_Where = Literal["ffn", "attention", "both"]
_Objective = Literal["sft", "dpo"]
_BETA = 0.1


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
        problems = interval_problems(self, {"masking_p": (0, 1), "dropping_p": (0, 1)})
        problems += choice_problems(self, granularity=_Granularity, where=_Where)
        layers = self.spared_layers
        if invalid := [layer for layer in layers if not is_whole(layer) or layer < 0]:
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
    after it wrote. InvalidSpecError unless exactly one of the two is given, and for `privacy`
    without a prompt model.

    Attributes:
        approved: file of prompts that the owner allows to keep, for instance 20 invented ones.
        steps: optimizer steps of the prompt model, with the recipe's batch size and learning rate.
        count: number of prompts to write.
        privacy: guarantee of differential privacy for the written prompts. None trains the prompt
            model without one, and leaves out prompts that repeat rare parts of the training rows.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    approved: DataSource | None = None
    steps: int = 0
    count: int = 320
    privacy: PrivacySettings | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = count_problems(self, {"steps": (0, 10_000_000), "count": (MIN_PROMPTS, 100_000)})
        if not problems and (self.approved is None) == (self.steps == 0):
            problems.append(
                "give either approved, a file of prompts that may be kept, or steps, the optimizer "
                "steps of a prompt model"
            )
        elif not problems and self.privacy is not None and self.approved is not None:
            problems.append("privacy is that of a prompt model: give steps instead of approved")
        if problems:
            raise InvalidSpecError(f"synthetic_prompts is invalid: {'; '.join(problems)}")


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that the weights of one adapter depend on.

    InvalidSpecError, with all problems at once, for a value outside its range.

    Attributes:
        adapter: name of the adapter.
        family: name of the base family.
        data: training rows: one source, or a list of sources with weights.
        suites: evaluation suites of the adapter, for this base and for every later one. At least
            one, with distinct names.
        base_version: version ("v1") or alias ("serving", "champion") of the base. It is resolved
            once, when training starts; the registry records the resolved version.
        spec: type and options of the adapter.
        perturbation: Trans-PEFT's perturbations.
        optimizer: length of the run, settings of AdamW and its schedule.
        dtype: dtype of the frozen base during training. `nf4` is QLoRA: linear layers in 4 bits
            that compute in bfloat16. Evaluations use the dtype of their suite instead.
        seed: seed of the initial weights, the order of rows, dropout and the perturbations. From 0
            to 2**31 - 1.
        data_seed: seed of the order of rows, if it differs from `seed`.
        processes: processes that `accelerate launch` starts.
        packing: whether several rows share one sequence.
        checkpoint_steps: steps between two checkpoints.
        synthetic_prompts: prompts that are written during the training and kept with the adapter,
            for the recovery strategy `distilled` after an update of the base.
        validation: rows that are held out, the loss on which is computed during the training.
        compute: what trades memory against time, and kernels.
        objective: what the training maximizes. `sft`: the likelihood of the answers. `dpo`: the
            preference of the chosen over the rejected answer of each row, relative to the base
            without the adapter (Direct Preference Optimization).
        dpo_beta: with `dpo`, how strongly a distance from the base is punished. Above 0, at most
            100. Only `dpo` has this field.
        train_on_prompt: whether the loss counts the tokens of prompts as well as those of answers
            (`train_on_inputs` of LLM-Adapters). Only with `sft`.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    adapter: str
    family: str
    data: DataSource | tuple[TrainingSource, ...]
    suites: tuple[Suite, ...]
    base_version: str = "serving"
    spec: AdapterSpec = field(default_factory=AdapterSpec)
    perturbation: Perturbation = Perturbation()
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    dtype: _Dtype = "float32"
    seed: int = 42
    processes: int = 1
    packing: bool = False
    checkpoint_steps: int = 50
    synthetic_prompts: SyntheticPrompts | None = field(default=None, metadata=ADDED_LATER)
    data_seed: int | None = field(default=None, metadata=ADDED_LATER)
    validation: ValidationSettings | None = field(default=None, metadata=ADDED_LATER)
    # One value for all recipes, because ADDED_LATER compares with the default.
    compute: ComputeSettings = field(default=ComputeSettings(), metadata=ADDED_LATER)
    objective: _Objective = field(default="sft", metadata=ADDED_LATER)
    dpo_beta: float = field(default=_BETA, metadata=ADDED_LATER)
    train_on_prompt: bool = field(default=False, metadata=ADDED_LATER)

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
        problems += choice_problems(self, dtype=_Dtype)
        counts = count_problems(self, _RECIPE_COUNTS)
        if self.data_seed is not None:
            counts += count_problems(self, {"data_seed": _RECIPE_COUNTS["seed"]})
        problems += self._data_problems() + self._validation_problems() + self._privacy_problems()
        problems += self._objective_problems()
        problems += counts or self.optimizer.row_problems(self.processes)
        if self.optimizer.loraplus_lr_ratio != 1 and self.spec.peft_type != "LORA":
            problems.append(
                "optimizer.loraplus_lr_ratio needs an adapter of the type LORA, which has weights "
                f"B, not {self.spec.peft_type}"
            )
        if self.compute.attention == "flash_attention_2" and self.dtype == "float32":
            problems.append(
                "compute.attention flash_attention_2 needs the dtype bfloat16 or nf4, not float32"
            )
        if self.compute.sharding:
            problems += self._sharding_problems()
        if problems:
            raise InvalidSpecError(f"the recipe is invalid: {'; '.join(problems)}")

    def _sharding_problems(self) -> list[str]:
        needs = {
            "at least 2 processes, which share the base": self.processes >= 2,
            "the dtype float32 or bfloat16": self.dtype != "nf4",
            "objective: sft": self.objective == "sft",
            "compute.compile: false": not self.compute.compile,
            "synthetic prompts without privacy, whose training has one process": not (
                self.synthetic_prompts and self.synthetic_prompts.privacy
            ),
        }
        return [f"compute.sharding needs {need}" for need, is_met in needs.items() if not is_met]

    def _data_problems(self) -> list[str]:
        problems = []
        if not self.sources:
            problems.append("data must name at least one source")
        places = [(source.uri, source.template) for source in self.sources]
        if len(set(places)) != len(places):
            problems.append(f"data names a source twice: {[uri for uri, _ in places]}")
        if len(self.sources) == 1 and self.sources[0].weight != 1:
            problems.append(
                f"data has one source, with the weight {self.sources[0].weight!r}, which compares "
                "it with no other source: remove the weight, or add a source"
            )
        elif self.packing and any(source.weight != 1 for source in self.sources):
            problems.append(
                "packing puts rows of several sources into one sequence, so that every weight must "
                "be 1"
            )
        return problems

    def _objective_problems(self) -> list[str]:
        problems = choice_problems(self, objective=_Objective)
        beta = self.dpo_beta
        if not (is_finite_number(beta) and 0 < beta <= 100):
            problems.append(f"dpo_beta must be above 0 and at most 100, not {beta!r}")
        if self.objective != "dpo":
            if not problems and beta != _BETA:
                problems.append(f"dpo_beta={beta!r} needs objective: dpo")
            return problems
        if self.packing:
            problems.append("packing is not possible with objective: dpo, which trains on pairs")
        if self.train_on_prompt:
            problems.append(
                "train_on_prompt is not possible with objective: dpo, which compares answers"
            )
        if any(source.template for source in self.sources):
            problems.append(
                "a template makes questions and answers, and objective: dpo needs rows with "
                "prompt, chosen and rejected"
            )
        if self.validation is not None:
            problems.append(
                "validation computes the loss of answers, which objective: dpo does not train"
            )
        if self.perturbation.granularity == "element":
            problems.append(
                "granularity element draws a mask for each token, so that the chosen and the "
                "rejected answer of objective: dpo would have different masks: use neuron"
            )
        if self.compute.memory_gib is not None:
            problems.append("compute.memory_gib estimates a step of objective: sft only")
        return problems

    def for_answers(self) -> "TrainingRecipe":
        """Return the recipe for one file of answers that are not rows of the recipe's data."""
        return replace(
            self,
            objective="sft",
            dpo_beta=_BETA,
            packing=False,
            validation=None,
            train_on_prompt=False,
        )

    def _validation_problems(self) -> list[str]:
        """Return a problem if the run is too short to be stopped early.

        Only where `steps` are known: a recipe with `epochs` is checked again with its steps, before
        the training starts. The first loss is always the lowest, so that the loss number
        `stop_after` + 1 is the first one that can stop the run.
        """
        validation, steps = self.validation, self.optimizer.steps
        if validation is None or not validation.stop_after or steps is None:
            return []
        first_stop = (validation.stop_after + 1) * validation.every_steps
        if first_stop < steps:
            return []
        return [
            f"validation.stop_after={validation.stop_after} cannot stop the run before step "
            f"{first_stop}, and the run has {steps} steps: lower stop_after or "
            f"every_steps={validation.every_steps}, or remove stop_after"
        ]

    def _privacy_problems(self) -> list[str]:
        prompts, validation = self.synthetic_prompts, self.validation
        if prompts is None or prompts.privacy is None or validation is None or not validation.share:
            return []
        return [
            "synthetic_prompts.privacy needs validation.data instead of validation.share: the rows "
            "that a share holds out depend on all rows"
        ]

    @cached_property
    def sources(self) -> tuple[TrainingSource, ...]:
        """The sources of the training rows, of which there may be one."""
        if isinstance(self.data, DataSource):
            return (TrainingSource(self.data.uri, self.data.sha256, self.data.template),)
        return self.data

    def with_sources(self, change: Callable[[Any], Any]) -> "TrainingRecipe":
        """Return the recipe with `change` applied to each source of training and validation rows.

        `change` returns an object of the class of its argument.
        """
        data = self.data
        changed = change(data) if isinstance(data, DataSource) else tuple(map(change, data))
        validation = self.validation
        if validation is not None and validation.data is not None:
            validation = replace(validation, data=change(validation.data))
        return replace(self, data=changed, validation=validation)

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole recipe: names the work folder, so that a rerun resumes its own."""
        return content_sha256(self)
