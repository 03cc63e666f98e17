"""Trans-PEFT's perturbations: masking and dropping in the frozen base during fine-tuning."""

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
