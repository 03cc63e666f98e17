"""What the columns of a public data set hold, checked before a template reads them.

A label of -1 (a hidden test split), the text "false" or a float would otherwise become a wrong
label silently.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TEXT", "Column", "Form", "Template", "one_of", "texts", "whole"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


@dataclass(frozen=True)
class Column:
    """The values of one column: `expected` says in words which ones `holds` accepts.

    An `optional` column may be missing or null.
    """

    expected: str
    holds: Callable[[Any], bool]
    optional: bool = False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


TEXT = Column("text that is not blank", _is_text)


def texts(least: int, most: int | None = None) -> Column:
    """Return a column of lists of texts that are not blank."""
    ends = f"{least}" if least == most else f"{least} to {most}" if most else f"{least} or more"

    def holds(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and least <= len(value) <= (len(value) if most is None else most)
            and all(map(_is_text, value))
        )

    return Column(f"a list of {ends} texts that are not blank", holds)


def whole(numbers: range) -> Column:
    """Return a column of whole numbers in a range."""
    return Column(
        f"a whole number from {numbers[0]} to {numbers[-1]}",
        lambda value: type(value) is int and value in numbers,
    )


def one_of(*values: bool | int | str, optional: bool = False) -> Column:
    """Return a column of a few values, each of exactly its type: True is not 1, and "1" neither."""
    known = {(type(value), value) for value in values}

    def holds(value: Any) -> bool:
        return type(value) in (bool, int, str) and (type(value), value) in known

    return Column(f"one of {', '.join(map(repr, values))}", holds, optional)


@dataclass(frozen=True)
class Form:
    """One form in which a data set is published: its columns, and what they become.

    `build` returns a prompt/completion row, or None for a row of another split, and raises
    ValueError for columns that do not fit each other. The first column tells forms apart.
    """

    columns: Mapping[str, Column]
    build: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Template:
    """Turns a raw row of a data set into a prompt/completion row; None for another split's row."""

    forms: tuple[Form, ...]

    def form(self, row: Mapping[str, Any]) -> Form:
        """Return the form that a row has: the first whose first column it has, else the last."""
        return next(
            (form for form in self.forms if next(iter(form.columns)) in row), self.forms[-1]
        )

    def reasons(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield a reason for every column that is missing or holds another value."""
        for name, column in self.form(row).columns.items():
            value = row.get(name)
            if value is None and column.optional:
                continue
            if name not in row:
                yield f"the field {name!r} is missing"
            elif not column.holds(value):
                yield f"{name} must be {column.expected}, found {_SHORT.repr(value)}"

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what a row becomes, its columns unchecked. ValueError as in `Form.build`."""
        built: dict[str, Any] | None = self.form(row).build(row)
        return built
