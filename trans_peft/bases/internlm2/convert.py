"""Make a Llama folder of an InternLM2 upload, file by file, and leave the upload as it is.

What the layouts mean stands in `internlm2` and `internlm2_weights`; here, which files are read,
which are written, and what must hold before one is. `CONVERTED_FROM` in the new folder says of what
it was made. No file of code is copied, parsed or imported.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trans_peft.bases.checkpoint import folder_checkpoint
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress
from trans_peft.bases.internlm2 import config as internlm2
from trans_peft.bases.internlm2.tokenizer import llama_tokenizer, tokenizer_problems
from trans_peft.bases.internlm2.weights import WeightLayout, llama_shard, tensor_problems
from trans_peft.bases.model_check import check_checkpoint
from trans_peft.bases.model_files import INDEX, MAX_TEXT_BYTES, WEIGHTS, affects_outputs
from trans_peft.bases.safetensors_stream import (
    ByteStream,
    Entry,
    MalformedSafetensorsError,
    read_header,
)
from trans_peft.bases.upload import BESIDE_THE_FILES, changed, content_problems, read_manifest_claim
from trans_peft.bases.uris import child_uri
from trans_peft.domain.base import Manifest, ManifestFile
from trans_peft.domain.conventions import CONVERTED_SUFFIX
from trans_peft.errors import IntegrityError, NotFoundError, UploadError
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["CONVERTED_FROM", "convert", "converted_uri", "needs_conversion"]

CONVERTED_FROM = "converted_from.json"
"""Names the layout, the URI and every file (size, sha256) of which a folder was made."""

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"


def converted_uri(uri: str) -> str:
    """Return where the Llama form of the upload at `uri` belongs: beside it."""
    return f"{uri.rstrip('/')}{CONVERTED_SUFFIX}"


def needs_conversion(uri: str, store: ArtifactStore) -> bool:
    """Whether the files at a path or URI say that they have InternLM2's layout."""
    try:
        config = _Source.at(uri, store).json("config.json")
    except (NotFoundError, UploadError, IntegrityError):  # whoever verifies it says so better
        return False
    return internlm2.is_internlm2(config)


def convert(
    uri: str, store: ArtifactStore, folder: Path, *, on_progress: ByteProgress | None = None
) -> Manifest | None:
    """Write the Llama form of the InternLM2 files at `uri` into a new folder.

    Returns the manifest that the files were verified against, None where there is none. All that
    headers and settings tell is checked before anything is written, and the folder appears whole or
    not at all. Raises NotFoundError where there is nothing, UploadError with every reason for which
    the files are refused, IntegrityError if they change while they are read, StoreError.
    """
    source, folder = _Source.at(uri, store), folder.absolute()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        manifest, written = _checked(source)
        part.mkdir(parents=True)
        read = _write(source, written, part, on_progress)
        problems = content_problems(manifest, read)
        if store.list(uri) != tuple(source.files.values()):
            raise changed(uri)
        if problems:
            raise _refused(uri, problems)
        check_checkpoint(folder_checkpoint(part), f"the Llama form of {uri}")
        told = {
            "format": "trans-peft/converted-from/1",
            "layout": internlm2.ARCHITECTURE,
            "uri": uri,
            "files": [vars(file) for file in read],
        }
        (part / CONVERTED_FROM).write_bytes(_dumped(told))
        part.rename(folder)
    except MalformedSafetensorsError as error:
        raise _refused(uri, [str(error)]) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Source:
    """The files below a URI as they were listed: no later version of one is read."""

    uri: str
    store: ArtifactStore
    files: dict[str, StoredFile]

    @classmethod
    def at(cls, uri: str, store: ArtifactStore) -> "_Source":
        files = {file.name: file for file in store.list(uri)}
        if not files:
            raise NotFoundError(f"there are no files below {uri}")
        return cls(uri, store, files)

    @contextmanager
    def open(self, name: str) -> Iterator[Iterator[bytes]]:
        """Stream one file. IntegrityError if it is gone or another one."""
        try:
            with self.store.read(child_uri(self.uri, name), etag=self.files[name].etag) as chunks:
                yield chunks
        except (IntegrityError, NotFoundError) as error:
            raise changed(self.uri, [name]) from error

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file, {} where there is none. UploadError."""
        if name not in self.files:
            return {}
        if self.files[name].size > MAX_TEXT_BYTES:
            raise UploadError(f"{name}: more than the {MAX_TEXT_BYTES} bytes that are read")
        with self.open(name) as chunks:
            text = b"".join(chunks)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UploadError(f"{name}: no JSON: {error}") from error
        if not isinstance(value, dict):
            raise UploadError(f"{name}: no JSON object")
        return value


_Written = dict[str, bytes | Callable[[Iterator[bytes]], Iterator[Any]]]
"""File name -> what is written: these bytes, or what becomes of the bytes of the same name."""


def _checked(source: _Source) -> tuple[Manifest | None, _Written]:
    """Return the manifest, and what is to be written. UploadError with every reason against it."""
    config = source.json("config.json")
    if not internlm2.is_internlm2(config):
        raise UploadError(
            f"{source.uri} is no InternLM2 model",
            expected="model_type internlm2 in config.json",
            found=f"model_type {config.get('model_type')}",
            do="use it as it is: InternLM2's is the one layout that is converted",
        )
    claim = read_manifest_claim(source.uri, source.store, tuple(source.files.values()))
    refusals = (filename_problem(name, code_is_left_out=True) for name in source.files)
    problems = [
        *filter(None, refusals),
        *claim.unfinished,
        *claim.against,
        *internlm2.config_problems(config),
    ]
    layout = None if internlm2.config_problems(config) else WeightLayout.of(config)
    tokenizer, more = _tokenizer(source)
    problems += more
    headers = {}
    for name in filter(_is_weights, source.files):
        try:
            with source.open(name) as chunks:
                headers[name] = read_header(ByteStream(chunks))
        except MalformedSafetensorsError as error:
            problems.append(f"{name}: {error}")
    if layout is not None:
        problems += tensor_problems(headers, layout)
    if problems or layout is None:
        raise _refused(source.uri, problems)

    written: _Written = {name: _unchanged for name in source.files if affects_outputs(name)}
    written |= dict.fromkeys(headers, partial(llama_shard, layout=layout))
    written["config.json"] = _dumped(internlm2.llama_config(config))
    written |= {name: _dumped(value) for name, value in tokenizer.items()}
    written.pop(INDEX, None)
    if headers.keys() != {WEIGHTS}:
        written[INDEX] = _dumped(_index(headers, layout))
    return claim.manifest, written


def _tokenizer(source: _Source) -> tuple[dict[str, Any], list[str]]:
    """Return what the tokenizer's files become, and what speaks against them."""
    found, problems = {}, []
    for name in (_TOKENIZER, _SETTINGS, _SPECIAL):
        try:
            found[name] = source.json(name)
        except UploadError as error:
            problems.append(str(error))
    problems += tokenizer_problems(source.files, found.get(_SETTINGS, {}))
    if problems:
        return {}, problems
    try:
        tokenizer, settings = llama_tokenizer(found[_TOKENIZER], found[_SETTINGS], found[_SPECIAL])
    except ValueError as error:
        return {}, [f"{_TOKENIZER}: {error}"]
    return {_TOKENIZER: tokenizer, _SETTINGS: settings}, []


def _index(headers: Mapping[str, Sequence[Entry]], layout: WeightLayout) -> dict[str, Any]:
    weights = layout.weights()
    return {
        "metadata": {
            "total_size": sum(e.end - e.start for found in headers.values() for e in found)
        },
        "weight_map": {
            llama: name
            for name, entries in headers.items()
            for entry in entries
            for llama in weights[entry.name].becomes
        },
    }


def _write(
    source: _Source, written: _Written, folder: Path, on_progress: ByteProgress | None
) -> list[ManifestFile]:
    """Write the files, and return those that were read: all of them, whatever became of each."""
    total, done, found = sum(file.size for file in source.files.values()), 0, []

    def passing(chunks: Iterator[bytes], sha256: Any) -> Iterator[bytes]:
        nonlocal done
        for chunk in chunks:
            sha256.update(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, total)
            yield chunk

    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
    for name, file in source.files.items():
        if name in BESIDE_THE_FILES:
            continue
        sha256, become = hashlib.sha256(), written.get(name)
        with source.open(name) as chunks:
            stream = passing(chunks, sha256)
            if callable(become):
                with (folder / name).open("wb") as target:
                    target.writelines(become(stream))
            for _ in stream:  # a file without a place in the folder is hashed all the same
                pass
        found.append(ManifestFile(name, file.size, sha256.hexdigest()))
    return found


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _unchanged(chunks: Iterator[bytes]) -> Iterator[bytes]:
    return chunks


def _refused(uri: str, problems: list[str]) -> UploadError:
    return UploadError("\n  - ".join([f"the InternLM2 files at {uri} are refused:", *problems]))


def _dumped(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
