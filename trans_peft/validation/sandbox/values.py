"""Plain Python values as JSON, and nothing else: what two processes may say to each other.

Unlike pickle, reading builds only the types listed here, with constructors of this side: what
arrives has no code, and no `__eq__` but Python's own. A subclass travels as its base (a namedtuple
as a tuple, an IntEnum as an int), which is also how Python compares it. An iterator is read to its
end. Any other object stays where it is, and a number for it travels.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from types import NoneType
from typing import Any, NamedTuple

__all__ = ["Unrepresentable", "decode", "encode"]


class Unrepresentable(Exception):  # noqa: N818  a word about a value
    """A value that cannot travel, or something that was asked of one that did not."""


class _Kind(NamedTuple):
    """How one type travels: as text, or as parts that are encoded in their turn."""

    type: type
    take_apart: Callable[[Any], str | Iterable[Any]]
    build: Callable[[Any], Any]


def _flat(mapping: dict[Any, Any]) -> list[Any]:
    return [part for pair in mapping.items() for part in pair]


def _pairs(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


# A type stands before those it inherits from.
_KINDS = {
    "int": _Kind(int, lambda n: int.__format__(n, "x"), lambda text: int(text, 16)),
    "float": _Kind(float, float.hex, float.fromhex),
    "bytes": _Kind(bytes, bytes.hex, bytes.fromhex),
    "bytearray": _Kind(bytearray, bytearray.hex, bytearray.fromhex),
    "Decimal": _Kind(Decimal, Decimal.__str__, Decimal),
    "list": _Kind(list, list.__iter__, list),
    "tuple": _Kind(tuple, tuple.__iter__, tuple),
    "set": _Kind(set, set.__iter__, set),
    "frozenset": _Kind(frozenset, frozenset.__iter__, frozenset),
    "deque": _Kind(deque, deque.__iter__, deque),
    "Counter": _Kind(Counter, _flat, lambda parts: Counter(_pairs(parts))),
    "OrderedDict": _Kind(OrderedDict, _flat, lambda parts: OrderedDict(_pairs(parts))),
    "dict": _Kind(dict, _flat, _pairs),
    "keys": _Kind(type({}.keys()), iter, lambda parts: dict.fromkeys(parts).keys()),
    "values": _Kind(type({}.values()), iter, lambda parts: dict(enumerate(parts)).values()),
    "items": _Kind(type({}.items()), iter, lambda parts: dict(parts).items()),
    "range": _Kind(range, lambda r: (r.start, r.stop, r.step), lambda parts: range(*parts)),
    "complex": _Kind(complex, lambda z: (z.real, z.imag), lambda parts: complex(*parts)),
    "Fraction": _Kind(
        Fraction, lambda f: (f.numerator, f.denominator), lambda parts: Fraction(*parts)
    ),
    "iterator": _Kind(Iterator, list, iter),
}
_TYPES = {
    kind.__name__: kind
    for kind in (*(kind.type for kind in _KINDS.values()), bool, str, object, type, NoneType)
}


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """Return `value` as what `json` can write.

    `keep(object)` returns what stands for an object that cannot travel: anything JSON can write.
    Unrepresentable where it says so, and for a value that contains itself.
    """
    try:
        return _encode(value, keep)
    except RecursionError:
        raise Unrepresentable("a value that contains itself, or is nested too deep") from None


def _encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for tag, kind in _KINDS.items():
        if isinstance(value, kind.type):
            parts = kind.take_apart(value)
            return [tag, parts if isinstance(parts, str) else [_encode(p, keep) for p in parts]]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    return ["object", keep(value)]


def decode(data: Any, find: Callable[[Any], Any]) -> Any:
    """Return the value that `encode` wrote; `find` is `keep` backwards.

    What `encode` did not write raises an ArithmeticError, LookupError, MemoryError, RecursionError,
    TypeError or ValueError, or gives another plain value. It runs no code but that of these types.
    """
    if data is None or isinstance(data, bool | str):
        return data
    tag, content = data
    if tag == "object":
        return find(content)
    if tag == "type":
        return _TYPES[content]
    build = _KINDS[tag].build
    if isinstance(content, str):
        return build(content)
    return build([decode(part, find) for part in content])
