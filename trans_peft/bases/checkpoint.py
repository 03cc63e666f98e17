"""The parts of a checkpoint that determine how it loads: all but the values of its weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trans_peft.artifacts import read_file
from trans_peft.domain.base import TensorSignature
from trans_peft.errors import UploadError
from trans_peft.ports import ArtifactStore, StoredFile
from trans_peft.safetensors_header import read_file_header

__all__ = [
    "GENERATION",
    "MAX_TEXT_BYTES",
    "Checkpoint",
    "folder_checkpoint",
    "is_tokenizer_file",
    "read_checkpoint",
    "read_text",
]

MAX_TEXT_BYTES = 64 << 20
GENERATION = "generation_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TEMPLATE = ".jinja"


@dataclass(frozen=True)
class Checkpoint:
    """The configuration, tensors and tokenizer of a checkpoint.

    Attributes:
        config: the text of config.json.
        tensors: name in the files -> signature; read from a header alone, its sha256 is empty.
        tokenizer: name of a tokenizer's file -> its text.
        generation: the text of generation_config.json; empty without the file.
    """

    config: str
    tensors: Mapping[str, TensorSignature]
    tokenizer: Mapping[str, str]
    generation: str = ""

    def fields(self) -> Mapping[str, Any]:
        """Return the parsed config.json."""
        return json.loads(self.config)


def is_tokenizer_file(name: str) -> bool:
    """Whether transformers loads tokenizers from files of this name."""
    return name in _TOKENIZER or name.endswith(_TEMPLATE)


def read_checkpoint(
    uri: str, store: ArtifactStore, tensors: Mapping[str, TensorSignature]
) -> Checkpoint:
    """Read config.json and the tokenizer at a path or URI, and combine them with known tensors.

    Raises UploadError for a file that is too large or not UTF-8, NotFoundError if there is no
    config.json, IntegrityError, StoreError.
    """
    files = {file.name: file for file in store.list(uri)}
    wanted = [file for name, file in files.items() if is_tokenizer_file(name)]
    config = files.get("config.json", StoredFile("config.json", 0, ""))
    return Checkpoint(
        read_text(uri, store, config),
        tensors,
        {file.name: read_text(uri, store, file) for file in wanted},
        read_text(uri, store, files[GENERATION]) if GENERATION in files else "",
    )


def folder_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint in a local folder; only the headers of its weights are read.

    The folder must contain a config.json and well-formed files. Raises OSError, ValueError.
    """
    tensors: dict[str, TensorSignature] = {}
    for path in sorted(folder.glob("*.safetensors")):
        entries = read_file_header(path).entries
        tensors |= {e.name: TensorSignature(e.shape, e.dtype, "") for e in entries}
    names = [path.name for path in folder.iterdir() if is_tokenizer_file(path.name)]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in ("config.json", *names)}
    generation = folder / GENERATION
    text = generation.read_text(encoding="utf-8") if generation.is_file() else ""
    return Checkpoint(texts.pop("config.json"), tensors, texts, text)


def read_text(uri: str, store: ArtifactStore, file: StoredFile) -> str:
    """Return the text of a listed file. Raises UploadError, NotFoundError, IntegrityError."""
    if file.size > MAX_TEXT_BYTES:
        raise UploadError(f"{file.name}: {file.size} bytes; at most {MAX_TEXT_BYTES} are allowed")
    try:
        return read_file(uri, file, store).decode()
    except UnicodeDecodeError as error:
        raise UploadError(f"{file.name}: {error}") from error
