"""The peft_type of the bottleneck adapter.

The keys of PEFT's tables of methods are members of an enum that cannot be extended. A string works
as a key as well if it has the attribute `value`, which transformers reads.
"""

__all__ = ["BOTTLENECK"]


class _PeftType(str):
    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


BOTTLENECK = _PeftType("BOTTLENECK")
