"""Convert a checkpoint in a foreign layout to a folder that transformers loads as it is.

Some models are published in layouts that need the publisher's own code. A `Converter` states for
one such layout which files to write; `convert_checkpoint` reads, verifies, hashes and writes the
files. Converted folders name their origin in `CONVERTED_FROM`. Code that comes with a checkpoint is
neither copied nor parsed nor imported. `trans_peft.bases.converters` lists the known layouts.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trans_peft.artifacts import child_uri, read_file
from trans_peft.bases.checkpoint import folder_checkpoint
from trans_peft.bases.filename_checks import filename_problem
from trans_peft.bases.fingerprint import ByteProgress
from trans_peft.bases.model_check import check_checkpoint
from trans_peft.bases.model_files import MAX_TEXT_BYTES
from trans_peft.bases.upload import UNLISTED_FILES, changed, content_problems, read_manifest_claim
from trans_peft.domain.base import Manifest, ManifestFile
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import IntegrityError, NotFoundError, UploadError
from trans_peft.ports import ArtifactStore, StoredFile
from trans_peft.safetensors_header import MalformedSafetensorsError

__all__ = [
    "CONVERTED_FROM",
    "Converter",
    "SourceFiles",
    "TargetFiles",
    "convert_checkpoint",
    "json_bytes",
]

CONVERTED_FROM = "converted_from.json"
"""File of a converted folder that lists the layout, the URI and the source files with sha256."""

TargetFiles = dict[str, bytes | Callable[[Iterator[bytes]], Iterator[Any]]]
"""Name -> content of a file to write, or a function of the chunks of the source file of that name.
"""


class Converter(Protocol):
    """One foreign layout of checkpoints."""

    name: str
    """The layout in messages, such as "InternLM2"."""

    architecture: str
    """The class in `architectures` of config.json, recorded in `CONVERTED_FROM`."""

    def needs(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json has the layout."""

    def plan(self, source: "SourceFiles") -> tuple[TargetFiles, list[str]]:
        """Return the files to write, and all reasons why the source cannot be converted.

        Reads settings and headers only. Raises IntegrityError if a file changes meanwhile.
        """


@dataclass(frozen=True)
class SourceFiles:
    """The files below a URI at the time they were listed; other versions are never read."""

    uri: str
    store: ArtifactStore
    files: dict[str, StoredFile]

    @classmethod
    def at(cls, uri: str, store: ArtifactStore) -> "SourceFiles":
        """List the files. Raises NotFoundError if there are none."""
        files = {file.name: file for file in store.list(uri)}
        if not files:
            raise NotFoundError(f"there are no files below {uri}")
        return cls(uri, store, files)

    @contextmanager
    def open(self, name: str) -> Iterator[Iterator[bytes]]:
        """Stream one file. Raises IntegrityError if it was removed or changed."""
        try:
            with self.store.read(child_uri(self.uri, name), etag=self.files[name].etag) as chunks:
                yield chunks
        except (IntegrityError, NotFoundError) as error:
            raise changed(self.uri, [name]) from error

    def json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file, {} if there is no such file. Raises UploadError."""
        if name not in self.files:
            return {}
        if self.files[name].size > MAX_TEXT_BYTES:
            raise UploadError(
                f"{name}: {self.files[name].size} bytes; at most {MAX_TEXT_BYTES} are allowed"
            )
        try:
            value = parse_json(read_file(self.uri, self.files[name], self.store).decode())
        except (IntegrityError, NotFoundError) as error:
            raise changed(self.uri, [name]) from error
        except ValueError as error:
            raise UploadError(f"{name}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UploadError(f"{name}: not a JSON object")
        return value


def convert_checkpoint(
    uri: str,
    store: ArtifactStore,
    folder: Path,
    converter: Converter,
    *,
    on_progress: ByteProgress | None = None,
) -> Manifest | None:
    """Write the converted form of the files at `uri` into a new folder, atomically.

    Returns the manifest that the files were verified against, None if there is none. Settings and
    headers are checked before anything is written. Raises NotFoundError if there are no files,
    UploadError with all reasons why they cannot be converted, IntegrityError if they change while
    they are read, StoreError.
    """
    source, folder = SourceFiles.at(uri, store), folder.absolute()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        manifest, targets = _checked_plan(source, converter)
        part.mkdir(parents=True)
        read = _write(source, targets, part, on_progress)
        problems = content_problems(manifest, read)
        if store.list(uri) != tuple(source.files.values()):
            raise changed(uri)
        if problems:
            raise _upload_error(uri, converter, problems)
        check_checkpoint(folder_checkpoint(part), f"the converted form of {uri}")
        origin = {
            "format": "trans-peft/converted-from/1",
            "layout": converter.architecture,
            "uri": uri,
            "files": [vars(file) for file in read],
        }
        (part / CONVERTED_FROM).write_bytes(json_bytes(origin))
        part.rename(folder)
    except MalformedSafetensorsError as error:
        raise _upload_error(uri, converter, [str(error)]) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def json_bytes(value: object) -> bytes:
    """Return a value as indented JSON with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _checked_plan(source: SourceFiles, converter: Converter) -> tuple[Manifest | None, TargetFiles]:
    """Return the manifest and the files to write. Raises UploadError with all problems."""
    claim = read_manifest_claim(source.uri, source.store, tuple(source.files.values()))
    name_problems = (filename_problem(name, allow_python=True) for name in source.files)
    targets, problems = converter.plan(source)
    problems = [*filter(None, name_problems), *claim.unfinished, *claim.against, *problems]
    if problems:
        raise _upload_error(source.uri, converter, problems)
    return claim.manifest, targets


def _write(
    source: SourceFiles, targets: TargetFiles, folder: Path, on_progress: ByteProgress | None
) -> list[ManifestFile]:
    """Write the target files, and return name, size and sha256 of all source files."""
    total, done, found = sum(file.size for file in source.files.values()), 0, []

    def hashed(chunks: Iterator[bytes], sha256: Any) -> Iterator[bytes]:
        nonlocal done
        for chunk in chunks:
            sha256.update(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, total)
            yield chunk

    for name, content in targets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
    for name, file in source.files.items():
        if name in UNLISTED_FILES:
            continue
        sha256, transform = hashlib.sha256(), targets.get(name)
        with source.open(name) as chunks:
            stream = hashed(chunks, sha256)
            if callable(transform):
                with (folder / name).open("wb") as target:
                    target.writelines(transform(stream))
            for _ in stream:  # files that are not written are hashed too
                pass
        found.append(ManifestFile(name, file.size, sha256.hexdigest()))
    return found


def _upload_error(uri: str, converter: Converter, problems: list[str]) -> UploadError:
    headline = f"the {converter.name} files at {uri} cannot be converted:"
    return UploadError("\n  - ".join([headline, *problems]))
