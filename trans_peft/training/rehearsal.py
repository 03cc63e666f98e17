"""Before the first step: would the adapter survive what comes after training?

An adapter that cannot be saved, attached to a base again or transferred is found out here instead
of after hours of training. The same functions decide that decide later.
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.base import TensorSignature
from trans_peft.errors import AdapterError, ContentError, InvalidSpecError, UnsupportedModelError
from trans_peft.methods.specs import attach
from trans_peft.models import LoadedBase
from trans_peft.snapshot import ModelSnapshot
from trans_peft.transfer.effect import probe_effect
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.peft_folder import read_peft_folder
from trans_peft.transfer.target_modules import compare_target_modules

__all__ = ["rehearse", "save_adapter"]

_NOISE = 0.02


def rehearse(base: LoadedBase, spec: AdapterSpec, work_dir: Path) -> None:
    """Save a new adapter of `spec`, put it on the base again, and look for its effect.

    The adapter's weights get noise in between, because a new adapter changes no logit. The base
    comes back unchanged. InvalidSpecError with the reason for an adapter that `attach` refuses,
    whose places do not fit the base that it was made on, or that changes nothing.
    """
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="rehearsal-") as scratch:
        folder = Path(scratch) / "adapter"
        snapshot = ModelSnapshot(base.model)
        try:
            model = attach(base.model, spec)
            _add_noise(model)
            save_adapter(model, folder)
        finally:
            snapshot.restore()
        try:
            places = _places(base.model)
            mismatches, _ = compare_target_modules(read_peft_folder(folder), places, places)
            with attached(base.model, folder) as model:
                effect = probe_effect(model, base.tokenizer)
        except (AdapterError, ContentError, InvalidSpecError, UnsupportedModelError) as error:
            mismatches, effect = (str(error).replace(str(folder), "the saved adapter"),), None
    if effect is not None and not effect.found:
        mismatches = (*mismatches, "its weights change no logit, whatever they are")
    if mismatches:
        raise InvalidSpecError(
            f"the {spec.peft_type} adapter could be trained, but not used afterwards: "
            + "; ".join(mismatches),
            expected="an adapter that is saved, attached again and changes the base's answers",
            found=dict(spec.options),
            do="change the adapter's options",
        )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter as a stock PEFT folder, without weights of the base.

    PEFT's own choice (`save_embedding_layers="auto"`) adds the base's embedding where the adapter
    sits on it, and would overwrite that of every base that the adapter is carried to.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _add_noise(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = _NOISE * torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))


def _places(model: nn.Module) -> dict[str, TensorSignature]:
    """Return the model's tensors as a fingerprint names them, without their values."""
    return {
        name: TensorSignature(tuple(tensor.shape), str(tensor.dtype), "")
        for name, tensor in model.state_dict().items()
    }
