"""Record the structure of a model (all but the values of its weights), and restore it.

PEFT methods replace or wrap modules, patch `forward`, and register hooks and parametrizations.
Restoring the attributes of every module undoes all of these for every method. `PeftModel.unload`
exists for some methods only, and leaves flags and patches behind.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ModelSnapshot"]


class ModelSnapshot:
    """The submodules, parameters, hooks, flags and configurations of a model at one moment."""

    def __init__(self, model: "nn.Module") -> None:
        owners: list[Any] = [*model.modules()]
        for name in ("config", "generation_config"):
            owners += _configs(getattr(model, name, None))
        self._owners = [
            (owner, type(owner), dict(vars(owner)), _copied_containers(owner)) for owner in owners
        ]
        self._weights = [
            (weight, weight.data, weight.requires_grad, weight.grad)
            for weight in model.parameters()
        ]
        self._stored = {
            tensor.untyped_storage().data_ptr()
            for tensor in (*model.parameters(), *model.buffers())
            if _has_storage(tensor)
        }

    def restore(self) -> None:
        """Restore the model, including the storage and dtype of its parameters.

        Values that were overwritten in place stay overwritten: `trans_peft.checksums` detects
        those.
        """
        for owner, kind, attributes, contents in self._owners:
            if type(owner) is not kind:  # torch gives a parametrized module a class of its own
                owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(attributes)
            for key, before in contents.items():
                # In place, because handles of hooks refer to these containers.
                container = attributes[key]
                container.clear()
                if isinstance(container, list):
                    container.extend(before)
                else:
                    container.update(before)
        for weight, data, requires_grad, grad in self._weights:
            if weight.data_ptr() != data.data_ptr() or weight.dtype != data.dtype:
                weight.data = data
            weight.requires_grad_(requires_grad)
            weight.grad = grad

    def holds(self, adapted: "nn.Module") -> bool:
        """Whether `adapted` contains every parameter of the model with the same storage.

        If not, a PEFT method has replaced weights of the base.
        """
        kept = {id(parameter) for parameter in adapted.parameters()}
        return all(
            id(weight) in kept and weight.data_ptr() == data.data_ptr()
            for weight, data, *_ in self._weights
        )

    def overlapping(self, tensors: "Mapping[str, Tensor]") -> list[str]:
        """Return the keys of the tensors that share their storage with the model's own tensors."""
        return [
            key
            for key, tensor in tensors.items()
            if _has_storage(tensor) and tensor.untyped_storage().data_ptr() in self._stored
        ]


def _has_storage(tensor: "Tensor") -> bool:
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > 0


def _configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and all configurations nested in it."""
    if hasattr(config, "to_dict") and hasattr(config, "__dict__"):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def _copied_containers(owner: Any) -> dict[str, Any]:
    return {
        key: value.copy()
        for key, value in vars(owner).items()
        if isinstance(value, (dict, list, set))
    }
