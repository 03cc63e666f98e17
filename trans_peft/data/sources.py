"""Where rows come from: JSON Lines and Parquet behind an `ArtifactStore`, and hub data sets.

A source that is pinned is never read with other bytes.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trans_peft.data.example import Example
from trans_peft.data.rows import Row, Unreadable, examples_from
from trans_peft.data.templates import through_template
from trans_peft.domain.data import DataSource
from trans_peft.errors import DataError, IntegrityError
from trans_peft.ports import ArtifactStore

__all__ = ["parse_examples", "pin", "read_examples", "write_examples"]


def read_examples(
    source: DataSource, store: ArtifactStore, *, limit: int | None = None
) -> tuple[Example, ...]:
    """Read all rows of a source (the first `limit` of them), checked.

    Raises DataError with every bad row and its line, IntegrityError if a pinned source has other
    bytes, NotFoundError if there is nothing, InvalidSpecError if it names no known template.
    """
    rows, sha256 = _load(source, store)
    _check_pin(source, sha256)
    if source.template:
        rows = through_template(rows, source.template)
    return examples_from(rows, source.uri)[:limit]


def pin(source: DataSource, store: ArtifactStore) -> DataSource:
    """Return the source bound to the bytes it has now. IntegrityError if it was bound to others.

    A hub data set has no one file: its hash is that of its rows as canonical JSON Lines.
    """
    _, sha256 = _load(source, store)
    _check_pin(source, sha256)
    return source.pinned(sha256)


def parse_examples(lines: bytes, name: str) -> tuple[Example, ...]:
    """Read JSON Lines that are already here; `name` is for the messages of a DataError."""
    return examples_from(_json_rows(lines), name)


def write_examples(examples: Iterable[Example], path: Path) -> Path:
    """Write examples as JSON Lines that `parse_examples` reads back to equal ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row: dict[str, Any] = {"id": example.id}
            if example.choices:
                row["choices"] = example.choices
            if example.reference:
                row["reference"] = example.reference
            if example.messages is None:
                row |= {"prompt": example.prompt, "completion": example.completion}
            else:
                row["messages"] = [vars(turn) for turn in example.messages]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _load(source: DataSource, store: ArtifactStore) -> tuple[list[Row], str]:
    if source.uri.startswith("hub:"):
        return _hub_rows(source.uri)
    readers: dict[str, Callable[[bytes], list[Row]]] = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    packed = source.uri.endswith(".gz")
    suffix = Path(source.uri.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise DataError(
            f"{source.uri} is of no kind that can be read",
            expected=f"a name that ends in {', '.join(readers)} (and .gz, if it is packed), "
            "or hub:NAME[:CONFIG[:SPLIT]]",
            found=suffix or "no ending",
        )
    with store.read(source.uri) as chunks:
        data = b"".join(chunks)
    rows = readers[suffix](_unpacked(data, source.uri) if packed else data)
    return rows, hashlib.sha256(data).hexdigest()


def _unpacked(data: bytes, uri: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{uri} cannot be unpacked", found=error) from error


def _json_rows(data: bytes) -> list[Row]:
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip().startswith(b"["):
        listed = _json_value(data)
        if isinstance(listed, list):
            return [(f"item {number}", row) for number, row in enumerate(listed, start=1)]
    return [
        (f"line {number}", _json_value(line))
        for number, line in enumerate(data.split(b"\n"), start=1)
        if line.strip()
    ]


def _json_value(line: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(line.decode(), parse_constant=refuse)
    except UnicodeDecodeError:
        return Unreadable("not UTF-8 text")
    except ValueError as error:
        return Unreadable(f"not JSON ({error})")


def _parquet_rows(data: bytes) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except pyarrow.ArrowException as error:
        raise DataError("the file is not Parquet", found=error) from error
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _hub_rows(uri: str) -> tuple[list[Row], str]:
    name, config, split, *rest = [*uri.removeprefix("hub:").split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f"{uri} names no hub data set", expected="hub:NAME[:CONFIG[:SPLIT]]")
    import datasets

    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub client raises many kinds
        raise DataError(
            f"the hub data set {uri} cannot be read",
            found=f"{type(error).__name__}: {error}",
            do="check its name, configuration and split, and that the hub can be reached",
        ) from error
    rows = list(table)
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return [(f"row {n}", row) for n, row in enumerate(rows, start=1)], sha256.hexdigest()


def _check_pin(source: DataSource, sha256: str) -> None:
    if source.sha256 and source.sha256 != sha256:
        raise IntegrityError(
            f"{source.uri} has changed since it was pinned",
            expected=f"sha256 {source.sha256}",
            found=f"sha256 {sha256}",
            do="put the old bytes back, or leave the hash out of the recipe to take these",
        )
