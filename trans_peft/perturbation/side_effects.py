"""Run a model on a few tokens without side effects.

After the run, gradients, random states, buffers, parameters and attributes are unchanged. No hook
of the caller is called. Dropout is off, so that runs with different widths can be compared.
"""

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from trans_peft.perturbation.units import base_of

__all__ = ["TOKENS", "reseed", "run_on_tokens", "without_side_effects"]

TOKENS = 7
"""Length of the sequence that a model is run on."""


@contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Restore the model, and all random states, after the block."""
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        undo.enter_context(_same_random_states())
        undo.enter_context(_same_attributes(model))
        undo.enter_context(_without_hooks(model))
        undo.enter_context(_same_tensors(model))
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(torch.no_grad())
        undo.enter_context(_WithoutDropout())
        yield


def run_on_tokens(model: nn.Module, stack: nn.Module) -> str | None:
    """Run a language model on a few token ids. Return the error that prevents it; None if it ran.

    The ids are fixed and from the middle of the vocabulary, away from special tokens. If the model
    needs other inputs as well (such as the positions of an image), its decoder `stack` is run.
    """
    root = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    embeddings = _embeddings(root)
    if embeddings is None:
        return "it has no token embedding"
    if embeddings.weight.is_meta:
        return "its weights are not loaded"
    size = embeddings.num_embeddings
    ids = size // 4 + torch.arange(TOKENS, device=embeddings.weight.device) * 5 % max(size // 2, 1)
    ids = ids[None]
    calls: tuple[Callable[[nn.Module], Any], ...] = (
        lambda module: module.forward(input_ids=ids, use_cache=False),
        lambda module: module.forward(input_ids=ids),
        lambda module: module.forward(ids),
    )
    reasons = []
    for module in (root, stack):
        for call in calls:
            try:
                call(module)
            except Exception as error:  # a model may raise any error without its other inputs
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                return None
    return reasons[0]


def _embeddings(root: nn.Module) -> nn.Embedding | None:
    if isinstance(root, PreTrainedModel):
        with suppress(NotImplementedError):
            found = base_of(root.get_input_embeddings())
            if isinstance(found, nn.Embedding):
                return found
    return next((m for m in root.modules() if isinstance(m, nn.Embedding)), None)


class _WithoutDropout(TorchFunctionMode):
    """Makes functional dropout, which nn.Dropout calls as well, return its input."""

    _DROPOUTS = frozenset({nn.functional.dropout, torch.dropout, torch.dropout_})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def reseed() -> None:
    """Seed all random generators with a fixed seed. Call it inside `without_side_effects`.

    `torch.manual_seed` would also seed an accelerator that is not initialized yet.
    """
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if (accelerator := _accelerator()) is not None:
        accelerator.manual_seed_all(0)


def _accelerator() -> Any:
    """Return torch's module of the accelerator in use (torch.cuda); None if there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    module = None if device is None else torch.get_device_module(device)
    return module if module is not None and module.is_initialized() else None


@contextmanager
def _same_random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices=()))
        if (accelerator := _accelerator()) is not None:
            devices = range(accelerator.device_count())
            kind = accelerator.__name__.rpartition(".")[2]
            undo.enter_context(torch.random.fork_rng(devices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of every module, and the contents of those that are containers."""
    before: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        for values in (module.__dict__, module._buffers):
            contents = {
                name: list(value.items()) if isinstance(value, dict) else list(value)
                for name, value in values.items()
                if isinstance(value, list | set | dict) and not name.startswith("_")
            }
            before.append((values, dict(values), contents))
        if getattr(module, "gradient_checkpointing", False):
            # Without gradients nothing is recomputed.
            setattr(module, "gradient_checkpointing", False)  # noqa: B010
    try:
        yield
    finally:
        for values, attributes, contents in before:
            for name in values.keys() - attributes.keys():
                del values[name]
            values.update(attributes)
            for name, value in contents.items():
                container: Any = values[name]
                if isinstance(container, list):
                    container[:] = value
                else:
                    container.clear()
                    container.update(value)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the caller's hooks, except those by which torch's FSDP shards modules."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    modules = [m for m in model.modules() if not type(m).__name__.startswith("FSDP")]
    before = [(m, name, getattr(m, name)) for m in modules for name in names if getattr(m, name)]
    for module, name, _ in before:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in before:
            setattr(module, name, hooks)


class _CopiesBeforeWrites(TorchDispatchMode):
    """Copies a parameter or buffer before the first operation that writes to it."""

    def __init__(self, tensors: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self._watched: dict[Any, list[torch.Tensor]] = {}
        for tensor in tensors:
            self._watched.setdefault(self._place(tensor), []).append(tensor)
        self._copies: dict[Any, list[torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._before_write(argument, value)
            for argument in func._schema.arguments:
                self._before_write(argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def restore(self) -> None:
        for place, copies in self._copies.items():
            for tensor, copy in zip(self._watched[place], copies, strict=True):
                tensor.data.copy_(copy)

    def _before_write(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in value if isinstance(value, list | tuple) else [value]:
            place = self._place(tensor) if isinstance(tensor, torch.Tensor) else None
            if place in self._watched and place not in self._copies:
                self._copies[place] = [t.detach().clone() for t in self._watched[place]]

    @staticmethod
    def _place(tensor: torch.Tensor) -> Any:
        try:
            return tensor.device, tensor.untyped_storage().data_ptr() or id(tensor)
        except (NotImplementedError, RuntimeError):  # some subclasses have no storage
            return id(tensor)


@contextmanager
def _same_tensors(model: nn.Module) -> Iterator[None]:
    def tensors() -> Iterator[torch.Tensor]:
        yield from model.parameters()
        yield from model.buffers()

    mode = _CopiesBeforeWrites(tensors())
    try:
        with mode:
            yield
    finally:
        with torch.no_grad():
            mode.restore()
