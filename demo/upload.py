"""Upload a base version as any S3 client can: with boto3, the files first, the manifest last.

This module does not use trans_peft. The manifest is a JSON file with the name, size and SHA-256 of
each file. Once it exists, the upload is complete.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import boto3

__all__ = ["upload"]


def upload(  # noqa: PLR0913  the fields of the manifest are named
    folder: Path,
    bucket: str,
    prefix: str,
    *,
    version: str,
    family: str,
    parent: str | None,
    on_progress: Callable[[int, int], None],
) -> None:
    """Upload every file of the folder, then the manifest. Repeated calls write the same objects."""
    s3 = boto3.Session().client("s3")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    total, sent = sum(file.stat().st_size for file in files), 0

    def count(size: int) -> None:
        nonlocal sent
        sent += size
        on_progress(sent, total)

    listed = []
    for file in files:
        with file.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        listed.append({"name": file.name, "size": file.stat().st_size, "sha256": sha256})
        s3.upload_file(str(file), bucket, f"{prefix}/{file.name}", Callback=count)
    manifest = {
        "format": "trans-peft/base-manifest/1",
        "family": family,
        "version": version,
        "parent": parent,
        "files": listed,
    }
    s3.put_object(
        Bucket=bucket,
        Key=f"{prefix}/trans_peft_manifest.json",
        Body=json.dumps(manifest, indent=1).encode(),
    )
