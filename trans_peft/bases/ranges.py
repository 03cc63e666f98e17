"""Fetch files in ranges, several at once, into a folder that a killed process leaves usable.

`<folder>/files/` holds the files in their full sizes from the start, with holes; each line of
`<folder>/ranges.jsonl` names a range that was written, of one version (ETag) of one file. Who comes
after a crash reads the missing ranges only. Bytes of a range are never trusted for being there: the
caller reads all of them, in order, while later ranges are still under way.
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

__all__ = ["RANGE_BYTES", "STREAMS", "Partial", "Range", "fetching"]

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


class Partial:
    """A folder that is being filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self._journal = folder / "ranges.jsonl"
        self._lock = threading.Lock()

    def bytes_written(self, uri: str, files: Sequence[StoredFile]) -> int:
        """Return how many bytes of these files are there already."""
        versions = {(file.name, file.etag) for file in files}
        return sum(
            item.stop - item.start
            for item in self.written()
            if item.uri == uri and (item.name, item.etag) in versions
        )

    def prepare(self, uri: str, files: Sequence[StoredFile], range_bytes: int) -> list[Range]:
        """Give every file its size, drop what belongs to none, and return the missing ranges."""
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
        """Return the ranges that were written; a line that a crash cut off is none."""
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
        """Write one range and then its line. StoreError if there are fewer or more bytes."""
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
                f"the store answers with other bytes of {item.name} than those asked for",
                expected=f"{item.stop - item.start} bytes from {item.start}",
                found=f"{'more' if position > item.stop else position - item.start}",
                do="try again",
            )
        with self._lock, self._journal.open("a") as journal:
            journal.write(_line(item))

    def clear(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def fetching(
    partial: Partial, missing: Sequence[Range], store: ArtifactStore
) -> Iterator[FileReader]:
    """Fetch the missing ranges in the background and give a `FileReader` of the files meanwhile.

    The reader waits for the range that it has come to. The first range that fails ends it all: its
    error is raised, ranges under way are left unfinished, those written stay.
    """
    stopped, broken = threading.Event(), _Broken()

    def fetch(item: Range) -> None:
        try:
            with store.read(
                child_uri(item.uri, item.name), etag=item.etag, start=item.start, stop=item.stop
            ) as chunks:
                partial.write(item, _until(stopped, chunks))
        except BaseException as error:
            broken.by(error)

    with ThreadPoolExecutor(STREAMS, thread_name_prefix="fetch") as pool:
        try:
            futures: dict[str, list[tuple[int, Future[None]]]] = {}
            for item in missing:
                futures.setdefault(item.name, []).append((item.start, pool.submit(fetch, item)))
            yield _reader(partial.files, futures, broken.wait_for)
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
        # Unbuffered: what is read ahead might not have been written yet.
        with (folder / file.name).open("rb", buffering=0) as opened:
            yield _in_order(opened.read, file.size, futures.get(file.name, []), wait_for)

    return read


def _in_order(
    read: Callable[[int], bytes],
    size: int,
    coming: list[tuple[int, Future[None]]],
    wait_for: Callable[[Future[None]], None],
) -> Iterator[bytes]:
    waiting, position = list(reversed(coming)), 0
    while position < size:
        while waiting and waiting[-1][0] <= position:
            wait_for(waiting.pop()[1])
        there_until = waiting[-1][0] if waiting else size
        chunk = read(min(_CHUNK_BYTES, there_until - position))
        if not chunk:
            return
        position += len(chunk)
        yield chunk


class _Broken:
    """The first error of any range."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()
        self._lock = threading.Lock()

    def by(self, error: BaseException) -> None:
        with self._lock:
            if not self._future.done():
                self._future.set_exception(error)

    def wait_for(self, future: Future[None]) -> None:
        wait((future, self._future), return_when=FIRST_COMPLETED)
        if self._future.done() and (error := self._future.exception()):
            raise _RangeFailedError(error)


class _RangeFailedError(Exception):
    """Goes past those who look for errors of the files they read."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Stopped(Exception):  # noqa: N818  nobody's error
    pass


def _until(stopped: threading.Event, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if stopped.is_set():
            raise _Stopped
        yield chunk


def _line(item: Range) -> str:
    return json.dumps([item.uri, item.name, item.etag, item.start, item.stop]) + "\n"
