"""Read the rows of a data source: JSON or Parquet files of a store, or a hub data set.

A pinned source is read only while its bytes have the pinned hash.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trans_peft.data.example import Example
from trans_peft.data.parsing import PromptRows, check_kind, checked, examples_in, prompts_in
from trans_peft.data.rows import Row
from trans_peft.domain.bounds import MAX_DATA_BYTES, MAX_DATA_ROWS
from trans_peft.domain.data import DataSource
from trans_peft.domain.places import HUB, Places
from trans_peft.errors import DataError, IntegrityError
from trans_peft.ports import ArtifactStore

__all__ = ["pin", "read_examples", "read_prompts", "write_examples"]

# Without an owner, `datasets` takes names such as json and csv for its own file readers, which read
# the working directory.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_examples(
    source: DataSource,
    store: ArtifactStore,
    *,
    limit: int | None = None,
    preferences: bool = False,
) -> tuple[Example, ...]:
    """Read a source, check all of its rows and return the first `limit` examples.

    With `preferences`, its rows have a prompt, a chosen and a rejected answer.

    Raises DataError with every invalid row and its line, IntegrityError if the bytes of a pinned
    source changed, NotFoundError if the source does not exist, InvalidSpecError for an unknown
    template, and AccessError for a place that this worker may not read.
    """
    if source.uri.startswith(HUB):
        rows, sha256 = _hub_rows(source.uri, store.places)
        _check_pin(source, sha256)
        columns = source.cluster, source.slice
        read = checked(rows, source.uri, source.template, columns, preferences=preferences)
        return read[:limit]
    data, sha256 = _file(source.uri, store)
    _check_pin(source, sha256)
    return examples_in(data, source, limit=limit, preferences=preferences)


def read_prompts(source: DataSource, store: ArtifactStore) -> PromptRows:
    """Read a file of prompts.

    Raises what `trans_peft.data.parsing.prompts_in` raises, IntegrityError, NotFoundError and
    AccessError as `read_examples`, and DataError for a hub data set or a template, whose rows are
    complete examples.
    """
    if source.uri.startswith(HUB) or source.template:
        raise DataError(
            "prompts can be read from files only",
            expected="a file with the field prompt, messages or instruction in each row",
            found=" through the template ".join(filter(None, (source.uri, source.template))),
            do="write the prompts into a file",
        )
    data, sha256 = _file(source.uri, store)
    _check_pin(source, sha256)
    return prompts_in(data, source.uri)


def pin(source: DataSource, store: ArtifactStore) -> DataSource:
    """Return the source with the hash of its current bytes.

    The hash of a hub data set is that of its rows as JSON Lines with sorted keys. Raises
    IntegrityError if the source was already pinned to another hash.
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
    """Write examples as JSON Lines that `parse_examples` reads back to equal ones.

    Examples with preferences are read back with `preferences=True`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row: dict[str, Any] = {"id": example.id}
            if example.choices:
                row["choices"] = example.choices
            if example.reference:
                row["reference"] = example.reference
            if example.messages is None or example.rejected:
                row |= example.trl_row()
            else:
                row["messages"] = [vars(turn) for turn in example.messages]
                if example.tools:
                    row["tools"] = example.tools
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _file(uri: str, store: ArtifactStore) -> tuple[bytes, str]:
    """Return a file's bytes and their sha256. DataError for an unsupported format or size."""
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
                    do="split it into several data files",
                )
    return bytes(data), hashlib.sha256(data).hexdigest()


def _hub_rows(uri: str, places: Places) -> tuple[list[Row], str]:
    # A slice of a split has colons of its own.
    name, config, split = [*uri.removeprefix(HUB).split(":", 2), "", ""][:3]
    if not _NAME.fullmatch(name) or "[" in config:
        raise DataError(
            f"{uri} does not name a hub data set",
            expected="hub:OWNER/NAME[:CONFIG[:SPLIT]], such as hub:openai/gsm8k:main:test, or "
            "hub:meta-math/MetaMathQA::train[:100000] without a configuration",
            do="write the owner in front, as in the address of the data set's page on the hub, and "
            "the split after a second colon",
        )
    places.check_data_set(name, uri)
    if Path(name).exists():  # `datasets` would read the folder instead of the hub
        raise DataError(
            f"{uri} is ambiguous: a local folder has the same name",
            found=str(Path(name).resolve()),
            do="give the paths of the folder's files, or run in another working directory",
        )
    import datasets

    split = split or "train"
    try:
        datasets.ReadInstruction.from_spec(split)
    except ValueError as error:
        raise DataError(
            f"{uri} has the split {split!r}, which the package datasets cannot read",
            expected="a split or slices of splits, such as train, train[:100000], train[10%:20%] "
            "or train[:5000]+test",
            found=error,
            do="correct the text after the second colon",
        ) from error
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client raises many types
        raise DataError(
            f"the hub data set {uri} cannot be read",
            found=f"{type(error).__name__}: {error}",
            do="check its name, configuration and split, and the connection to the hub",
        ) from error
    if table.num_rows > MAX_DATA_ROWS or table.data.nbytes > MAX_DATA_BYTES:
        raise DataError(
            f"the hub data set {uri} is too large",
            expected=f"at most {MAX_DATA_ROWS} rows and {MAX_DATA_BYTES >> 20} MiB",
            found=f"{table.num_rows} rows and {table.data.nbytes >> 20} MiB",
            do="use a smaller split",
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
            do="restore the old bytes, or remove the hash from the recipe to use the new ones",
        )
