"""Parse and write the manifest of an upload. Unknown or missing fields are refused.

{"format": "trans-peft/base-manifest/1", "family": "smol", "version": "v2", "parent": "v1",
 "files": [{"name": "config.json", "size": 861, "sha256": "..."}]}
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trans_peft.domain.base import Manifest, ManifestFile
from trans_peft.domain.bounds import MAX_FILES
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import UploadError, listed

__all__ = ["MAX_MANIFEST_BYTES", "dump_manifest", "parse_manifest"]

MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 50


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["trans-peft/base-manifest/1"]
    family: str
    version: str
    parent: str | None
    files: list[_File]


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest. Raises UploadError with all problems if it is invalid."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise UploadError(f"it has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        parsed = _Manifest.model_validate(_decoded(data))
        return Manifest(
            parsed.family,
            parsed.version,
            parsed.parent,
            tuple(ManifestFile(file.name, file.size, file.sha256) for file in parsed.files),
        )
    except ValidationError as error:
        details = [
            f"{'.'.join(map(str, detail['loc'])) or 'JSON'}: {detail['msg']}"
            for detail in error.errors(
                include_url=False, include_context=False, include_input=False
            )
        ]
        raise UploadError(listed(details, 20)) from error
    except ValueError as error:
        raise UploadError(str(error)) from error


def _decoded(data: bytes) -> Any:
    """Return the JSON value. Raises ValueError, also for more than MAX_FILES files."""
    try:
        value = parse_json(data.decode())
    except ValueError as error:
        raise ValueError(f"JSON: {error}") from error
    files = value.get("files") if isinstance(value, dict) else None
    if isinstance(files, list) and len(files) > MAX_FILES:
        raise ValueError(f"files: {len(files)} entries; at most {MAX_FILES} are allowed")
    return value


def dump_manifest(manifest: Manifest) -> bytes:
    """Return a manifest as JSON. Equal manifests give equal bytes."""
    fields = {
        "format": Manifest.FORMAT,
        "family": manifest.family,
        "version": manifest.version,
        "parent": manifest.parent,
        "files": [
            {"name": file.name, "size": file.size, "sha256": file.sha256}
            for file in sorted(manifest.files, key=lambda file: file.name)
        ],
    }
    return json.dumps(fields, indent=1).encode() + b"\n"
