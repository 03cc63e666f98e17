"""Perturb each architecture and compare the result with the formulas."""

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.architectures.formulas import formula_weights
from benchmarks.architectures.tiny import ARCHITECTURES, UNBUILT, VOCABULARY, tiny
from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import UnsupportedModelError
from trans_peft.perturbation import Layout, perturbed

__all__ = ["DROPPED", "MASKED", "ArchitectureOutcome", "check_architecture", "distance"]

MASKED = Perturbation(masking_p=0.3)
DROPPED = Perturbation(dropping_p=0.5)
_SEED = 1
_IDS = VOCABULARY // 4 + torch.arange(9)[None] * 3 % (VOCABULARY // 2)


@dataclass(frozen=True)
class ArchitectureOutcome:
    """One row: `outcome` is equal, multiplied, refused, different or not built."""

    architecture: str
    outcome: str
    detail: str = ""

    @property
    def row(self) -> str:
        """Return the row of the table."""
        name = f"`{self.architecture}`"
        return f"| {name} | {ARCHITECTURES[self.architecture]} | {self.outcome} | {self.detail} |"


def check_architecture(architecture: str) -> ArchitectureOutcome:
    """Perturb a tiny random model of an architecture and compare with the formulas."""
    if architecture in UNBUILT:
        return ArchitectureOutcome(architecture, "not built", UNBUILT[architecture])
    model = tiny(architecture)
    try:
        with perturbed(model, MASKED, seed=_SEED) as handle:
            pass
    except UnsupportedModelError as error:
        return ArchitectureOutcome(architecture, "refused", _reason(error))
    try:
        _logits(model, _IDS, {})
    except Exception as error:
        return ArchitectureOutcome(
            architecture, "multiplied", f"not compared with the formula: {error}"
        )
    wrong = [
        f"{name} {off:.1%} off the formula"
        for name, perturbation in (("masked", MASKED), ("dropped", DROPPED))
        if (off := distance(model, architecture, perturbation)) > 1e-4
    ]
    if wrong:
        return ArchitectureOutcome(architecture, "different", "; ".join(wrong))
    details = list(dict.fromkeys(handle.multiplied.values()))
    without = len(handle.without_ffn)
    if without:
        details.append(f"{without} of the layers have no FFN")
    outcome = "multiplied" if handle.multiplied else "equal"
    return ArchitectureOutcome(architecture, outcome, "; ".join(details))


def distance(
    model: nn.Module,
    architecture: str,
    perturbation: Perturbation,
    layout: Layout | None = None,
    stack: str = "",
) -> float:
    """Return |perturbed - formula| / |formula - unperturbed|, over the logits.

    `stack` is the path of the decoder that a layout chooses.
    """
    with torch.no_grad():
        plain = _logits(model, _IDS, {})
        weights = formula_weights(model, architecture, perturbation, _SEED, stack)
        expected = _logits(model, _IDS, weights)
        with perturbed(model, perturbation, seed=_SEED, layout=layout):
            found = _logits(model, _IDS, {})
    effect = (expected - plain).norm()
    if not weights or not effect:
        return float("inf")
    return float((found - expected).norm() / effect)


def _logits(model: nn.Module, ids: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    output = torch.func.functional_call(
        model, weights, (), {"input_ids": ids, "use_cache": False}, tie_weights=False
    )
    return output.logits


def _reason(error: UnsupportedModelError) -> str:
    return " ".join(str(error).split()).replace("|", "\\|")
