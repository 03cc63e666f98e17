"""Make the methods of this library known to PEFT, so that PEFT and transformers load them.

`peft.utils.register_peft_method` refuses names that are not in PEFT's own enum (0.21). We fill the
tables that it fills. After `register_methods()`, `PeftModel.from_pretrained` and transformers'
`load_adapter` read a saved bottleneck adapter like any other.
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
    """Register the bottleneck adapter with PEFT. Calling it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[BOTTLENECK] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[BOTTLENECK] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[BOTTLENECK] = BottleneckModel.prefix
