"""Register this library's methods with PEFT.

`peft.utils.register_peft_method` rejects names that are not in PEFT's enum (0.21), so this module
fills the same tables. After `register_methods()`, `PeftModel.from_pretrained` and transformers'
`load_adapter` load a saved bottleneck adapter.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from trans_peft.methods.bottleneck.config import BottleneckConfig
from trans_peft.methods.bottleneck.model import BottleneckModel
from trans_peft.methods.bottleneck.peft_type import BOTTLENECK

__all__ = ["register_methods"]


def register_methods() -> None:
    """Register the bottleneck adapter with PEFT. Repeated calls are harmless."""
    PEFT_TYPE_TO_CONFIG_MAPPING[BOTTLENECK] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[BOTTLENECK] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[BOTTLENECK] = BottleneckModel.prefix
