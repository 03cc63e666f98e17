"""Encode plain Python values as JSON, the only values that two sandboxes exchange.

Unlike pickle, decoding creates only the types listed here, with constructors of the receiving side.
The result contains no code of the sender and no `__eq__` but Python's own. An instance of a
subclass is encoded as its base type (a namedtuple as a tuple, an IntEnum as an int), which is also
how Python compares it. An iterator is read to its end. Any other object stays with the sender and
is encoded as a reference.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from types import NoneType
from typing import Any, NamedTuple

__all__ = ["UnrepresentableError", "decode", "encode"]


class UnrepresentableError(Exception):
    """A value that cannot be sent, or an operation that needs a value that was not sent."""


class _Codec(NamedTuple):
    """How one type is encoded: as text, or as parts that are encoded themselves."""

    type: type
    split: Callable[[Any], str | Iterable[Any]]
    build: Callable[[Any], Any]


def _flat(mapping: dict[Any, Any]) -> list[Any]:
    return [part for pair in mapping.items() for part in pair]


def _pairs(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


# A type comes before the types that it inherits from.
_CODECS = {
    "int": _Codec(int, lambda n: int.__format__(n, "x"), lambda text: int(text, 16)),
    "float": _Codec(float, float.hex, float.fromhex),
    "bytes": _Codec(bytes, bytes.hex, bytes.fromhex),
    "bytearray": _Codec(bytearray, bytearray.hex, bytearray.fromhex),
    "Decimal": _Codec(Decimal, Decimal.__str__, Decimal),
    "list": _Codec(list, list.__iter__, list),
    "tuple": _Codec(tuple, tuple.__iter__, tuple),
    "set": _Codec(set, set.__iter__, set),
    "frozenset": _Codec(frozenset, frozenset.__iter__, frozenset),
    "deque": _Codec(deque, deque.__iter__, deque),
    "Counter": _Codec(Counter, _flat, lambda parts: Counter(_pairs(parts))),
    "OrderedDict": _Codec(OrderedDict, _flat, lambda parts: OrderedDict(_pairs(parts))),
    "dict": _Codec(dict, _flat, _pairs),
    "keys": _Codec(type({}.keys()), iter, lambda parts: dict.fromkeys(parts).keys()),
    "values": _Codec(type({}.values()), iter, lambda parts: dict(enumerate(parts)).values()),
    "items": _Codec(type({}.items()), iter, lambda parts: dict(parts).items()),
    "range": _Codec(range, lambda r: (r.start, r.stop, r.step), lambda parts: range(*parts)),
    "complex": _Codec(complex, lambda z: (z.real, z.imag), lambda parts: complex(*parts)),
    "Fraction": _Codec(
        Fraction, lambda f: (f.numerator, f.denominator), lambda parts: Fraction(*parts)
    ),
    "iterator": _Codec(Iterator, list, iter),
}
_TYPES = {
    kind.__name__: kind
    for kind in (*(codec.type for codec in _CODECS.values()), bool, str, object, type, NoneType)
}


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return `value` in a form that `json` can write.

    `refer(object)` returns a reference to an object that cannot be sent: anything JSON can write.
    It may raise UnrepresentableError instead. UnrepresentableError also for a value that contains
    itself.
    """
    try:
        return _encode(value, refer)
    except RecursionError:
        raise UnrepresentableError("the value contains itself or is nested too deeply") from None


def _encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for tag, codec in _CODECS.items():
        if isinstance(value, codec.type):
            parts = codec.split(value)
            return [tag, parts if isinstance(parts, str) else [_encode(p, refer) for p in parts]]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[Any], Any]) -> Any:
    """Return the value that `encode` wrote. `resolve` is the inverse of `refer`.

    Data that `encode` did not write raises an ArithmeticError, LookupError, MemoryError,
    RecursionError, TypeError or ValueError, or gives another plain value. Decoding runs no code but
    the constructors of these types.
    """
    if data is None or isinstance(data, bool | str):
        return data
    tag, content = data
    if tag == "object":
        return resolve(content)
    if tag == "type":
        return _TYPES[content]
    build = _CODECS[tag].build
    if isinstance(content, str):
        return build(content)
    return build([decode(part, resolve) for part in content])
