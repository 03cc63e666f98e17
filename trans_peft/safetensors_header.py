"""Read and validate the header of a safetensors file.

The format (huggingface/safetensors, README): eight bytes with the length of the header, a header in
JSON, then the bytes of all tensors, without gaps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trans_peft.domain.bounds import MAX_HEADER_BYTES, MAX_TENSORS
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import listed

__all__ = [
    "DTYPE_BITS",
    "MalformedSafetensorsError",
    "SafetensorsFile",
    "TensorEntry",
    "read_file_header",
    "read_header",
]

MAX_DIMENSIONS = 16

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Size of one element in bits, by the names that the format gives to dtypes."""


class MalformedSafetensorsError(ValueError):
    """The bytes are not a well-formed safetensors file; the message states what is wrong."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header; `start` and `end` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of a file: its tensors, and the offset in bytes at which their data starts."""

    entries: tuple[TensorEntry, ...]
    data_offset: int


def read_header(read: Callable[[int], bytes]) -> list[TensorEntry]:
    """Return the tensors of a file in the order of their bytes, which follow the header.

    `read` returns the next bytes of the file, exactly as many as it is called with. Raises
    MalformedSafetensorsError with all problems of the tensors.
    """
    length = int.from_bytes(read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedSafetensorsError(
            f"its header would be {length} bytes long; at most {MAX_HEADER_BYTES} are allowed"
        )
    return _entries(read(length))


def read_file_header(path: Path) -> SafetensorsFile:
    """Read the header of a local file, and compare its size with what the header states.

    Raises MalformedSafetensorsError, OSError.
    """
    with path.open("rb") as file:

        def read(count: int) -> bytes:
            data = file.read(count) if count <= path.stat().st_size else b""
            if len(data) < count:
                raise MalformedSafetensorsError("it ends within its header")
            return data

        entries = read_header(read)
        offset = file.tell()
    surplus = path.stat().st_size - offset - (entries[-1].end if entries else 0)
    if surplus < 0:
        raise MalformedSafetensorsError(f"it ends {-surplus} bytes too early")
    if surplus > 0:
        raise MalformedSafetensorsError(f"{surplus} bytes follow its last tensor")
    return SafetensorsFile(tuple(entries), offset)


def _entries(header: bytes) -> list[TensorEntry]:
    if (count := header.count(b"{") - 2) > MAX_TENSORS:  # before memory is spent on parsing it
        raise MalformedSafetensorsError(f"about {count} tensors; at most {MAX_TENSORS} are allowed")
    try:
        tensors = parse_json(header.decode(), object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise MalformedSafetensorsError(f"its header is not JSON: {error}") from error
    if not isinstance(tensors, dict):
        raise MalformedSafetensorsError("its header is not a JSON object")
    tensors.pop("__metadata__", None)
    if len(tensors) > MAX_TENSORS:
        raise MalformedSafetensorsError(
            f"it holds {len(tensors)} tensors; at most {MAX_TENSORS} are allowed"
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
                f"{entry.name!r} starts at byte {entry.start}; expected {position}, without a gap"
            )
        position = entry.end
    return entries


def _entry(name: str, value: Any) -> TensorEntry | str:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if len(
            shape
        ) <= MAX_DIMENSIONS and all(
            type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end)
        ):
            if dtype not in DTYPE_BITS:
                return f"unknown dtype {dtype!r}"
            bits = math.prod(shape) * DTYPE_BITS[dtype]
            if (end - start) * 8 != bits:
                return f"{dtype} of shape {shape} needs {bits // 8} bytes, but has {end - start}"
            return TensorEntry(name, dtype, tuple(shape), start, end)
        case _:
            return "its dtype, shape or data_offsets are missing or invalid"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a tensor name occurs twice")
    return values
