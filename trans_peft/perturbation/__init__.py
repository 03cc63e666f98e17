"""What makes it Trans-PEFT: masking and dropping of the frozen base while an adapter is trained."""

from trans_peft.perturbation.attach import PerturbationHandle, perturbed
from trans_peft.perturbation.layout import Layout

__all__ = ["Layout", "PerturbationHandle", "perturbed"]
