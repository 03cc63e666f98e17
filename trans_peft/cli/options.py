"""The arguments that several commands share, with their help texts."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["Adapter", "BaseUri", "Json", "NewBase", "OldBase", "Out", "State", "SuiteFiles"]

Adapter = Annotated[str, Parameter(help="PEFT folder of the adapter: a path or an `s3://` prefix.")]
BaseUri = Annotated[
    str, Parameter(name="--base", metavar="BASE", help="Folder or `s3://` prefix of the base.")
]
OldBase = Annotated[
    str, Parameter(name="--old", metavar="BASE", help="The base that the adapter was trained on.")
]
NewBase = Annotated[
    str, Parameter(name="--new", metavar="BASE", help="The base that replaces the old one.")
]
SuiteFiles = Annotated[
    list[Path],
    Parameter(
        name="--suite",
        negative=(),
        consume_multiple=1,
        help="One or several suites, each a JSON or YAML file. Everything up to the next option "
        "is a suite, so name the adapter before it.",
    ),
]
Out = Annotated[Path, Parameter(name="--out", help="New folder for the results.")]
State = Annotated[
    Path,
    Parameter(
        name="--state",
        help="Cache folder that later commands reuse. It can be deleted at any time.",
    ),
]
Json = Annotated[
    bool, Parameter(name="--json", negative=(), help="Print one JSON value instead of text.")
]
