"""The bottleneck adapter of Houlsby et al. as a PEFT method: config, layer, model."""

from trans_peft.methods.bottleneck.config import BottleneckConfig
from trans_peft.methods.bottleneck.layer import BottleneckLayer
from trans_peft.methods.bottleneck.model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
