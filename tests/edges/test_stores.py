"""One contract for every store: in memory, on disk, in S3."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from trans_peft.domain.places import Places
from trans_peft.edges import file_store
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import MemoryStore
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import AccessError, IntegrityError, NotFoundError, StoreError
from trans_peft.ports import ArtifactStore

BIG = 40 << 20  # more than one part of a multipart upload


@pytest.fixture(
    params=["memory", "folder", "file-uri", pytest.param("s3", marks=pytest.mark.servers)]
)
def place(request, tmp_path: Path, unique: str) -> tuple[ArtifactStore, str]:
    """A store and an empty prefix in it."""
    if request.param == "memory":
        return MemoryStore(chunk_bytes=5), f"memory://{unique}"
    if request.param == "s3":
        servers = request.getfixturevalue("servers")
        return SchemeStore(), f"s3://{servers.bucket}/{unique}"
    folder = tmp_path / "a folder"
    return SchemeStore(), folder.as_uri() if request.param == "file-uri" else str(folder)


def read(store: ArtifactStore, uri: str, etag: str | None = None) -> bytes:
    with store.read(uri, etag=etag) as chunks:
        return b"".join(chunks)


class TestEveryStore:
    def test_an_empty_prefix_lists_nothing(self, place):
        store, prefix = place
        assert store.list(prefix) == ()

    def test_returns_what_was_written(self, place):
        store, prefix = place
        store.write(f"{prefix}/a/b.json", io.BytesIO(b"hello there"))
        assert read(store, f"{prefix}/a/b.json") == b"hello there"

    def test_lists_names_below_the_prefix_sorted_with_sizes(self, place):
        store, prefix = place
        for name in ("b", "a/c", "a-d"):
            store.write(f"{prefix}/{name}", io.BytesIO(name.encode()))
        store.write(f"{prefix}-beside/x", io.BytesIO(b"x"))
        assert [(f.name, f.size) for f in store.list(prefix)] == [("a-d", 3), ("a/c", 3), ("b", 1)]
        assert store.list(f"{prefix}/") == store.list(prefix)

    def test_stores_an_empty_file(self, place):
        store, prefix = place
        store.write(f"{prefix}/empty", io.BytesIO(b""))
        assert [(f.name, f.size) for f in store.list(prefix)] == [("empty", 0)]
        assert read(store, f"{prefix}/empty") == b""

    def test_removes_one_file_and_none_without_an_error(self, place):
        store, prefix = place
        for name in ("a", "ab"):
            store.write(f"{prefix}/{name}", io.BytesIO(b"x"))
        store.remove(f"{prefix}/a")
        store.remove(f"{prefix}/a")
        assert [file.name for file in store.list(prefix)] == ["ab"]

    def test_a_missing_file_is_not_found(self, place):
        store, prefix = place
        with pytest.raises(NotFoundError, match="nowhere"):
            read(store, f"{prefix}/nowhere")

    def test_reads_the_version_that_was_listed_and_no_other(self, place):
        store, prefix = place
        store.write(f"{prefix}/x", io.BytesIO(b"old"))
        (listed,) = store.list(prefix)
        assert read(store, f"{prefix}/x", listed.etag) == b"old"
        store.write(f"{prefix}/x", io.BytesIO(b"newer"))
        with pytest.raises(IntegrityError, match="changed"):
            read(store, f"{prefix}/x", listed.etag)

    @pytest.mark.parametrize("size", [0, 1, 5, 11, 4096])
    def test_returns_the_listed_number_of_bytes(self, place, size):
        store, prefix = place
        store.write(f"{prefix}/x", io.BytesIO(bytes(size)))
        (listed,) = store.list(prefix)
        assert len(read(store, f"{prefix}/x")) == listed.size == size
        assert len(read(store, f"{prefix}/x", listed.etag)) == size

    @pytest.mark.parametrize("start", [0, 1, 5, 11])
    @pytest.mark.parametrize("stop", [None, 12, 11, 6])
    def test_reads_a_range(self, place, start, stop):
        store, prefix = place
        store.write(f"{prefix}/x", io.BytesIO(b"hello there."))
        (listed,) = store.list(prefix)
        if stop is None or start < stop:
            with store.read(f"{prefix}/x", etag=listed.etag, start=start, stop=stop) as chunks:
                assert b"".join(chunks) == b"hello there."[start:stop]

    @pytest.mark.parametrize(
        "name", ["with space", "ünï cödé 漢字", "100%25", "a+b&c=d;e", "#hash?query", "'\"quotes"]
    )
    def test_stores_files_with_unusual_names(self, place, name):
        store, prefix = place
        prefix = f"{prefix}/{name}" if "file:" not in prefix else prefix
        uri = f"{prefix}/{quote(name)}" if "file:" in prefix else f"{prefix}/{name}"
        store.write(uri, io.BytesIO(name.encode()))
        (listed,) = store.list(prefix)
        assert listed.name == name
        assert read(store, uri, listed.etag) == name.encode()

    def test_does_not_close_the_file_of_the_caller(self, place):
        store, prefix = place
        data = io.BytesIO(b"x")
        store.write(f"{prefix}/x", data)
        assert not data.closed


class TestS3:
    pytestmark = pytest.mark.servers

    def test_an_object_of_many_parts_is_read_completely(self, servers, unique):
        store, uri = SchemeStore(), f"s3://{servers.bucket}/{unique}/big"
        data = bytes(range(256)) * (BIG // 256)
        store.write(uri, io.BytesIO(data))
        (listed,) = store.list(f"s3://{servers.bucket}/{unique}")
        assert (listed.size, read(store, uri, listed.etag)) == (BIG, data)

    @pytest.mark.parametrize(("breaks", "survives"), [(2, True), (9, False)])
    def test_resumes_after_a_broken_connection(self, servers, unique, breaks, survives):
        from trans_peft.edges.s3_store import S3Store

        store, uri = S3Store(chunk_bytes=1000), f"s3://{servers.bucket}/{unique}"
        data = bytes(range(250)) * 40
        store.write(uri, io.BytesIO(data))
        store._client = Flaky(store._client, breaks)
        if survives:
            assert read(store, uri) == data
        else:
            with pytest.raises(StoreError, match="cannot be reached"):
                read(store, uri)

    def test_resumes_only_from_the_same_version(self, servers, unique):
        from trans_peft.edges.s3_store import S3Store

        store, uri = S3Store(chunk_bytes=1000), f"s3://{servers.bucket}/{unique}"
        store.write(uri, io.BytesIO(bytes(10000)))
        store._client = Flaky(store._client, 1)
        with pytest.raises(IntegrityError, match="changed"), store.read(uri) as chunks:
            next(chunks)
            SchemeStore().write(uri, io.BytesIO(b"other"))
            list(chunks)

    def test_lists_more_than_one_page(self, servers, unique):
        import boto3

        client = boto3.Session().client("s3")

        def put(i: int) -> None:
            client.put_object(Bucket=servers.bucket, Key=f"{unique}/{i:04}", Body=b"x")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(1005)))
        assert len(SchemeStore().list(f"s3://{servers.bucket}/{unique}")) == 1005

    def test_a_missing_bucket_is_not_found(self, servers):
        with pytest.raises(NotFoundError, match="no-such-bucket"):
            SchemeStore().list("s3://no-such-bucket/x")

    def test_folder_markers_are_not_listed(self, servers, unique):
        import boto3

        client = boto3.Session().client("s3")
        client.put_object(Bucket=servers.bucket, Key=f"{unique}/sub/", Body=b"")
        assert SchemeStore().list(f"s3://{servers.bucket}/{unique}") == ()

    @pytest.mark.parametrize(
        ("name", "value"),
        [("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_SECRET_ACCESS_KEY", "wrong")],
    )
    def test_denied_access_names_what_to_check(self, servers, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        with pytest.raises(StoreError, match="check AWS_ENDPOINT_URL") as caught:
            SchemeStore().list(f"s3://{servers.bucket}/x")
        assert not isinstance(caught.value, NotFoundError)


class Flaky:
    """An S3 client whose connection breaks off after one chunk, so many times."""

    def __init__(self, client, breaks):
        self.client, self.breaks = client, breaks

    def get_object(self, **request):
        from botocore.exceptions import ResponseStreamingError

        found = self.client.get_object(**request)
        body, self.breaks = found["Body"], self.breaks - 1
        if self.breaks >= 0:
            whole = body.iter_chunks

            def iter_chunks(size):
                yield next(whole(size))
                raise ResponseStreamingError(error="connection reset")

            body.iter_chunks = iter_chunks
        return found


class TestFiles:
    @pytest.mark.parametrize("bounds", [{}, {"start": 2}, {"stop": 12}, {"start": 2, "stop": 99}])
    def test_a_file_shorter_than_its_size_is_a_store_error(self, tmp_path, monkeypatch, bounds):
        from trans_peft.edges import file_store

        path = tmp_path / "x"
        path.write_bytes(b"0123456789")

        def fstat(handle, listed=os.fstat):
            short = list(listed(handle))
            short[6] = 10 + 5
            return os.stat_result(short)

        monkeypatch.setattr(file_store.os, "fstat", fstat)
        monkeypatch.setattr(file_store, "_etag", lambda stat: "the same")
        store = file_store.FileStore(chunk_bytes=4)
        with (
            pytest.raises(StoreError, match="shorter than the file system reports"),
            store.read(str(path), **bounds) as chunks,
        ):
            list(chunks)

    def test_a_file_that_grows_while_it_is_read_is_an_integrity_error(self, tmp_path):
        from trans_peft.edges.file_store import FileStore

        path = tmp_path / "x"
        path.write_bytes(b"0123456789")
        with FileStore(chunk_bytes=4).read(str(path)) as chunks:
            next(chunks)
            with path.open("ab") as file:
                file.write(b"more")
            with pytest.raises(IntegrityError, match="changed"):
                list(chunks)

    def test_an_interrupted_write_keeps_the_old_content(self, tmp_path):
        from trans_peft.edges.file_store import FileStore

        class Breaking(io.RawIOBase):
            def read(self, size=-1):
                raise OSError(5, "the cable was pulled")

        store, path = FileStore(), tmp_path / "x"
        path.write_bytes(b"before")
        with pytest.raises(StoreError, match="the cable was pulled"):
            store.write(str(path), Breaking())
        assert path.read_bytes() == b"before"
        assert [f.name for f in store.list(str(tmp_path))] == ["x"]

    @pytest.mark.parametrize("listed", [True, False])
    def test_a_named_pipe_is_neither_listed_nor_waited_for(self, tmp_path, listed):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "x").write_bytes(b"x")
        store = SchemeStore(Places((tmp_path,), ()) if listed else Places())
        assert [file.name for file in store.list(str(tmp_path))] == ["x"]
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(StoreError, match=r"not a regular file|may not read"):
                read(store, str(path))
        with pytest.raises(NotFoundError):
            read(store, str(tmp_path))

    @pytest.mark.parametrize("uri", ["http://example.org/x", "gs://bucket/x", "S3://b/x", "://x"])
    def test_other_schemes_are_refused_with_the_known_ones(self, uri):
        for use in (SchemeStore().list, lambda uri: read(SchemeStore(), uri)):
            with pytest.raises(StoreError, match=r"s3://bucket/key, a path, or file:///path"):
                use(uri)
        with pytest.raises(AccessError, match="there is no store for the URI scheme"):
            SchemeStore().write(uri, io.BytesIO(b"x"))

    def test_a_file_uri_with_a_host_is_refused(self):
        with pytest.raises(StoreError, match="not a local path"):
            SchemeStore().list("file://host/x")


def test_a_local_file_without_permission_is_an_access_error(tmp_path, monkeypatch):
    """Another attempt does not help, so it is no StoreError."""

    def denied(path, uri):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(file_store, "_open_regular", denied)
    with (
        pytest.raises(AccessError, match="cannot be used: Permission denied"),
        FileStore().read(str(tmp_path / "rows.jsonl")),
    ):
        pass
