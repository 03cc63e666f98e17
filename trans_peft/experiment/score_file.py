"""A file of scores: one JSON line per score, with a key that is a hash of all inputs."""

import json
from collections.abc import Hashable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from trans_peft.errors import IntegrityError, listed_lines

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["ScoreFile", "Scored"]

_HASH = "sha256"
"""Field of a line with the hash of its other fields. Lines of earlier versions do not have it."""

_SHOWN = 10


class Scored(Protocol):
    """A dataclass of JSON values that a file of scores can hold."""

    @property
    def key(self) -> str:
        """The hash of everything that the score depends on."""

    @property
    def cell(self) -> Hashable:
        """What was scored, by names. Unlike the key, it does not depend on their content."""


S = TypeVar("S", bound=Scored)


class ScoreFile(Generic[S]):
    """A JSON Lines file of scores. Of two scores with the same `cell`, the later one counts.

    Reading changes nothing. The first `append` removes a line that a killed process left
    unfinished, so only one process at a time may append.

    Raises IntegrityError, with the numbers of all lines that no score can be read from, or that
    were edited.
    """

    def __init__(self, path: Path, kind: type[S]) -> None:
        from pydantic import TypeAdapter

        self._path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self._unfinished_at = len(whole) if len(whole) < len(data) else None
        self._scores: dict[Hashable, S] = {}
        problems, adapter = [], TypeAdapter(kind)
        lines = whole.split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                score = _read(line, adapter)
                self._scores[score.cell] = score
            except (ValueError, TypeError, LookupError) as error:
                problems.append(f"line {number}: {str(error).splitlines()[0]}")
        if problems:
            raise IntegrityError(
                f"{path}: {len(problems)} of {len(lines)} lines cannot be used\n    "
                + "\n    ".join(listed_lines(problems, _SHOWN)),
                expected="the lines as they were written",
                do="restore the file, or remove these lines: what they contained is then computed "
                "again",
            )
        self._keys = {score.key for score in self._scores.values()}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[S]:
        return iter(self._scores.values())

    def append(self, score: S) -> None:
        """Append one score to the file."""
        values: Any = score
        fields = asdict(values)
        line = json.dumps(fields | {_HASH: _hash(fields)}).encode() + b"\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if self._unfinished_at is not None:
                file.truncate(self._unfinished_at)
                self._unfinished_at = None
            file.write(line)
        replaced = self._scores.get(score.cell)
        if replaced is not None:
            self._keys.discard(replaced.key)
        self._scores[score.cell] = score
        self._keys.add(score.key)


def _read(line: bytes, adapter: "TypeAdapter[S]") -> S:
    """Return the score of a line. Raises ValueError, TypeError or LookupError."""
    from pydantic import ValidationError

    fields = json.loads(line.decode())  # json would guess UTF-16 from some bytes
    if not isinstance(fields, dict):
        raise TypeError("not a JSON object")
    written = fields.pop(_HASH, None)
    if written not in (None, _hash(fields)):
        raise ValueError("it was edited: its values do not match their hash")
    try:
        return adapter.validate_python(fields)
    except ValidationError as error:
        first, *_ = error.errors()
        raise ValueError(": ".join(map(str, (*first["loc"], first["msg"])))) from error


def _hash(fields: dict[str, Any]) -> str:
    return sha256(json.dumps(fields).encode()).hexdigest()
