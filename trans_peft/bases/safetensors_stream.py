"""Read a safetensors file as a stream: the signature of every tensor, no tensor in memory.

Follows the format's description (huggingface/safetensors, README): eight bytes with the header's
length, a JSON header, then the tensors one after the other without holes. Unlike the safetensors
package it needs no file on disk and no memory for the weights: one chunk at a time.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trans_peft.domain.base import TensorSignature
from trans_peft.domain.bounds import MAX_HEADER_BYTES, MAX_TENSORS
from trans_peft.errors import listed

__all__ = [
    "SKETCH_SIZE",
    "ByteStream",
    "Entry",
    "MalformedSafetensorsError",
    "read_header",
    "sketch_positions",
    "tensor_signatures",
]

SKETCH_SIZE = 32
"""So many values of a tensor are kept in its sketch (all of them where it has fewer)."""

MAX_DIMENSIONS = 16

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class MalformedSafetensorsError(ValueError):
    """The bytes are no well-formed safetensors file; the message says where."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `start` and `end` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_signatures(chunks: Iterator[bytes]) -> dict[str, TensorSignature]:
    """Return name -> signature of every tensor in the stream of one safetensors file.

    Reads to the end of the stream. Raises MalformedSafetensorsError.
    """
    stream = ByteStream(chunks)
    signatures = {}
    for entry in read_header(stream):
        digest = hashlib.sha256()
        sketch = _Sketch(entry)
        for piece in stream.take(entry.end - entry.start):
            digest.update(piece)
            sketch.update(piece)
        signatures[entry.name] = TensorSignature(
            entry.shape, entry.dtype, digest.hexdigest(), sketch.values()
        )
    stream.end()
    return signatures


def read_header(stream: "ByteStream") -> list[Entry]:
    """Return the tensors of a file in the order of their bytes, which follow in the stream.

    Raises MalformedSafetensorsError with every problem of them.
    """
    length = int.from_bytes(stream.exactly(8), "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedSafetensorsError(
            f"its header would be {length} bytes long; at most {MAX_HEADER_BYTES} are allowed"
        )
    return _entries(stream.exactly(length))


def sketch_positions(elements: int) -> tuple[int, ...]:
    """Return where, in a flattened tensor of so many elements, the sketch's values are.

    Multiples of the golden ratio modulo one: evenly spread like equal steps, but never all in the
    same column of a matrix. Integers throughout, so the same on every machine.
    """
    if elements <= SKETCH_SIZE:
        return tuple(range(elements))
    golden, scale = 0x9E3779B97F4A7C15, 1 << 64
    return tuple(sorted({(i * golden % scale) * elements // scale for i in range(SKETCH_SIZE)}))


class ByteStream:
    """Chunks of any size, taken in the sizes that the format asks for."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def take(self, count: int) -> Iterator[memoryview]:
        """Give the next `count` bytes in pieces, as they come. MalformedSafetensorsError."""
        while count:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise MalformedSafetensorsError(f"it ends {count} bytes too early")
                self._rest = memoryview(chunk)
                continue
            piece, self._rest = self._rest[:count], self._rest[count:]
            count -= len(piece)
            yield piece

    def exactly(self, count: int) -> bytes:
        """Return the next `count` bytes. MalformedSafetensorsError."""
        return b"".join(self.take(count))

    def end(self) -> None:
        """Read to the end, where nothing may be left. MalformedSafetensorsError."""
        surplus = len(self._rest) + sum(len(chunk) for chunk in self._chunks)
        if surplus:
            raise MalformedSafetensorsError(f"{surplus} bytes follow its last tensor")


def _entries(header: bytes) -> list[Entry]:
    try:
        tensors = json.loads(header, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise MalformedSafetensorsError(f"its header is no JSON: {error}") from error
    if not isinstance(tensors, dict):
        raise MalformedSafetensorsError("its header is no JSON object")
    tensors.pop("__metadata__", None)
    if len(tensors) > MAX_TENSORS:
        raise MalformedSafetensorsError(
            f"it holds {len(tensors)} tensors; at most {MAX_TENSORS} are read"
        )
    entries, problems = [], []
    for name, value in tensors.items():
        entry = _entry(name, value)
        if isinstance(entry, str):
            problems.append(f"{name!r}: {entry}")
        else:
            entries.append(entry)
    if problems:
        raise MalformedSafetensorsError(listed(problems, 20))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            raise MalformedSafetensorsError(
                f"{entry.name!r} starts at byte {entry.start}, not at {position}, where it must"
            )
        position = entry.end
    return entries


def _entry(name: str, value: Any) -> Entry | str:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if len(
            shape
        ) <= MAX_DIMENSIONS and all(
            type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)
        ):
            if dtype not in _BITS:
                return f"unknown dtype {dtype!r}"
            bits = math.prod(shape) * _BITS[dtype]
            if (end - start) * 8 != bits:
                return f"{dtype} of shape {shape} needs {bits // 8} bytes, it has {end - start}"
            return Entry(name, dtype, tuple(shape), start, end)
        case _:
            return "not described by dtype, shape and data_offsets"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands there twice")
    return values


class _Sketch:
    """Collects the sketch's elements from a tensor's bytes as they pass by."""

    def __init__(self, entry: Entry) -> None:
        self._decode = _DECODERS.get(entry.dtype)
        self._width = _BITS[entry.dtype] // 8
        elements = math.prod(entry.shape) if self._decode else 0
        self._starts = [position * self._width for position in sketch_positions(elements)]
        self._found = bytearray()
        self._next = self._seen = 0

    def update(self, piece: memoryview) -> None:
        begin, end = self._seen, self._seen + len(piece)
        self._seen = end
        while self._next < len(self._starts) and self._starts[self._next] < end:
            start = self._starts[self._next]
            stop = start + self._width
            self._found += piece[max(start, begin) - begin : min(stop, end) - begin]
            if stop > end:
                return
            self._next += 1

    def values(self) -> tuple[float, ...]:
        if self._decode is None:
            return ()
        width = self._width
        numbers = (
            self._decode(bytes(self._found[at : at + width]))
            for at in range(0, len(self._found), width)
        )
        # JSON has no NaN; the digest still tells such a tensor from one with a zero there.
        return tuple(number if math.isfinite(number) else 0.0 for number in numbers)


def _unpack(code: str) -> Callable[[bytes], float]:
    return lambda element: float(struct.unpack(f"<{code}", element)[0])


def _e4m3(element: bytes) -> float:
    sign = -1.0 if element[0] & 0x80 else 1.0
    exponent, mantissa = element[0] >> 3 & 0xF, element[0] & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


_DECODERS: dict[str, Callable[[bytes], float]] = {
    "BOOL": _unpack("B"), "U8": _unpack("B"), "U16": _unpack("H"), "U32": _unpack("I"),
    "U64": _unpack("Q"), "I8": _unpack("b"), "I16": _unpack("h"), "I32": _unpack("i"),
    "I64": _unpack("q"),
    "F16": _unpack("e"), "F32": _unpack("f"), "F64": _unpack("d"),
    "BF16": lambda element: _unpack("f")(b"\0\0" + element),
    "F8_E5M2": lambda element: _unpack("e")(b"\0" + element),
    "F8_E4M3": _e4m3,
}  # fmt: skip
