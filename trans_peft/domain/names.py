"""The rule for names of families, base versions, adapters, suites and labels.

A name is used in several stores, and each has its own rules:

- MLflow refuses `/` and `:` in names of registered models, allows letters, digits and `_-./ :` in
  names of metrics (a suite's name is a part of one, at most 250 characters), and its search
  language has no escape for quotes.
- Prefect refuses `/ % & < >` in names of concurrency limits and tags, and allows lower-case
  letters, digits and dashes in keys of artifacts.
- In S3 keys and on disk, a name is one component of a path.
- PostgreSQL and SQLite distinguish upper and lower case; MySQL, SQL Server and the file systems of
  macOS and Windows do not.

A name therefore has 1 to 100 ASCII letters, digits, `-`, `_` and `.`, and begins and ends with a
letter or a digit. ASCII excludes look-alikes, invisible characters and several Unicode forms of one
name. Two names in one store must not differ in case alone (`same_but_for_case`).
"""

import re
from collections.abc import Iterable

from trans_peft.domain.conventions import ADAPTER_ALIAS, BASE_ALIASES, CONVERTED_SUFFIX
from trans_peft.errors import InvalidSpecError

__all__ = [
    "LONGEST_NAME",
    "check_case",
    "check_names",
    "name_problem",
    "quoted",
    "same_but_for_case",
]

LONGEST_NAME = 100
"""The maximum number of characters in a name."""

_RULE = (
    f"1 to {LONGEST_NAME} ASCII letters, digits, '-', '_' or '.', a letter or a digit at both ends"
)
_NAME = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,{LONGEST_NAME - 2}}}[A-Za-z0-9])?")
_RESERVED = frozenset({"latest", *BASE_ALIASES})
# `m-...`: MLflow's id of a logged model.
_RESERVED_SHAPE = re.compile(rf"{ADAPTER_ALIAS.pattern}|m-[0-9a-f]{{32}}", re.IGNORECASE)


def name_problem(what: str, name: object) -> str | None:
    """Return why `name` is no valid name, or None. `what` it names ("family") begins the text."""
    if not isinstance(name, str):
        return f"{what} must be text, not {type(name).__name__}"
    if not name:
        return f"{what} is empty"
    if not _NAME.fullmatch(name):
        return f"{what} must be {_RULE}; found {quoted(name)}"
    if name.lower() in _RESERVED or _RESERVED_SHAPE.fullmatch(name):
        return f"{what} must not be {quoted(name)}: that name is reserved for an alias"
    if name.lower().endswith(CONVERTED_SUFFIX):
        return (
            f"{what} must not be {quoted(name)}: the suffix {CONVERTED_SUFFIX} is reserved for "
            "converted bases"
        )
    return None


def check_names(where: str, **names: object) -> None:
    """Raise InvalidSpecError for all invalid values of `names`, whose keys are what they name."""
    problems = [
        problem
        for what, name in names.items()
        if (problem := name_problem(what.replace("_", " "), name))
    ]
    if problems:
        raise InvalidSpecError(f"{where}: {'; '.join(problems)}", do="choose another name")


def same_but_for_case(name: str, others: Iterable[str]) -> str | None:
    """Return the first of `others` that differs from `name` in upper and lower case alone."""
    return next((o for o in others if o != name and o.lower() == name.lower()), None)


def check_case(what: str, name: str, others: Iterable[str]) -> None:
    """Raise InvalidSpecError if one of `others` differs from `name` in case alone."""
    if (other := same_but_for_case(name, others)) is not None:
        raise InvalidSpecError(
            f"{what} {quoted(name)} differs from an existing one in upper and lower case alone",
            expected=other,
            found=name,
            do="use the existing name, or one that differs in more than case, because some "
            "databases and file systems ignore case",
        )


def quoted(text: object, longest: int = 60) -> str:
    """Return a value as quoted text for a message: ASCII on one line, at most `longest` long."""
    shown = str(text)
    cut = f"{shown[:longest]}..." if len(shown) > longest else shown
    return ascii(cut)
