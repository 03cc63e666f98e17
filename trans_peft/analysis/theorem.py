"""The terms of theorem 1 that two versions of a base determine.

The theorem (eq. 10; proof in appendix A) bounds the loss that an adapter loses by an update:

    |L(new, adapter) - L(new, optimum)|
        <= L_f |dW_ffn|  +  L_a |adapter - optimum|  +  lambda/2 (p_m |W_m|^2 + p_d |W_d|^2)

|dW_ffn| is the Frobenius norm of the change of all FFN weights. |W_m|^2 and |W_d|^2 are the squared
norms of the weights that masking and dropping leave out. Both leave out whole neurons, with their
rows of the up and gate projections and their columns of the down projection, so every FFN weight of
a layer counts in both. The optimum is unknown, and so are the constants L_f, L_a and lambda (the
largest eigenvalue of the Hessian). The terms are in the unit of the weights, and comparable only
between updates of one base.
"""

from dataclasses import dataclass

from trans_peft.bases.drift import Drift
from trans_peft.domain.recipe import Perturbation

__all__ = ["BoundTerms", "bound_terms"]


@dataclass(frozen=True)
class BoundTerms:
    """Computable parts of the bound, without the unknown constants.

    Attributes:
        ffn_shift: |dW_ffn| over all layers. It orders updates of one base.
        ffn_shift_by_layer: its part in each layer.
        regularizer: p_m |W_m|^2 + p_d |W_d|^2 over all layers of the old base. It is the same for
            all of its updates.
        regularizer_by_layer: its part in each layer; 0 for a spared one.
    """

    ffn_shift: float
    ffn_shift_by_layer: tuple[float, ...]
    regularizer: float
    regularizer_by_layer: tuple[float, ...]


def bound_terms(drift: Drift, perturbation: Perturbation) -> BoundTerms:
    """Return the terms for an update and the perturbation of a training on the old base."""
    p = perturbation.masking_p + perturbation.dropping_p
    regularizer = tuple(
        0.0 if layer in perturbation.spared_layers else p * norm**2
        for layer, norm in enumerate(drift.ffn_norm_by_layer)
    )
    return BoundTerms(drift.ffn_shift, drift.ffn_shift_by_layer, sum(regularizer), regularizer)
