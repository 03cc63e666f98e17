"""Compute the signature of every tensor of a safetensors file from a stream of its bytes.

Unlike the safetensors package, this needs no file on disk and no memory for the weights: it reads
one chunk at a time.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterator

from trans_peft.domain.base import TensorSignature
from trans_peft.safetensors_header import (
    DTYPE_BITS,
    MalformedSafetensorsError,
    TensorEntry,
    read_header,
)

__all__ = ["SKETCH_SIZE", "ByteStream", "sketch_positions", "tensor_signatures"]

SKETCH_SIZE = 32
"""Number of values in the sketch of a tensor; a smaller tensor has all of its values there."""


def tensor_signatures(chunks: Iterator[bytes]) -> dict[str, TensorSignature]:
    """Return name -> signature of every tensor of one safetensors file.

    Reads to the end of the stream. Raises MalformedSafetensorsError.
    """
    stream = ByteStream(chunks)
    signatures = {}
    for entry in read_header(stream.exactly):
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


def sketch_positions(elements: int) -> tuple[int, ...]:
    """Return the positions of the sketch's values in a flattened tensor with that many elements.

    They are multiples of the golden ratio modulo one: spread evenly, as equal steps would be, but
    never all in one column of a matrix. The arithmetic is in integers, so that the positions are
    the same on every machine.
    """
    if elements <= SKETCH_SIZE:
        return tuple(range(elements))
    golden, scale = 0x9E3779B97F4A7C15, 1 << 64
    return tuple(sorted({(i * golden % scale) * elements // scale for i in range(SKETCH_SIZE)}))


class ByteStream:
    """A stream of chunks of any size, read in pieces of given sizes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def take(self, count: int) -> Iterator[memoryview]:
        """Yield the next `count` bytes in pieces. MalformedSafetensorsError if the stream ends."""
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
        """Return the next `count` bytes. MalformedSafetensorsError if the stream ends."""
        return b"".join(self.take(count))

    def end(self) -> None:
        """Read to the end of the stream. MalformedSafetensorsError if any bytes are left."""
        surplus = len(self._rest) + sum(len(chunk) for chunk in self._chunks)
        if surplus:
            raise MalformedSafetensorsError(f"{surplus} bytes follow its last tensor")


class _Sketch:
    """Collects the values of a sketch from the bytes of a tensor, piece by piece."""

    def __init__(self, entry: TensorEntry) -> None:
        self._decode = _DECODERS.get(entry.dtype)
        self._width = DTYPE_BITS[entry.dtype] // 8
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
        # JSON has no NaN. The sha256 still distinguishes such a tensor from one with a zero.
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
