"""How a model looks apart from its weights' values, so that it can be given back as it came.

PEFT methods replace modules, wrap them, patch `forward`, hook or parametrise it. Putting every
module's own attributes back undoes all of that, whichever method did it; `PeftModel.unload` exists
for some methods only, and leaves flags and patches behind.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Surface"]


class Surface:
    """The children, parameters, hooks, flags and config of a model at one moment."""

    def __init__(self, model: "nn.Module") -> None:
        owners: list[Any] = [*model.modules()]
        if hasattr(model, "config"):
            owners.append(model.config)
        self._owners = [
            (owner, type(owner), dict(vars(owner)), _contents(owner)) for owner in owners
        ]
        self._weights = [
            (name, weight, weight.requires_grad, weight.data_ptr(), weight._version)
            for name, weight in model.named_parameters()
        ]

    def restore(self) -> None:
        """Make the model look as it did. Values that were written to are not brought back."""
        for owner, kind, attributes, contents in self._owners:
            if type(owner) is not kind:  # a parametrised module is of a class made for it
                owner.__class__ = kind
            vars(owner).clear()
            vars(owner).update(attributes)
            for key, before in contents.items():
                # In place: the handles of other people's hooks point at these containers.
                container = attributes[key]
                container.clear()
                if isinstance(container, list):
                    container.extend(before)
                else:
                    container.update(before)
        for _, weight, requires_grad, _, _ in self._weights:
            weight.requires_grad_(requires_grad)

    def written(self) -> list[str]:
        """Return the names of the weights that were written to, or moved, since."""
        return [
            name
            for name, weight, _, pointer, version in self._weights
            if (weight.data_ptr(), weight._version) != (pointer, version)
        ]


def _contents(owner: Any) -> dict[str, Any]:
    return {
        key: value.copy()
        for key, value in vars(owner).items()
        if isinstance(value, (dict, list, set))
    }
