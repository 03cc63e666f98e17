"""The parts of a base's files that decide how it loads: all but the values of its weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trans_peft.bases.safetensors_stream import ByteStream, read_header
from trans_peft.bases.uris import child_uri
from trans_peft.domain.base import TensorSignature
from trans_peft.errors import UploadError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = [
    "MAX_TEXT_BYTES",
    "Checkpoint",
    "folder_checkpoint",
    "is_tokenizer_file",
    "read_checkpoint",
    "read_text",
]

MAX_TEXT_BYTES = 64 << 20
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TEMPLATE = ".jinja"
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """What loading a base depends on.

    `config` is the text of config.json. `tensors` maps the names in the files; a signature read
    from a header alone has an empty sha256. `tokenizer` maps file names to texts.
    """

    config: str
    tensors: Mapping[str, TensorSignature]
    tokenizer: Mapping[str, str]

    def fields(self) -> Mapping[str, Any]:
        """Return config.json as parsed."""
        return json.loads(self.config)


def is_tokenizer_file(name: str) -> bool:
    """Whether a tokenizer is loaded from a file of that name."""
    return name in _TOKENIZER or name.endswith(_TEMPLATE)


def read_checkpoint(
    uri: str, store: ArtifactStore, tensors: Mapping[str, TensorSignature]
) -> Checkpoint:
    """Read config.json and the tokenizer's files at a path or URI whose tensors are known.

    Raises UploadError for a file that is too large or is no UTF-8 text, NotFoundError without a
    config.json, IntegrityError, StoreError.
    """
    files = {file.name: file for file in store.list(uri)}
    wanted = [file for name, file in files.items() if is_tokenizer_file(name)]
    config = files.get("config.json", StoredFile("config.json", 0, ""))
    return Checkpoint(
        read_text(uri, store, config),
        tensors,
        {file.name: read_text(uri, store, file) for file in wanted},
    )


def folder_checkpoint(folder: Path) -> Checkpoint:
    """Read the same of a folder on this machine, and of its weights the headers alone.

    The folder must hold a config.json and well-formed files.
    """
    tensors: dict[str, TensorSignature] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            entries = read_header(ByteStream(iter(lambda: file.read(_CHUNK_BYTES), b"")))
        tensors |= {e.name: TensorSignature(e.shape, e.dtype, "") for e in entries}
    names = [path.name for path in folder.iterdir() if is_tokenizer_file(path.name)]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in ("config.json", *names)}
    return Checkpoint(texts.pop("config.json"), tensors, texts)


def read_text(uri: str, store: ArtifactStore, file: StoredFile) -> str:
    """Return the text of one listed file. UploadError, NotFoundError, IntegrityError."""
    if file.size > MAX_TEXT_BYTES:
        raise UploadError(f"{file.name}: {file.size} bytes; at most {MAX_TEXT_BYTES} are read")
    with store.read(child_uri(uri, file.name), etag=file.etag or None) as chunks:
        data = b"".join(chunks)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UploadError(f"{file.name}: {error}") from error
