"""A file of scores: one JSON line per score, with a key that is a hash of all inputs."""

import json
from collections.abc import Hashable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["ScoreFile", "Scored"]


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

    A line that a killed process left unfinished is removed.
    """

    def __init__(self, path: Path, kind: type[S]) -> None:
        self._path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
        found = (kind(**json.loads(line)) for line in whole.splitlines())
        self._scores: dict[Hashable, S] = {score.cell: score for score in found}
        self._keys = {score.key for score in self._scores.values()}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[S]:
        return iter(self._scores.values())

    def append(self, score: S) -> None:
        """Append one score to the file."""
        values: Any = score
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(values)) + "\n")
        replaced = self._scores.get(score.cell)
        if replaced is not None:
            self._keys.discard(replaced.key)
        self._scores[score.cell] = score
        self._keys.add(score.key)
