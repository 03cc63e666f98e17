"""The name under which PEFT knows the bottleneck adapter.

PEFT keeps its methods in tables keyed by an enum that cannot be extended. A string equal to its own
name serves as a key too, as long as it answers `.value`, which transformers asks of it.
"""

__all__ = ["BOTTLENECK"]


class _PeftType(str):
    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


BOTTLENECK = _PeftType("BOTTLENECK")
