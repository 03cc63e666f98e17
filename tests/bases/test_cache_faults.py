"""The cache after crashes, with full disks, corruption and parallel processes."""

import errno
import io
import json
import multiprocessing
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.bases.uploads import URI, folder_of, model_of, store_of
from trans_peft.bases import cache, eviction, ranges
from trans_peft.bases.cache import download
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import IntegrityError, StoreError

RANGE = 1 << 12
FORK = multiprocessing.get_context("fork")


def files_of(seed=0):
    """A base with some 130 kB of weights: more than thirty ranges."""
    values = np.random.default_rng(seed).normal(size=(128, 128)).astype(np.float64)
    return folder_of({"embed": values})


class Counting:
    """A store that knows how many bytes of each range were read, and may be slow or break."""

    def __init__(self, store, delay_s=0.0, fails_after=None):
        self.store, self.delay_s, self.left = store, delay_s, fails_after
        self.list, self.bytes, self.reads = store.list, 0, []

    @contextmanager
    def read(self, uri, *, etag=None, start=0, stop=None):
        if self.left == 0:
            raise StoreError("the cable was pulled")
        if self.left is not None:
            self.left -= 1
        time.sleep(self.delay_s)
        with self.store.read(uri, etag=etag, start=start, stop=stop) as chunks:
            yield self._counted(uri, start, chunks)

    def _counted(self, uri, start, chunks):
        self.reads.append((uri.rpartition("/")[2], start))
        for chunk in chunks:
            self.bytes += len(chunk)
            yield chunk


@pytest.fixture
def base(tmp_path):
    """A folder, its fingerprint, and the bytes of its files."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name, data in files_of().items():
        (folder / name).write_bytes(data)
    return str(folder), fingerprint(str(folder), FileStore()), sum(map(len, files_of().values()))


def get(base, cache_dir, store=None, **how):
    uri, expected, _ = base
    return download(
        uri, store or FileStore(), cache_dir, fingerprint=expected, range_bytes=RANGE, **how
    )


def is_right(base, copy):
    return fingerprint(str(copy), FileStore()) == base[1]


def in_a_process(call):
    """Run it in a process of its own, which then no longer uses anything."""
    process = FORK.Process(target=call)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_after_a_kill_only_the_missing_ranges_are_read(base, tmp_path):
    _, expected, size = base
    process = FORK.Process(
        target=lambda: get(base, tmp_path / "cache", Counting(FileStore(), delay_s=0.05))
    )
    process.start()
    journal = tmp_path / "cache" / f"{expected.digest}.part" / "ranges.jsonl"
    deadline = time.monotonic() + 30
    while not (journal.exists() and len(journal.read_text().splitlines()) >= 9):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "cache" / expected.digest).exists()
    written = [json.loads(line) for line in journal.read_text().splitlines()]
    store = Counting(FileStore())
    copy = get(base, tmp_path / "cache", store)
    assert store.bytes == size - sum(stop - start for *_, start, stop in written) < size
    assert not {(name, start) for _, name, _, start, _ in written} & set(store.reads)
    assert is_right(base, copy)
    assert not journal.parent.exists()


def test_a_download_resumes_after_a_store_error(base, tmp_path):
    first, second = Counting(FileStore(), fails_after=20), Counting(FileStore())
    with pytest.raises(StoreError, match="the cable was pulled"):
        get(base, tmp_path / "cache", first)
    assert is_right(base, get(base, tmp_path / "cache", second))
    assert 0 < second.bytes < base[2]
    assert base[2] <= first.bytes + second.bytes <= base[2] + ranges.STREAMS * RANGE


def test_an_incomplete_line_of_the_journal_is_ignored(base, tmp_path):
    with pytest.raises(StoreError):
        get(base, tmp_path / "cache", Counting(FileStore(), fails_after=20))
    journal = tmp_path / "cache" / f"{base[1].digest}.part" / "ranges.jsonl"
    text = journal.read_bytes()
    journal.write_bytes(text[:-7] + b"\xff\nnull\n[1]\n")
    assert is_right(base, get(base, tmp_path / "cache"))


@pytest.mark.parametrize("lost", ["zeros", "short"])
def test_ranges_lost_in_a_power_cut_are_downloaded_again(base, tmp_path, lost):
    with pytest.raises(StoreError):
        get(base, tmp_path / "cache", Counting(FileStore(), fails_after=30))
    part = tmp_path / "cache" / f"{base[1].digest}.part" / "files" / "model.safetensors"
    part.write_bytes(bytes(part.stat().st_size) if lost == "zeros" else b"")
    assert is_right(base, get(base, tmp_path / "cache"))


@pytest.mark.parametrize(
    "step", ["_sync", "_Copy.write_record", "_Copy.check", "Path.rename", "clear"]
)
def test_a_kill_after_the_last_range_repeats_no_download(base, tmp_path, monkeypatch, step):
    def killed(*_, **__):
        raise KeyboardInterrupt

    owner = {"Path.rename": Path, "clear": ranges.UnfinishedDownload}.get(step, cache)
    owner = cache._Copy if step.startswith("_Copy") else owner
    with monkeypatch.context() as patch:
        patch.setattr(owner, step.rpartition(".")[2], killed)
        with pytest.raises(KeyboardInterrupt):
            get(base, tmp_path / "cache")
    store = Counting(FileStore())
    copy = get(base, tmp_path / "cache", store)
    assert (store.bytes, is_right(base, copy)) == (0, True)


def test_parallel_processes_download_each_byte_once_and_see_complete_copies(base, tmp_path):
    log = tmp_path / "log"

    def work():
        store = Counting(FileStore(), delay_s=0.002)
        copy = get(base, tmp_path / "cache", store)
        assert is_right(base, copy)
        with log.open("a") as file:
            file.write(f"{store.bytes}\n")

    crowd = [FORK.Process(target=work) for _ in range(4)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0] * 4
    assert sorted(map(int, log.read_text().split())) == [0, 0, 0, base[2]]


def test_only_a_replaced_file_is_downloaded_again(tmp_path):
    store = store_of(files_of())
    files = store.list(URI)
    partial = ranges.UnfinishedDownload(tmp_path / "part")
    for item in partial.prepare(URI, files, RANGE):
        with store.read(f"{URI}/{item.name}", start=item.start, stop=item.stop) as chunks:
            partial.write(item, chunks)
    assert partial.prepare(URI, files, RANGE) == []
    store.write(f"{URI}/config.json", io.BytesIO(b"{}"))
    again = partial.prepare(URI, store.list(URI), RANGE)
    assert [item.name for item in again] == ["config.json"]


def test_a_download_stops_at_the_first_failed_range(base, tmp_path):
    store = Counting(FileStore(), delay_s=0.01, fails_after=1)
    with pytest.raises(StoreError, match="the cable"):
        get(base, tmp_path / "cache", store)
    assert len(store.reads) < 12


@pytest.mark.parametrize(
    ("received", "found"), [(1, "1 bytes"), (RANGE + 1, f"more than {RANGE} bytes")]
)
def test_a_range_of_the_wrong_size_is_a_store_error(base, tmp_path, received, found):
    class Lying(Counting):
        def _counted(self, uri, start, chunks):
            return iter([b"x" * received] if start else chunks)

    with pytest.raises(StoreError, match=f"with the wrong size\n.*\n  found:    {found}\n"):
        get(base, tmp_path / "cache", Lying(FileStore()))


# Full disks.


def test_a_full_disk_is_reported_before_anything_is_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "_free_bytes", lambda folder: 10_000)
    store = Counting(FileStore())
    with pytest.raises(StoreError, match="has too little space for this base") as caught:
        get(base, tmp_path / "cache", store)
    assert caught.match("10,000 bytes free")
    assert store.bytes == 0
    monkeypatch.undo()
    assert is_right(base, get(base, tmp_path / "cache"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_gets_its_space_back(base, tmp_path, monkeypatch, code):
    write = ranges.UnfinishedDownload.write

    def full(partial, item, chunks):
        if item.start > 10 * RANGE:
            raise OSError(code, os.strerror(code))
        write(partial, item, chunks)

    monkeypatch.setattr(ranges.UnfinishedDownload, "write", full)
    with pytest.raises(StoreError, match="is full; the unfinished download was removed"):
        get(base, tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock", ".use"}
    monkeypatch.undo()
    assert is_right(base, get(base, tmp_path / "cache"))


def test_a_folder_without_write_permission_is_a_store_error(base, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreError, match=r"the cache .* cannot be used"):
        get(base, tmp_path / "cache")


# Corruption of a copy that was whole once.


def flip(path, restore_times):
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    if restore_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda copy: flip(copy / "model.safetensors", restore_times=False),
        lambda copy: flip(copy / "model.safetensors", restore_times=True),
        lambda copy: os.truncate(copy / "model.safetensors", 10),
        lambda copy: (copy / "config.json").unlink(),
        lambda copy: (copy / "more.safetensors").write_bytes(b"x"),
    ],
    ids=["written", "written, times restored", "truncated", "removed", "added"],
)
def test_a_modified_copy_is_downloaded_again(base, tmp_path, corrupt):
    corrupt(get(base, tmp_path / "cache"))
    store = Counting(FileStore())
    copy = get(base, tmp_path / "cache", store)
    assert (is_right(base, copy), store.bytes) == (True, base[2])
    assert {path.name for path in copy.iterdir()} == set(files_of())


@pytest.mark.parametrize(
    "doubt",
    [
        lambda copy, record: os.utime(copy / "config.json"),
        lambda copy, record: record.unlink(),
        lambda copy, record: record.write_text("{"),
        lambda copy, record: record.write_text(
            json.dumps(json.loads(record.read_text()) | aged(8))
        ),
        lambda copy, record: record.write_text(
            json.dumps(json.loads(record.read_text()) | aged(-1))
        ),
    ],
    ids=["touched", "no record", "half a record", "a week old", "a clock set back"],
)
def test_a_copy_without_a_valid_record_is_hashed_and_not_downloaded(base, tmp_path, doubt):
    copy = get(base, tmp_path / "cache")
    record = copy.with_suffix(".json")
    doubt(copy, record)
    assert get(base, tmp_path / "cache", Counting(FileStore(), fails_after=0)) == copy
    assert abs(json.loads(record.read_text())["hashed_s"] - time.time()) < 60


def aged(days):
    return {"hashed_s": time.time() - days * 24 * 3600}


def test_silent_corruption_is_found_within_a_week(base, tmp_path):
    copy = get(base, tmp_path / "cache")
    flip(copy / "model.safetensors", restore_times=True)
    record = copy.with_suffix(".json")  # the record says that the changed file was hashed
    record.write_text(json.dumps({"files": cache._stats(copy)} | aged(8)))
    assert is_right(base, get(base, tmp_path / "cache"))


def test_files_that_the_manifest_does_not_list_are_not_downloaded(tmp_path):
    from trans_peft.bases.publish import publish

    source = tmp_path / "source"
    source.mkdir()
    for name, data in model_of().items():
        (source / name).write_bytes(data)
    uri, store = str(tmp_path / "upload"), FileStore()
    publish(source, uri, family="smol", version="v1", store=store)
    wanted = fingerprint(uri, store)
    (tmp_path / "upload" / "extra.safetensors").write_bytes(b"x")
    copy = download(uri, store, tmp_path / "cache", fingerprint=wanted)
    assert {path.name for path in copy.iterdir()} == set(model_of())


def test_changed_content_is_an_error_and_is_not_kept(base, tmp_path):
    uri, _, _ = base
    for name, data in files_of(seed=1).items():
        Path(uri, name).write_bytes(data)
    with pytest.raises(IntegrityError, match="changed after the base was made ready"):
        get(base, tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock", ".use"}


# The bound.


@pytest.fixture
def bases(tmp_path):
    """Five bases of one size."""
    found = []
    for seed in range(5):
        folder = tmp_path / f"base-{seed}"
        folder.mkdir()
        for name, data in files_of(seed).items():
            (folder / name).write_bytes(data)
        size = sum(map(len, files_of(seed).values()))
        found.append((str(folder), fingerprint(str(folder), FileStore()), size))
    return found


def there(bases, cache_dir):
    return [i for i, base in enumerate(bases) if (cache_dir / base[1].digest).exists()]


def unused(base, cache_dir, last_use_s, **how):
    """Make an unused copy whose last use was at `last_use_s`."""
    in_a_process(lambda: get(base, cache_dir, **how))
    os.utime(cache_dir / f"{base[1].digest}.use", (last_use_s, last_use_s))


def test_the_least_recently_used_copies_are_evicted_first(bases, tmp_path):
    for i, last_use_s in enumerate([300, 100, 400, 200]):
        unused(bases[i], tmp_path / "cache", last_use_s)
    in_a_process(lambda: get(bases[4], tmp_path / "cache", limit_bytes=3 * bases[0][2] + 100))
    assert there(bases, tmp_path / "cache") == [0, 2, 4]


def test_a_copy_in_use_is_never_evicted(bases, tmp_path):
    holds, ends = FORK.Event(), FORK.Event()

    def use():
        get(bases[0], tmp_path / "cache")
        holds.set()
        ends.wait()

    process = FORK.Process(target=use)
    process.start()
    holds.wait()
    unused(bases[1], tmp_path / "cache", 5000)
    in_a_process(lambda: get(bases[2], tmp_path / "cache", limit_bytes=1))
    assert there(bases, tmp_path / "cache") == [0, 2]
    process.kill()  # what it used is free, though nothing of it ran to its end
    process.join()
    in_a_process(lambda: get(bases[3], tmp_path / "cache", limit_bytes=1))
    assert there(bases, tmp_path / "cache") == [3]


def test_an_abandoned_download_is_evicted(bases, tmp_path):
    def broken_off():
        with pytest.raises(StoreError):
            get(bases[0], tmp_path / "cache", Counting(FileStore(), fails_after=9))

    in_a_process(broken_off)
    assert list((tmp_path / "cache").glob("*.part"))
    in_a_process(lambda: get(bases[1], tmp_path / "cache", limit_bytes=bases[1][2] + 1))
    assert not list((tmp_path / "cache").glob("*.part"))
    assert there(bases, tmp_path / "cache") == [1]


def test_unused_copies_are_evicted_before_a_full_disk_is_an_error(bases, tmp_path, monkeypatch):
    unused(bases[0], tmp_path / "cache", 100)
    unused(bases[1], tmp_path / "cache", 200)
    space = 2 * bases[0][2] + 5000

    def free(folder):
        held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        return space - held

    monkeypatch.setattr(eviction, "_free_bytes", free)
    in_a_process(lambda: get(bases[2], tmp_path / "cache"))
    assert there(bases, tmp_path / "cache") == [1, 2]


def test_a_link_to_a_folder_of_the_users_own_is_never_removed(bases, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / bases[0][1].digest).symlink_to(bases[0][0])
    in_a_process(lambda: get(bases[1], tmp_path / "cache", limit_bytes=1))
    assert there(bases, tmp_path / "cache") == [0, 1]
    assert Path(bases[0][0], "config.json").exists()
