"""The bytes of a data file and the examples that they hold, within bounds.

A packed file of a few megabytes can unpack to gigabytes. `examples_in` therefore parses a file in a
child process with limits, and stops at the bounds on bytes and rows of `trans_peft.domain.bounds`.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trans_peft.data.example import ChatMessage, Example
from trans_peft.data.json_rows import json_rows
from trans_peft.data.rows import Row, examples_from
from trans_peft.data.templates import through_template
from trans_peft.domain.bounds import MAX_DATA_BYTES, MAX_DATA_ROWS, MAX_ROW_CHARACTERS
from trans_peft.domain.untrusted_json import duplicates
from trans_peft.errors import DataError, listed
from trans_peft.isolation import Limits, call_isolated

__all__ = ["check_kind", "checked", "examples_in", "parse_examples", "unpacked_rows"]

_LIMITS = Limits(cpu_s=600, wall_s=1800, memory_bytes=8 << 30, result_bytes=1 << 30)
_BATCH_ROWS, _SLICE_ROWS = 1024, 16


def parse_examples(lines: bytes, name: str) -> tuple[Example, ...]:
    """Read JSON Lines from memory; `name` is for the messages of a DataError."""
    return examples_from(json_rows(lines, name), name)


def examples_in(
    data: bytes, uri: str, *, template: str = "", limit: int | None = None
) -> tuple[Example, ...]:
    """Parse a data file in a child process and return its examples (the first `limit`).

    The name says what it is. Raises DataError with every bad row or the exceeded bound,
    InvalidSpecError for an unknown template, LimitExceededError where parsing takes more time or
    memory than it may.
    """
    check_kind(uri)
    rows = call_isolated(
        _plain_examples,
        data,
        uri,
        template,
        limit,
        limits=_LIMITS,
        subject=f"the data file {uri}",
        imports=("pyarrow.parquet",) if _suffix(uri) == ".parquet" else (),
    )
    return tuple(
        Example(
            id=id_,
            prompt=prompt,
            completion=completion,
            messages=messages and tuple(ChatMessage(role, content) for role, content in messages),
            choices=tuple(choices),
            reference=reference,
            place=place,
        )
        for id_, prompt, completion, messages, choices, reference, place in rows
    )


def checked(rows: list[Row], uri: str, template: str) -> tuple[Example, ...]:
    """Return the examples of rows, read through a template if one is named.

    Raises DataError with every bad row, among them those above MAX_ROW_CHARACTERS.
    """
    if len(rows) > MAX_DATA_ROWS:
        raise _too_many_rows(uri, len(rows))
    examples = examples_from(through_template(rows, template) if template else rows, uri)
    long = [
        f"{example.location}: {size} characters"
        for example in examples
        if (size := example.characters) > MAX_ROW_CHARACTERS
    ]
    if long:
        raise DataError(
            f"{uri}: {len(long)} of {len(examples)} rows are too long",
            expected=f"at most {MAX_ROW_CHARACTERS} characters",
            found=listed(long),
            do="shorten or remove these rows",
        )
    return examples


def check_kind(uri: str) -> None:
    """Raise DataError unless a file's name says that it is of a kind that can be read."""
    if _suffix(uri) not in _READERS:
        raise DataError(
            f"{uri} is of no kind that can be read",
            expected=f"a name that ends in {', '.join(_READERS)} (and .gz, if it is packed), "
            "or hub:OWNER/NAME[:CONFIG[:SPLIT]]",
            found=_suffix(uri) or "no ending",
        )


def unpacked_rows(data: bytes, uri: str) -> list[Row]:
    """Return the rows that a file holds, not checked. DataError for what is no such file.

    It takes as much time and memory as the file asks for, within the bounds on bytes and rows:
    `examples_in` runs it in a child process.
    """
    if uri.endswith(".gz"):
        data = _unpacked(data, uri, MAX_DATA_BYTES)
    return _READERS[_suffix(uri)](data, uri)


def _plain_examples(data: bytes, uri: str, template: str, limit: int | None) -> list[list[Any]]:
    """Parse a file and return its examples as plain lists: runs in the child process."""
    examples = checked(unpacked_rows(data, uri), uri, template)
    return [
        [
            example.id,
            example.prompt,
            example.completion,
            example.messages and [[turn.role, turn.content] for turn in example.messages],
            list(example.choices),
            example.reference,
            example.place,
        ]
        for example in examples[:limit]
    ]


def _suffix(uri: str) -> str:
    return Path(uri.removesuffix(".gz")).suffix


def _unpacked(data: bytes, uri: str, most: int) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            unpacked = file.read(most + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{uri} cannot be unpacked", found=error) from error
    if len(unpacked) > most:
        raise _too_large(uri)
    return unpacked


def _parquet_rows(data: bytes, uri: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        if file.metadata.num_rows > MAX_DATA_ROWS:
            raise _too_many_rows(uri, file.metadata.num_rows)
        twice = list(_columns_twice(file.schema_arrow))
        if twice:
            raise DataError(
                f"{uri}: the same column stands twice",
                found=listed(twice),
                do="rename or remove one of each",
            )
        return [
            (f"row {number}", row) for number, row in enumerate(_parquet_values(file, uri), start=1)
        ]
    except (DataError, MemoryError):
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError, LookupError) as error:
        # to_pylist raises the last three for texts, dates and time zones that Python cannot hold.
        raise DataError(
            f"{uri} is not Parquet that can be read", found=f"{type(error).__name__}: {error}"
        ) from error


def _columns_twice(fields: Any, above: str = "") -> Iterator[str]:
    """Yield the names of columns that stand twice in one schema or struct, at any depth."""
    names = [field.name for field in fields]
    yield from (f"{above}{name}" for name in duplicates(names))
    for field in fields:
        inner = [field.type.field(number) for number in range(field.type.num_fields)]
        yield from _columns_twice(inner, f"{above}{field.name}.")


def _parquet_values(file: Any, uri: str) -> Iterator[Any]:
    """Yield rows within MAX_DATA_BYTES.

    Neither the file's metadata nor the size of an Arrow batch tells what rows take: a dictionary
    holds a text once, however many rows repeat it. Few rows are decoded at a time and counted.
    """
    room = MAX_DATA_BYTES
    for batch in file.iter_batches(batch_size=_BATCH_ROWS):
        for start in range(0, batch.num_rows, _SLICE_ROWS):
            values = batch.slice(start, _SLICE_ROWS).to_pylist()
            room -= sum(map(_size, values))
            if room < 0:
                raise _too_large(uri)
            yield from values


def _size(value: Any) -> int:
    """Return roughly how many bytes a value takes."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return 8 * len(value) + sum(map(_size, value))
    return 8


def _too_large(uri: str) -> DataError:
    return DataError(
        f"{uri} holds too much data",
        expected=f"at most {MAX_DATA_BYTES >> 20} MiB when it is unpacked",
        found="more",
        do="divide it into several data files",
    )


def _too_many_rows(uri: str, rows: int) -> DataError:
    return DataError(
        f"{uri} has too many rows",
        expected=f"at most {MAX_DATA_ROWS}",
        found=rows,
        do="divide it into several data files",
    )


_READERS: Mapping[str, Callable[[bytes, str], list[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".parquet": _parquet_rows,
}
