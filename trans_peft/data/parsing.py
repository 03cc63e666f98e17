"""Parse the bytes of a data file into examples, within bounds.

A compressed file of a few megabytes can decompress to gigabytes. `examples_in` therefore parses a
file in a child process with limits, and stops at the bounds on bytes and rows that
`trans_peft.domain.bounds` defines.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trans_peft.data.example import ChatMessage, Example
from trans_peft.data.groups import grouped
from trans_peft.data.json_rows import json_rows
from trans_peft.data.preferences import preferences_from
from trans_peft.data.rows import Row, examples_from, without_answer
from trans_peft.data.templates import through_template
from trans_peft.domain.bounds import MAX_DATA_BYTES, MAX_DATA_ROWS, MAX_ROW_CHARACTERS
from trans_peft.domain.data import DataSource
from trans_peft.domain.untrusted_json import duplicates
from trans_peft.errors import DataError, listed
from trans_peft.isolation import CallLimits, call_isolated

__all__ = [
    "PromptRows",
    "check_kind",
    "checked",
    "examples_in",
    "parse_examples",
    "prompts_in",
    "unchecked_rows",
]

_LIMITS = CallLimits(cpu_s=600, wall_s=1800, memory_bytes=8 << 30, result_bytes=1 << 30)
_BATCH_ROWS, _SLICE_ROWS = 1024, 16


def parse_examples(lines: bytes, name: str, *, preferences: bool = False) -> tuple[Example, ...]:
    """Parse JSON Lines. DataError with every invalid row; `name` is the file's name in it."""
    return (preferences_from if preferences else examples_from)(json_rows(lines, name), name)


def examples_in(
    data: bytes, source: DataSource, *, limit: int | None = None, preferences: bool = False
) -> tuple[Example, ...]:
    """Parse a data file in a child process and return its first `limit` examples.

    With `preferences`, its rows have a prompt, a chosen and a rejected answer.

    The ending of the source's `uri` gives the file format. Raises DataError with every invalid row
    or with the exceeded bound, InvalidSpecError for an unknown template, and LimitExceededError if
    parsing takes more than 10 minutes of processor time or 8 GiB.
    """
    check_kind(source.uri)
    columns = source.cluster, source.slice
    arguments = source.template, columns, limit, preferences
    rows = _isolated(_plain_examples, data, source.uri, *arguments)
    return _examples(rows)


class PromptRows(NamedTuple):
    """The prompts of a file.

    Attributes:
        prompts: the prompts, as examples with the completion `NO_ANSWER`.
        answered: number of rows with an answer, which was dropped.
        invalid: places of the rows that are no prompts.
    """

    prompts: tuple[Example, ...]
    answered: int
    invalid: tuple[str, ...]


def prompts_in(data: bytes, uri: str) -> PromptRows:
    """Parse a file of prompts, whose rows have the shapes of `examples_in` with an optional answer.

    Invalid rows are left out, and nothing of their content is reported, because prompts may be
    private. Answers and ids do not leave the child process. Raises DataError if the file cannot be
    read at all, and LimitExceededError.
    """
    check_kind(uri)
    answered, invalid, rows = _isolated(_plain_prompts, data, uri)
    return PromptRows(_examples(rows), answered, tuple(invalid))


def checked(
    rows: list[Row],
    uri: str,
    template: str,
    columns: tuple[str, str] = ("", ""),
    *,
    preferences: bool = False,
) -> tuple[Example, ...]:
    """Return the examples of rows, converted by a template if one is named.

    `columns` are the names of the columns with the cluster and the slice of a row, or "".

    Raises DataError with every invalid row, including rows with more than MAX_ROW_CHARACTERS
    characters, and InvalidSpecError for an unknown template.
    """
    if len(rows) > MAX_DATA_ROWS:
        raise _too_many_rows(uri, len(rows))
    read = preferences_from if preferences else examples_from
    examples = read(through_template(rows, template) if template else rows, uri, columns)
    examples = grouped(examples, rows, uri, *columns)
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
    """Raise DataError unless a file's name has the ending of a supported format."""
    if _suffix(uri) not in _READERS:
        raise DataError(
            f"the format of {uri} is not supported",
            expected=f"a name that ends in {', '.join(_READERS)} (and .gz if compressed), "
            "or hub:OWNER/NAME[:CONFIG[:SPLIT]]",
            found=_suffix(uri) or "a name without an ending",
        )


def unchecked_rows(data: bytes, uri: str) -> list[Row]:
    """Return the rows of a file, unchecked. DataError if it does not have the format of its name.

    Time and memory depend on the file, within the bounds on bytes and rows. `examples_in` runs this
    in a child process.
    """
    if uri.endswith(".gz"):
        data = _decompressed(data, uri, MAX_DATA_BYTES)
    return _READERS[_suffix(uri)](data, uri)


def _isolated(function: Callable[..., Any], data: bytes, uri: str, *arguments: Any) -> Any:
    """Return `function(data, uri, *arguments)`, computed in a child process."""
    return call_isolated(
        function,
        data,
        uri,
        *arguments,
        limits=_LIMITS,
        subject=f"the data file {uri}",
        imports=("pyarrow.parquet",) if _suffix(uri) == ".parquet" else (),
    )


def _plain_examples(
    data: bytes,
    uri: str,
    template: str,
    columns: Sequence[str],
    limit: int | None,
    preferences: bool,
) -> list[list[Any]]:
    """Parse a file and return its examples as plain lists: runs in the child process."""
    cluster, slice_ = columns
    rows = unchecked_rows(data, uri)
    return _plain(checked(rows, uri, template, (cluster, slice_), preferences=preferences)[:limit])


def _plain_prompts(data: bytes, uri: str) -> list[Any]:
    """Return the number of answers, the invalid places and the prompts: runs in the child."""
    answered, invalid = 0, []
    prompts: list[Example] = []
    for where, row in unchecked_rows(data, uri):
        prompt, has_answer = without_answer(row)
        try:
            prompts += checked([(where, prompt)], uri, "")
        except DataError:
            invalid.append(where)
        else:
            answered += has_answer
    return [answered, invalid, _plain(prompts)]


def _plain(examples: Sequence[Example]) -> list[list[Any]]:
    return [
        [
            example.id,
            example.prompt,
            example.completion,
            example.messages and [[turn.role, turn.content] for turn in example.messages],
            list(example.choices),
            example.reference,
            example.cluster,
            example.slice,
            example.rejected,
            example.place,
            example.tools,
        ]
        for example in examples
    ]


def _examples(rows: Sequence[Sequence[Any]]) -> tuple[Example, ...]:
    """Return the examples of `_plain` rows."""
    return tuple(
        Example(
            id=id_,
            prompt=prompt,
            completion=completion,
            messages=messages and tuple(ChatMessage(role, content) for role, content in messages),
            choices=tuple(choices),
            reference=reference,
            cluster=cluster,
            slice=slice_,
            rejected=rejected,
            place=place,
            tools=tools,
        )
        for (
            id_,
            prompt,
            completion,
            messages,
            choices,
            reference,
            cluster,
            slice_,
            rejected,
            place,
            tools,
        ) in rows
    )


def _suffix(uri: str) -> str:
    return Path(uri.removesuffix(".gz")).suffix


def _decompressed(data: bytes, uri: str, max_bytes: int) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(max_bytes + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{uri} cannot be decompressed", found=error) from error
    if len(content) > max_bytes:
        raise _too_large(uri)
    return content


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
                f"{uri} has several columns of the same name",
                found=listed(twice),
                do="rename or remove one of each pair",
            )
        return [
            (f"row {number}", row) for number, row in enumerate(_parquet_values(file, uri), start=1)
        ]
    except (DataError, MemoryError):
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError, LookupError) as error:
        # to_pylist raises the last three for texts, dates and time zones that Python cannot
        # represent.
        raise DataError(
            f"{uri} cannot be read as Parquet", found=f"{type(error).__name__}: {error}"
        ) from error


def _columns_twice(fields: Any, above: str = "") -> Iterator[str]:
    """Yield the names that several columns of one schema or struct share, at any depth."""
    names = [field.name for field in fields]
    yield from (f"{above}{name}" for name in duplicates(names))
    for field in fields:
        inner = [field.type.field(number) for number in range(field.type.num_fields)]
        yield from _columns_twice(inner, f"{above}{field.name}.")


def _parquet_values(file: Any, uri: str) -> Iterator[Any]:
    """Yield rows; DataError after MAX_DATA_BYTES.

    Neither the file's metadata nor the size of an Arrow batch bounds the size of the rows, because
    dictionary encoding stores a repeated text once. So a few rows are decoded at a time and
    measured.
    """
    remaining_bytes = MAX_DATA_BYTES
    for batch in file.iter_batches(batch_size=_BATCH_ROWS):
        for start in range(0, batch.num_rows, _SLICE_ROWS):
            values = batch.slice(start, _SLICE_ROWS).to_pylist()
            remaining_bytes -= sum(map(_size_bytes, values))
            if remaining_bytes < 0:
                raise _too_large(uri)
            yield from values


def _size_bytes(value: Any) -> int:
    """Return the approximate size of a value in bytes."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size_bytes, value.values()))
    if isinstance(value, list):
        return 8 * len(value) + sum(map(_size_bytes, value))
    return 8


def _too_large(uri: str) -> DataError:
    return DataError(
        f"{uri} holds too much data",
        expected=f"at most {MAX_DATA_BYTES >> 20} MiB after decompression",
        found="more",
        do="split it into several data files",
    )


def _too_many_rows(uri: str, rows: int) -> DataError:
    return DataError(
        f"{uri} has too many rows",
        expected=f"at most {MAX_DATA_ROWS}",
        found=rows,
        do="split it into several data files",
    )


_READERS: Mapping[str, Callable[[bytes, str], list[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".parquet": _parquet_rows,
}
