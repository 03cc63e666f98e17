"""How an adapter is configured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.errors import InvalidSpecError

__all__ = ["AdapterSpec"]


@dataclass(frozen=True)
class AdapterSpec:
    """One PEFT configuration: the type in PEFT's spelling ("LORA") and the fields of its config.

    `options` are PEFT's own names (`r`, `lora_alpha`, `target_modules`, `use_dora`, ...). They are
    checked against PEFT when the config is built (`trans_peft.methods.specs`).
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    peft_type: str = "LORA"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.peft_type or self.peft_type != self.peft_type.upper():
            raise InvalidSpecError(
                "the adapter's type is not spelled as PEFT spells it",
                expected="upper case, such as LORA",
                found=repr(self.peft_type),
                do="take the value that stands as peft_type in adapter_config.json",
            )
