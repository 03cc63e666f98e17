"""Read the cluster and the slice of each row from the columns that a data source names."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trans_peft.data.example import Example
from trans_peft.data.rows import Row
from trans_peft.domain.excerpts import excerpt
from trans_peft.errors import DataError, listed_lines

__all__ = ["grouped"]

_SHOWN, _MAX_CHARACTERS = 20, 200
_MAX_SLICES = 20


def grouped(
    examples: Sequence[Example], rows: Sequence[Row], uri: str, cluster: str, slice_: str
) -> tuple[Example, ...]:
    """Return the examples with the values of two columns of their rows; "" names no column.

    A value is text without the white space around it, or a whole number. `rows` are those before a
    template, so that the columns of a public data set can be named. DataError with every row that
    has no value: a column that is partly empty would silently make independent items of the rows
    without a value. DataError too if the rows have more than 20 slices.
    """
    if not (cluster or slice_):
        return tuple(examples)
    by_place = dict(rows)
    problems: list[str] = []
    found = []
    for example in examples:
        row = by_place[example.place]
        problems += _problems(example, row, (cluster, slice_))
        found.append(
            replace(
                example,
                cluster=_value(row, cluster).strip(),
                slice=_value(row, slice_).strip(),
            )
        )
    if problems:
        raise DataError(
            f"{uri}: {len(problems)} values of a column are missing or invalid\n    "
            + "\n    ".join(listed_lines(problems, _SHOWN)),
            expected=f"text of at most {_MAX_CHARACTERS} characters or a whole number in every row",
            do="complete the column, or name another one",
        )
    slices = {example.slice for example in found}
    if len(slices) > _MAX_SLICES:
        raise DataError(
            f"{uri}: the column {excerpt(slice_)} has too many different values",
            expected=f"at most {_MAX_SLICES}",
            found=len(slices),
            do="use fewer values, or name another column",
        )
    return tuple(found)


def _problems(example: Example, row: Mapping[str, Any], columns: Iterable[str]) -> Iterator[str]:
    for column in columns:
        value = row.get(column)
        text = _value(row, column)
        if not column:
            continue
        if value is None or value == "":
            yield f"{example.location}: the column {excerpt(column)} is empty"
        elif type(value) not in (str, int) or not text.strip() or not _is_unicode(text):
            yield f"{example.location}: the column {excerpt(column)} is {excerpt(text)}"
        elif len(text) > _MAX_CHARACTERS:
            yield (f"{example.location}: the column {excerpt(column)} has {len(text)} characters")


def _value(row: Mapping[str, Any], column: str) -> str:
    return str(row.get(column, "")) if column else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
