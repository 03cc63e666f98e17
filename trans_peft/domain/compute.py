"""How a training run computes: trades of memory against time, and kernels."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.field_checks import choice_problems
from trans_peft.domain.identity import ADDED_LATER
from trans_peft.domain.numbers import is_finite_number
from trans_peft.errors import InvalidSpecError

__all__ = ["ComputeSettings"]

_Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]
_SWITCHES = ("gradient_checkpointing", "compile", "liger", "sharding")


@dataclass(frozen=True)
class ComputeSettings:
    """Settings that change time and memory of a run, and its results by rounding only.

    InvalidSpecError, with all problems at once, for a value of another kind. What a machine cannot
    run is refused before a model is loaded (`trans_peft.training.machine_check`).

    Attributes:
        gradient_checkpointing: whether the backward pass computes the activations of each layer
            again instead of keeping them. Masks and drops are the same in the second pass.
        attention: implementation of the attention, by transformers' names. `auto` is transformers'
            choice: `sdpa` where the architecture has it, else `eager`.
        compile: whether `torch.compile` compiles the decoder layers.
        liger: whether the layers use the kernels of the package liger-kernel.
        memory_gib: memory that the tensors of one process may use, in GiB. If it is given, a
            training whose estimated peak is larger is refused before a model is loaded.
        sharding: whether each process keeps a part of the base's frozen weights only, and gathers
            each layer for its passes (FSDP2), so that the base need not fit one GPU.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    gradient_checkpointing: bool = False
    attention: _Attention = "auto"
    compile: bool = False
    liger: bool = False
    memory_gib: float | None = None
    sharding: bool = field(default=False, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = choice_problems(self, attention=_Attention)
        problems += [
            f"{name} must be true or false, not {value!r}"
            for name in _SWITCHES
            if not isinstance(value := getattr(self, name), bool)
        ]
        memory = self.memory_gib
        if memory is not None and not (is_finite_number(memory) and memory > 0):
            problems.append(f"memory_gib must be finite and above 0, or null, not {memory!r}")
        if problems:
            raise InvalidSpecError(f"the compute settings are invalid: {'; '.join(problems)}")
