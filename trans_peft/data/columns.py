"""Checks of the columns of public data sets, made before a template reads them.

Without these checks, a label of -1 (a hidden test split), the text "false" or a float would become
a wrong label silently.
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
    """The values that one column may have.

    Attributes:
        expected: describes the accepted values, for error messages.
        holds: returns whether a value is accepted.
        optional: whether the column may be missing or null.
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
    """Return a column of a few values. The type counts: True, 1 and "1" are three values."""
    known = {(type(value), value) for value in values}

    def holds(value: Any) -> bool:
        return type(value) in (bool, int, str) and (type(value), value) in known

    return Column(f"one of {', '.join(map(repr, values))}", holds, optional)


@dataclass(frozen=True)
class Form:
    """One layout in which a data set is published.

    Attributes:
        columns: the checks by column name. The presence of the first column identifies the form.
        build: returns a prompt/completion row, or None for a row of another split. Raises
            ValueError for columns that contradict each other.
    """

    columns: Mapping[str, Column]
    build: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Template:
    """Converts raw rows of a data set to prompt/completion rows."""

    forms: tuple[Form, ...]

    def form(self, row: Mapping[str, Any]) -> Form:
        """Return the first form whose first column is in the row, else the last form."""
        return next(
            (form for form in self.forms if next(iter(form.columns)) in row), self.forms[-1]
        )

    def reasons(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield a reason for every column that is missing or has an unexpected value."""
        for name, column in self.form(row).columns.items():
            value = row.get(name)
            if value is None and column.optional:
                continue
            if name not in row:
                yield f"the field {name!r} is missing"
            elif not column.holds(value):
                yield f"{name} must be {column.expected}, found {_SHORT.repr(value)}"

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the prompt/completion row, or None for a row of another split.

        Does not check the columns; see `reasons`. Raises ValueError as `Form.build` does.
        """
        built: dict[str, Any] | None = self.form(row).build(row)
        return built
