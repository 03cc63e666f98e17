"""Where rows come from: JSON Lines and Parquet behind an `ArtifactStore`, and hub data sets.

A source that is pinned is never read with other bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trans_peft.data.example import Example
from trans_peft.data.parsing import check_kind, checked, examples_in
from trans_peft.data.rows import Row
from trans_peft.domain.bounds import MAX_DATA_BYTES, MAX_DATA_ROWS
from trans_peft.domain.data import DataSource
from trans_peft.domain.places import HUB, Places
from trans_peft.errors import DataError, IntegrityError
from trans_peft.ports import ArtifactStore

__all__ = ["pin", "read_examples", "write_examples"]

# Without an owner, `datasets` takes names such as json and csv for its own file readers, which read
# the working directory.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_examples(
    source: DataSource, store: ArtifactStore, *, limit: int | None = None
) -> tuple[Example, ...]:
    """Read all rows of a source (the first `limit` of them), checked.

    Raises DataError with every bad row and its line, IntegrityError if a pinned source has other
    bytes, NotFoundError if there is nothing, InvalidSpecError if it names no known template.
    """
    if source.uri.startswith(HUB):
        rows, sha256 = _hub_rows(source.uri, store.places)
        _check_pin(source, sha256)
        return checked(rows, source.uri, source.template)[:limit]
    data, sha256 = _file(source.uri, store)
    _check_pin(source, sha256)
    return examples_in(data, source.uri, template=source.template, limit=limit)


def pin(source: DataSource, store: ArtifactStore) -> DataSource:
    """Return the source bound to the bytes it has now. IntegrityError if it was bound to others.

    A hub data set has no one file: its hash is that of its rows as canonical JSON Lines.
    """
    read = (
        _hub_rows(source.uri, store.places)
        if source.uri.startswith(HUB)
        else _file(source.uri, store)
    )
    sha256 = read[1]
    _check_pin(source, sha256)
    return source.pinned(sha256)


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


def _file(uri: str, store: ArtifactStore) -> tuple[bytes, str]:
    """Return a file's bytes and their hash. DataError for a kind or size that cannot be read."""
    check_kind(uri)
    data = bytearray()
    with store.read(uri) as chunks:
        for chunk in chunks:
            data += chunk
            if len(data) > MAX_DATA_BYTES:
                raise DataError(
                    f"{uri} is too large",
                    expected=f"at most {MAX_DATA_BYTES >> 20} MiB",
                    found="more",
                    do="divide it into several data files",
                )
    return bytes(data), hashlib.sha256(data).hexdigest()


def _hub_rows(uri: str, places: Places) -> tuple[list[Row], str]:
    name, config, split, *rest = [*uri.removeprefix(HUB).split(":"), "", ""]
    if not _NAME.fullmatch(name) or any(rest):
        raise DataError(
            f"{uri} names no hub data set",
            expected="hub:OWNER/NAME[:CONFIG[:SPLIT]], such as hub:openai/gsm8k:main:test",
            do="write the owner in front, as in the address of the data set's page on the hub",
        )
    places.check_data_set(name, uri)
    if Path(name).exists():  # datasets would read the folder, not the hub
        raise DataError(
            f"{uri} has the name of a local folder",
            found=str(Path(name).resolve()),
            do="name the folder's files by their path, or run in another folder",
        )
    import datasets

    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub client raises many kinds
        raise DataError(
            f"the hub data set {uri} cannot be read",
            found=f"{type(error).__name__}: {error}",
            do="check its name, configuration and split, and that the hub can be reached",
        ) from error
    if table.num_rows > MAX_DATA_ROWS or table.data.nbytes > MAX_DATA_BYTES:
        raise DataError(
            f"the hub data set {uri} is too large",
            expected=f"at most {MAX_DATA_ROWS} rows and {MAX_DATA_BYTES >> 20} MiB",
            found=f"{table.num_rows} rows and {table.data.nbytes >> 20} MiB",
            do="name a smaller split",
        )
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
