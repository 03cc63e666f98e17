"""What makes it Trans-PEFT: masking and dropping of the frozen base while an adapter is trained."""

from trans_peft.perturbation.attach import PerturbationHandle, perturbed
from trans_peft.perturbation.criticality import layer_criticality, propose_spared_layers
from trans_peft.perturbation.layout import Layout

__all__ = [
    "Layout",
    "PerturbationHandle",
    "layer_criticality",
    "perturbed",
    "propose_spared_layers",
]
