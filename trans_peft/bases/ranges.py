"""Download files in parallel ranges into a folder, so that an interrupted download can resume.

`<folder>/files/` contains sparse files of the final sizes. Each line of `<folder>/ranges.jsonl`
names a range that was written, of one version (ETag) of one file. After a crash, only the missing
ranges are downloaded. The caller hashes all bytes, in order, while later ranges are still being
downloaded; the bytes of an earlier process are not trusted.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trans_peft.artifacts import child_uri
from trans_peft.bases.fingerprint import FileReader
from trans_peft.errors import StoreError
from trans_peft.files import atomic_write
from trans_peft.ports import ArtifactStore, StoredFile

__all__ = ["RANGE_BYTES", "STREAMS", "Range", "UnfinishedDownload", "fetching"]

RANGE_BYTES = 16 << 20
STREAMS = 8
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Range:
    """The bytes [start, stop) of one version of one file below a URI."""

    uri: str
    name: str
    etag: str
    start: int
    stop: int


class UnfinishedDownload:
    """A folder with an unfinished download."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self._journal = folder / "ranges.jsonl"
        self._lock = threading.Lock()

    def bytes_written(self, uri: str, files: Sequence[StoredFile]) -> int:
        """Return how many bytes of these files were written already."""
        versions = {(file.name, file.etag) for file in files}
        return sum(
            item.stop - item.start
            for item in self.written()
            if item.uri == uri and (item.name, item.etag) in versions
        )

    def prepare(self, uri: str, files: Sequence[StoredFile], range_bytes: int) -> list[Range]:
        """Create all files, remove others, and return the ranges that are missing."""
        ranges = [
            Range(uri, file.name, file.etag, start, min(start + range_bytes, file.size))
            for file in files
            for start in range(0, file.size, range_bytes)
        ]
        names = {file.name for file in files}
        written = self.written()
        for path in [*self.files.rglob("*")]:
            if path.is_file() and path.relative_to(self.files).as_posix() not in names:
                path.unlink()
        for file in files:
            path = self.files / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as opened:
                opened.truncate(file.size)
        kept = [item for item in ranges if item in written]
        atomic_write(self._journal, "".join(map(_line, kept)))
        return [item for item in ranges if item not in written]

    def written(self) -> set[Range]:
        """Return the ranges that were written. Lines that a crash cut off are ignored."""
        try:
            lines = self._journal.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return set()
        found = set()
        for line in lines:
            try:
                found.add(Range(*json.loads(line)))
            except (ValueError, TypeError):
                continue
        return found

    def write(self, item: Range, chunks: Iterator[bytes]) -> None:
        """Write one range, then its line. Raises StoreError for fewer or more bytes."""
        position = item.start
        with (self.files / item.name).open("r+b") as file:
            file.seek(position)
            for chunk in chunks:
                position += len(chunk)
                if position > item.stop:
                    break
                file.write(chunk)
        if position != item.stop:
            raise StoreError(
                f"the store returned a range of {item.name} with the wrong size",
                expected=f"{item.stop - item.start} bytes from {item.start}",
                found=f"more than {item.stop - item.start} bytes"
                if position > item.stop
                else f"{position - item.start} bytes",
                do="try again",
            )
        with self._lock, self._journal.open("a") as journal:
            journal.write(_line(item))

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def fetching(
    partial: UnfinishedDownload, missing: Sequence[Range], store: ArtifactStore
) -> Iterator[FileReader]:
    """Download the missing ranges in the background, and yield a `FileReader` of the files.

    The reader waits for ranges that are not written yet. When the first range fails, its error is
    raised and all downloads stop; ranges that were written stay.
    """
    stopped, failure = threading.Event(), _FirstFailure()

    def fetch(item: Range) -> None:
        try:
            with store.read(
                child_uri(item.uri, item.name), etag=item.etag, start=item.start, stop=item.stop
            ) as chunks:
                partial.write(item, _until(stopped, chunks))
        except BaseException as error:
            failure.set(error)

    with ThreadPoolExecutor(STREAMS, thread_name_prefix="fetch") as pool:
        try:
            futures: dict[str, list[tuple[int, Future[None]]]] = {}
            for item in missing:
                futures.setdefault(item.name, []).append((item.start, pool.submit(fetch, item)))
            yield _reader(partial.files, futures, failure.wait_for)
        except _RangeFailedError as failed:
            raise failed.error from None
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _reader(
    folder: Path,
    futures: dict[str, list[tuple[int, Future[None]]]],
    wait_for: Callable[[Future[None]], None],
) -> FileReader:
    @contextmanager
    def read(file: StoredFile) -> Iterator[Iterator[bytes]]:
        # Unbuffered: a buffer could read ahead into ranges that are not written yet.
        with (folder / file.name).open("rb", buffering=0) as opened:
            yield _in_order(opened.read, file.size, futures.get(file.name, []), wait_for)

    return read


def _in_order(
    read: Callable[[int], bytes],
    size: int,
    futures: list[tuple[int, Future[None]]],
    wait_for: Callable[[Future[None]], None],
) -> Iterator[bytes]:
    waiting, position = list(reversed(futures)), 0
    while position < size:
        while waiting and waiting[-1][0] <= position:
            wait_for(waiting.pop()[1])
        available = waiting[-1][0] if waiting else size
        chunk = read(min(_CHUNK_BYTES, available - position))
        if not chunk:
            return
        position += len(chunk)
        yield chunk


class _FirstFailure:
    """The first error of any range."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()
        self._lock = threading.Lock()

    def set(self, error: BaseException) -> None:
        with self._lock:
            if not self._future.done():
                self._future.set_exception(error)

    def wait_for(self, future: Future[None]) -> None:
        wait((future, self._future), return_when=FIRST_COMPLETED)
        if self._future.done() and (error := self._future.exception()):
            raise _RangeFailedError(error)


class _RangeFailedError(Exception):
    """Carries an error through `scan`, which catches errors of the files that it reads."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Stopped(Exception):  # noqa: N818  not an error
    pass


def _until(stopped: threading.Event, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if stopped.is_set():
            raise _Stopped
        yield chunk


def _line(item: Range) -> str:
    return json.dumps([item.uri, item.name, item.etag, item.start, item.stop]) + "\n"
