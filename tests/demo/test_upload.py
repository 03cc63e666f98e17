from pathlib import Path
from types import SimpleNamespace

import pytest

from demo import upload as module
from demo.upload import upload
from trans_peft.bases.manifest import parse_manifest


class Bucket:
    """Remembers what was written, in order."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def upload_file(self, path: str, bucket: str, key: str, Callback) -> None:  # noqa: N803
        self.files[key] = Path(path).read_bytes()
        Callback(len(self.files[key]))

    def put_object(self, Bucket: str, Key: str, Body: bytes) -> None:  # noqa: N803
        self.files[Key] = Body


def test_the_manifest_comes_last_and_is_one_that_ingestion_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bucket = Bucket()
    session = SimpleNamespace(client=lambda name: bucket)
    monkeypatch.setattr(module.boto3, "Session", lambda: session)
    for name, content in (("config.json", b"{}"), ("model.safetensors", b"12345")):
        (tmp_path / name).write_bytes(content)
    seen = []
    upload(
        tmp_path,
        "bases",
        "family/v2",
        version="v2",
        family="family",
        parent="v1",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 7), (7, 7)]
    *files, last = bucket.files
    assert files == ["family/v2/config.json", "family/v2/model.safetensors"]
    assert last == "family/v2/trans_peft_manifest.json"
    manifest = parse_manifest(bucket.files[last])
    assert (manifest.family, manifest.version, manifest.parent) == ("family", "v2", "v1")
    assert [file.size for file in manifest.files] == [2, 5]
