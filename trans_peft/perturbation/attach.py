"""The context manager `perturbed`: masking and dropping around any training code.

Implements equations 4-7 of the Trans-PEFT paper. Inside the `with` block some modules have another
`forward` method. No module is wrapped, so the keys of the state dict and the saved adapter are
those of stock PEFT. In contrast to the authors' two patched model files, this works with any model
file, draws the same mask when activation checkpointing recomputes a layer, keeps dtypes, and skips
the computation of masked neurons and dropped sub-layers.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import InvalidSpecError, UnsupportedModelError
from trans_peft.perturbation.draws import SubLayerKind
from trans_peft.perturbation.dropping import drop_attention, drop_ffn
from trans_peft.perturbation.layout import Layout
from trans_peft.perturbation.mask_site import MaskSite
from trans_peft.perturbation.masking import mask_attention, mask_ffn
from trans_peft.perturbation.step_counter import StepCounter
from trans_peft.perturbation.units import DecoderLayer
from trans_peft.perturbation.verified import found_layers, verified_layers

__all__ = ["PerturbationHandle", "perturbed"]

_perturbed_stacks: WeakSet[nn.Module] = WeakSet()


class PerturbationHandle:
    """The state of a running `perturbed` block.

    Attributes:
        multiplied: sub-layers ("layer 3 ffn") whose masked neurons are computed and multiplied by
            zero instead of being skipped, each with the reason.
        without_ffn: indices of the layers without an FFN (the state-space layers of a hybrid
            model). They are not perturbed.
    """

    def __init__(
        self,
        step_counter: StepCounter | None,
        multiplied: Mapping[str, str],
        without_ffn: tuple[int, ...] = (),
    ) -> None:
        self._step_counter = step_counter
        self.multiplied = multiplied
        self.without_ffn = without_ffn

    @property
    def step(self) -> int:
        """Number of completed optimizer steps (0 if the perturbation is off)."""
        return 0 if self._step_counter is None else self._step_counter.step

    def seek(self, step: int) -> None:
        """Set the number of completed optimizer steps, to resume a run. `step` is at least 0."""
        if step < 0:
            raise InvalidSpecError(
                "seek() needs a step of at least 0", expected="at least 0", found=step
            )
        if self._step_counter is not None:
            self._step_counter.seek(step)


@contextmanager
def perturbed(
    model: nn.Module,
    perturbation: Perturbation,
    *,
    seed: int,
    rank: int | None = None,
    step: int = 0,
    layout: Layout | None = None,
) -> Iterator[PerturbationHandle]:
    """Perturb a causal language model in training mode inside the block.

    Works around any training code (a plain loop, the Hugging Face Trainer, TRL, accelerate). Enter
    it after PEFT has added the adapter:

        with perturbed(model, Perturbation(masking_p=0.1, dropping_p=0.1), seed=42):
            trainer.train()

    Each draw is a pure function of (seed, rank, optimizer step, micro-step, layer). All rows of a
    batch share a draw, and so do all experts of a mixture; with granularity "element" each element
    has its own bit. In eval mode, and with `perturbation.is_off`, the results are bit-identical to
    those of the unperturbed model. A model without a PEFT adapter is perturbed with a warning: a
    full fine-tune changes the weights that Trans-PEFT expects to be frozen.

    Args:
        model: the model with its adapter, in training mode.
        perturbation: probabilities and places of the perturbation.
        seed: seed of the draws.
        rank: rank of this process; default: that of torch.distributed. Processes that share one
            batch, as in tensor parallelism, must get the same rank.
        step: completed optimizer steps, if a run is resumed.
        layout: names of the sub-layers, for a model in which they cannot be found.

    Raises:
        InvalidSpecError: `spared_layers` out of range or naming every layer, a model in eval mode
            (as `from_pretrained` returns it), already perturbed or without a trainable parameter,
            an argument of another type, `seed`, `rank` or `step` out of range. The model is
            unchanged.
        UnsupportedModelError: `model` is not a module, no FFN found, a module changed inside the
            block, or nn.DataParallel.
    """
    _check_types(model, perturbation, layout)
    problems = [
        f"{name} must lie in [0, 2^64), not {value!r}"
        for name, value in (("seed", seed), ("rank", rank or 0), ("step", step))
        if not (isinstance(value, int) and 0 <= value < 2**64)
    ]
    if perturbation.is_off and not problems:
        yield PerturbationHandle(None, {})
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append("no parameter requires a gradient: add the adapter first (get_peft_model)")
    kinds = _kinds(perturbation)
    stack, layers = found_layers(model, layout, kinds)
    # Not `model.training`: PEFT's wrapper is in training mode although the model inside it is not.
    if not stack.training:
        problems.append("the model is in eval mode: call model.train() before perturbed()")
    beyond = [index for index in perturbation.spared_layers if index >= len(layers)]
    if beyond:
        problems.append(
            f"spared_layers {beyond} are out of range: its layers are 0 to {len(layers) - 1}"
        )
    perturbed_already = stack in _perturbed_stacks
    if perturbed_already:
        problems.append(
            "it is already perturbed: leave the first perturbed() block before entering another"
        )
    else:
        layers = verified_layers(model, stack, layers, kinds=kinds, stated=layout is not None)
    perturbable = {index for index, layer in enumerate(layers) if any(map(layer.neurons, kinds))}
    if not perturbable - set(perturbation.spared_layers):
        problems.append("spared_layers names every layer, so that nothing would be perturbed")
    if problems:
        raise InvalidSpecError(f"the model cannot be perturbed: {'; '.join(problems)}")

    if not any(isinstance(part, (PeftModel, BaseTunerLayer)) for part in model.modules()):
        warnings.warn(
            "perturbed() got a model without a PEFT adapter. Trans-PEFT perturbs a frozen base; in "
            "a full fine-tune the perturbed weights are trained as well. Add the adapter before "
            "perturbed() if you did not intend this.",
            stacklevel=3,  # the caller's `with` statement
        )
    chosen = [layer for layer in enumerate(layers) if layer[0] not in perturbation.spared_layers]
    snapshot = _children_of([layer.module for _, layer in chosen])
    step_counter = StepCounter(stack, step, lambda: _check_pass(stack, snapshot))
    multiplied: dict[str, str] = {}
    with ExitStack() as undo:
        for index, layer in chosen:
            for kind in kinds:
                if not layer.neurons(kind):
                    continue
                mask_site = MaskSite(
                    perturbation, step_counter, seed, rank, index, kind, layer.neurons(kind)
                )
                if reason := _perturb(mask_site, layer, kind, undo):
                    multiplied[f"layer {index} {kind}"] = reason
        for observer in step_counter.start():
            undo.callback(observer.remove)
        _perturbed_stacks.add(stack)
        undo.callback(_perturbed_stacks.discard, stack)
        without_ffn = tuple(index for index, layer in enumerate(layers) if not layer.ffn)
        yield PerturbationHandle(step_counter, multiplied, without_ffn)


def _check_types(model: object, perturbation: object, layout: object) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            "perturbed() needs a loaded model",
            expected="a torch.nn.Module with its adapter",
            found=f"{type(model).__name__} {model!r:.80}",
            do="load it with AutoModelForCausalLM.from_pretrained, then call get_peft_model",
        )
    if not isinstance(perturbation, Perturbation) or not isinstance(layout, Layout | None):
        raise InvalidSpecError(
            "perturbed() got an argument of another type",
            expected="a Perturbation, and a Layout or None",
            found=f"{type(perturbation).__name__}, {type(layout).__name__}",
            do="pass Perturbation(masking_p=0.1), for example",
        )


def _kinds(perturbation: Perturbation) -> tuple[SubLayerKind, ...]:
    return ("ffn", "attention") if perturbation.where == "both" else (perturbation.where,)


def _perturb(
    mask_site: MaskSite, layer: DecoderLayer, kind: SubLayerKind, undo: ExitStack
) -> str | None:
    """Perturb one sub-layer until `undo` closes. Return why it is not sliced; None if it is."""
    reason = None
    if mask_site.perturbation.masking_p:
        if kind == "ffn":
            reason = mask_ffn(mask_site, layer.ffn, undo)
        elif layer.attention is not None:
            reason = mask_attention(mask_site, layer.attention, undo)
    if mask_site.perturbation.dropping_p:
        (drop_ffn if kind == "ffn" else drop_attention)(mask_site, layer, undo)
    return reason


Snapshot = list[tuple[dict[str, nn.Module | None], tuple[nn.Module | None, ...]]]


def _children_of(layers: list[nn.Module]) -> Snapshot:
    """Return the children of every module in these layers, for a later comparison."""
    dicts = [module._modules for layer in layers for module in layer.modules() if module._modules]
    return [(children, tuple(children.values())) for children in dicts]


def _check_pass(stack: nn.Module, snapshot: Snapshot) -> None:
    if getattr(stack, "_is_replica", False):
        raise UnsupportedModelError(
            "nn.DataParallel copies the model for every forward pass; the copies are not perturbed",
            do="start one process per device (accelerate launch, torchrun), or make one device "
            "visible with CUDA_VISIBLE_DEVICES",
        )
    if any(tuple(children.values()) != before for children, before in snapshot):
        raise UnsupportedModelError(
            "modules of the model changed inside the perturbed() block; an adapter that was added "
            "there would not be masked",
            do="add the adapter first (get_peft_model), then enter perturbed()",
        )
