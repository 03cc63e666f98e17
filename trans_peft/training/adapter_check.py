"""Check before the first step that an adapter can be trained, saved, attached and transferred.

The check runs the functions that later do this, so that an adapter that one of them rejects does
not cost hours of training.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.base import TensorSignature
from trans_peft.errors import (
    AdapterError,
    ContentError,
    InvalidSpecError,
    IsolationError,
    UnsupportedModelError,
)
from trans_peft.methods.specs import attach
from trans_peft.models import LoadedBase
from trans_peft.snapshot import ModelSnapshot
from trans_peft.transfer.effect import probe_effect
from trans_peft.transfer.load_adapter import attached
from trans_peft.transfer.peft_folder import read_peft_folder
from trans_peft.transfer.target_modules import compare_target_modules

__all__ = ["check_adapter_is_trainable", "save_adapter"]

_NOISE = 0.02
"""Standard deviation of the noise on the adapter's weights."""

_LENGTH = 16
"""Tokens of a pass."""

_ROUNDING_STEPS = 8
"""Rounding steps of the largest logit by which two passes of the same model may differ."""


def check_adapter_is_trainable(base: LoadedBase, spec: AdapterSpec, work_dir: Path) -> None:
    """Train, save, attach and probe a new adapter of `spec`, and restore the base.

    The adapter gets random noise as weights, because a new adapter changes no logit. The base is
    unchanged afterwards. InvalidSpecError with the reason for an adapter that `attach` rejects,
    that TRL or PEFT cannot train, whose targets do not match its own base, that changes no logit,
    or that has other logits in a second forward pass.
    """
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="adapter-check-") as scratch:
        folder = Path(scratch) / "adapter"
        snapshot = ModelSnapshot(base.model)
        try:
            model = attach(base.model, spec)
            _check_head(model, spec)
            _add_noise(model)
            with _translating_errors(spec, "trained", folder):
                _forward_and_backward(model)
            with _translating_errors(spec, "saved", folder):
                save_adapter(model, folder)
        finally:
            snapshot.restore()
        with _translating_errors(spec, "attached again", folder):
            places = _places(base.model)
            mismatches, _ = compare_target_modules(read_peft_folder(folder), places, places)
            with attached(base.model, folder) as model:
                effect = probe_effect(model, base.tokenizer)
                if not effect.found:
                    mismatches = (*mismatches, "random weights change no logit")
                if (change := _change_between_passes(model)) > 0:
                    mismatches = (
                        *mismatches,
                        f"two forward passes in evaluation mode differ by {change:.2g}, so "
                        "evaluations are not reproducible",
                    )
    if mismatches:
        raise InvalidSpecError(
            f"the {spec.peft_type} adapter cannot be used after training: {'; '.join(mismatches)}",
            expected="an adapter that can be saved and attached again, changes the base's logits, "
            "and has the same logits in every pass",
            found=dict(spec.options),
            do="change the adapter's options",
        )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter as a stock PEFT folder, without weights of the base.

    PEFT's default (`save_embedding_layers="auto"`) saves the base's embedding if the adapter
    targets it. Loading such a file would overwrite the embedding of every other base.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _add_noise(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = _NOISE * torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))


def _check_head(model: PeftModel, spec: AdapterSpec) -> None:
    """Raise InvalidSpecError if the adapter targets the output embedding, as TRL does."""
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InvalidSpecError(
            f"the {spec.peft_type} adapter targets the output embedding (lm_head), or an input "
            "embedding that shares its weight",
            expected="other modules: TRL computes the loss from lm_head.weight and would not train "
            "the adapter",
            found=dict(spec.options),
            do="remove the embedding from the targets, or train it whole with modules_to_save",
        )


def _forward_and_backward(model: PeftModel) -> None:
    """Run one forward and one backward pass in training mode, as a training step does."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            loss = model.train()(input_ids=_ids(model), labels=_ids(model), use_cache=False).loss
            if loss.requires_grad:  # dropout may leave out every module in one pass
                loss.backward()
        finally:
            model.train(was_training)


def _change_between_passes(model: PeftModel) -> float:
    """Return the largest difference between the logits of two passes, 0.0 if it is rounding."""
    with torch.no_grad():
        first, second = (
            model(input_ids=_ids(model), use_cache=False).logits.float() for _ in range(2)
        )
    change = (first - second).abs().max().item()
    rounding = _ROUNDING_STEPS * torch.finfo(model.dtype).eps * first.abs().max().item()
    return change if change > rounding else 0.0


def _ids(model: PeftModel) -> torch.Tensor:
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.arange(min(_LENGTH, rows), device=model.device)[None]


@contextmanager
def _translating_errors(spec: AdapterSpec, step: str, folder: Path) -> Iterator[None]:
    """Raise InvalidSpecError for any error of the block but a lack of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (AdapterError, ContentError, InvalidSpecError, UnsupportedModelError) as error:
        reason = str(error)
    except (OSError, IsolationError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        return
    raise InvalidSpecError(
        f"the {spec.peft_type} adapter cannot be {step}: "
        + reason.replace(str(folder), "the saved adapter"),
        expected="an adapter that can be trained, saved and attached again",
        found=dict(spec.options),
        do="change the adapter's options",
    )


def _places(model: nn.Module) -> dict[str, TensorSignature]:
    """Return the shapes and dtypes of the model's tensors by name, as in a fingerprint."""
    return {
        name: TensorSignature(tuple(tensor.shape), str(tensor.dtype), "")
        for name, tensor in model.state_dict().items()
    }
