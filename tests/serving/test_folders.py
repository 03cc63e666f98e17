"""Folders of adapters: downloaded once, verified, immutable, safe for several processes."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.serving.fleet import lora_folder
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseRef
from trans_peft.errors import AdapterError, IntegrityError, NotFoundError, StoreError
from trans_peft.models import adapter_weights_sha256
from trans_peft.serving.folders import COMPLETE, AdapterFolders
from trans_peft.serving.manifest import ServedAdapter
from trans_peft.transfer.peft_folder import read_peft_folder

BASE = BaseRef("small", "v1", "f" * 64)


class FolderRegistry:
    """Registry whose versions are folders. Each download appends a line to a log."""

    def __init__(self, folder: Path, seconds: float = 0.0):
        self.folder, self.log, self.seconds = folder, folder / "log", seconds
        self.fails: Exception | None = None

    def add(self, name: str, seed: int = 0) -> ServedAdapter:
        number = len(list(self.folder.glob(f"{name}-*"))) + 1
        source = lora_folder(self.folder / f"{name}-{number}", seed)
        return ServedAdapter(name, number, BASE, adapter_weights_sha256(source), "LORA", "training")

    def versions(self, name):
        return tuple(
            AdapterVersion(
                name, int(path.name.rpartition("-")[2]), BASE, BASE,
                adapter_weights_sha256(path), "LORA", (),
            )
            for path in sorted(self.folder.glob(f"{name}-*"))
        )  # fmt: skip

    def download(self, version, folder):
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n")
        if self.fails is not None:
            Path(folder).mkdir(parents=True)
            (Path(folder) / "adapter_config.json").write_text("{}")
            raise self.fails
        time.sleep(self.seconds)
        return shutil.copytree(self.folder / f"{version.adapter}-{version.number}", folder)

    @property
    def downloads(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "registry").mkdir()
    return FolderRegistry(tmp_path / "registry")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "served"


def test_a_folder_holds_the_registered_files_and_is_downloaded_once(registry, root):
    adapter = registry.add("chat")
    folders = AdapterFolders(root, registry)
    folder = folders.ensure(adapter)
    assert folder == root / adapter.engine_name
    assert adapter_weights_sha256(folder) == adapter.weights_sha256
    assert (folder / COMPLETE).read_text().split() == [adapter.engine_name, adapter.weights_sha256]
    assert folders.ensure(adapter) == AdapterFolders(root, registry).ensure(adapter) == folder
    assert registry.downloads == 1
    assert all(path.stat().st_mode & 0o222 == 0 for path in folder.glob("adapter_*"))


def test_each_version_has_its_own_folder(registry, root):
    folders = AdapterFolders(root, registry)
    first, second = registry.add("chat", 1), registry.add("chat", 2)
    assert folders.ensure(first) != folders.ensure(second)
    assert adapter_weights_sha256(folders.path(first)) == first.weights_sha256


def test_a_changed_file_is_found_and_never_overwritten(registry, root):
    adapter = registry.add("chat", 1)
    folders = AdapterFolders(root, registry)
    weights = folders.ensure(adapter) / "adapter_model.safetensors"
    assert folders.is_unchanged(adapter)
    other = (lora_folder(root.parent / "other", 2) / "adapter_model.safetensors").read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(other)
    assert not folders.is_unchanged(adapter)
    for process in (folders, AdapterFolders(root, registry)):
        with pytest.raises(IntegrityError, match="are not those of chat version 1"):
            process.ensure(adapter)
    assert weights.read_bytes() == other
    shutil.rmtree(weights.parent)  # the operator moves it away
    folders.ensure(adapter)
    assert folders.is_unchanged(adapter)
    assert registry.downloads == 2


@pytest.mark.parametrize("gone", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_found(registry, root, gone):
    adapter = registry.add("chat")
    folders = AdapterFolders(root, registry)
    (folders.ensure(adapter) / gone).unlink()
    assert not folders.is_unchanged(adapter)
    with pytest.raises(IntegrityError, match="a file is missing"):
        folders.ensure(adapter)


def test_a_deleted_folder_is_downloaded_again(registry, root):
    adapter = registry.add("chat")
    folders = AdapterFolders(root, registry)
    shutil.rmtree(folders.ensure(adapter))
    assert not folders.is_unchanged(adapter)
    assert folders.ensure(adapter).is_dir()
    assert folders.is_unchanged(adapter)


def test_a_file_that_was_only_touched_is_hashed_again_and_accepted(registry, root):
    adapter = registry.add("chat")
    folders = AdapterFolders(root, registry)
    os.utime(folders.ensure(adapter) / "adapter_model.safetensors")
    assert not folders.is_unchanged(adapter)
    folders.ensure(adapter)
    assert folders.is_unchanged(adapter)


@pytest.mark.parametrize(
    "error", [StoreError("away"), IntegrityError("other weights"), NotFoundError("gone")]
)
def test_a_failed_download_leaves_no_folder(registry, root, error):
    adapter = registry.add("chat")
    registry.fails = error
    folders = AdapterFolders(root, registry)
    with pytest.raises(type(error)):
        folders.ensure(adapter)
    assert not folders.path(adapter).exists()
    assert list((root / ".state" / "part").iterdir()) == []
    registry.fails = None
    assert folders.ensure(adapter).is_dir()


def test_the_rest_of_a_killed_download_does_not_get_into_the_folder(registry, root):
    adapter = registry.add("chat")
    part = root / ".state" / "part" / adapter.engine_name
    part.mkdir(parents=True)
    (part / "left-over").write_text("half")
    folder = AdapterFolders(root, registry).ensure(adapter)
    assert not (folder / "left-over").exists()


def test_a_version_that_the_registry_no_longer_has_is_not_replaced_by_another(registry, root):
    adapter = registry.add("chat", 1)
    shutil.rmtree(registry.folder / "chat-1")
    registry.add("chat", 2)  # gets the same number
    with pytest.raises(NotFoundError, match="no longer has chat version 1"):
        AdapterFolders(root, registry).ensure(adapter)


def test_a_folder_that_the_server_would_not_serve_is_refused(registry, root):
    adapter = registry.add("chat")

    def check(folder):
        raise AdapterError(f"{folder} has rank 64")

    with pytest.raises(AdapterError, match="chat version 1 has rank 64"):
        AdapterFolders(root, registry, check).ensure(adapter)
    assert not (root / adapter.engine_name).exists()


def test_the_base_name_is_written_for_servers_that_compare_it(registry, root):
    adapter = registry.add("chat")
    folders = AdapterFolders(root, registry, base_name="/models/small")
    folder = folders.ensure(adapter)
    assert read_peft_folder(folder).config["base_model_name_or_path"] == "/models/small"
    assert adapter_weights_sha256(folder) == adapter.weights_sha256
    with pytest.raises(IntegrityError, match="another --model"):
        AdapterFolders(root, registry, base_name="/models/other").ensure(adapter)


def test_processes_that_start_together_download_once(registry, root):
    adapter = registry.add("chat")
    registry.seconds = 0.3
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def work():
        found.put(adapter_weights_sha256(AdapterFolders(root, registry).ensure(adapter)))

    workers = [context.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [found.get() for _ in workers] == [adapter.weights_sha256] * 4
    assert registry.downloads == 1


def test_a_folder_stays_while_any_process_uses_it(registry, root):
    used, unused = registry.add("chat", 1), registry.add("code", 2)
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()

    def serve():
        folders = AdapterFolders(root, registry)
        folders.ensure(used)
        folders.ensure(unused)
        folders.release({used.engine_name})
        ready.set()
        end.wait(30)

    server = context.Process(target=serve)
    server.start()
    assert ready.wait(30)
    cleaner = AdapterFolders(root, registry)
    assert cleaner.remove_unused(idle_s=3600) == ()
    assert cleaner.remove_unused({unused.engine_name}) == ()
    assert cleaner.remove_unused() == (unused.engine_name,)
    assert (root / used.engine_name).is_dir()
    end.set()
    server.join(30)
    assert cleaner.remove_unused() == (used.engine_name,)


def test_folders_of_others_are_not_removed(registry, root):
    (root / "notes").mkdir(parents=True)
    assert AdapterFolders(root, registry).remove_unused() == ()
    assert (root / "notes").is_dir()


def flip(weights: Path) -> None:
    time.sleep(0.02)  # a later tick of the file system's clock
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x40
    weights.write_bytes(data)


def test_a_file_that_changes_after_its_verification_is_not_recorded_as_verified(
    registry, root, monkeypatch
):
    adapter = registry.add("chat")

    def check(folder):  # runs after the hash was compared
        monkeypatch.setattr(folders, "_check", None)
        flip(folder / "adapter_model.safetensors")

    folders = AdapterFolders(root, registry, check)
    with pytest.raises(IntegrityError, match="are not those of chat version 1"):
        folders.ensure(adapter)
    assert not folders.is_unchanged(adapter)
    with pytest.raises(IntegrityError, match="are not those of chat version 1"):
        folders.ensure(adapter)


def test_a_file_that_changes_while_it_is_made_durable_is_found(registry, root, monkeypatch):
    adapter = registry.add("chat")

    def sync(path):
        if path.name == "adapter_model.safetensors":
            flip(path)

    monkeypatch.setattr("trans_peft.serving.folders._sync", sync)
    folders = AdapterFolders(root, registry)
    with pytest.raises(IntegrityError, match="are not those of chat version 1"):
        folders.ensure(adapter)
    assert not folders.path(adapter).exists()


def test_a_file_or_link_in_place_of_a_folder_is_an_error_of_this_adapter(registry, root):
    chat, code = registry.add("chat", 1), registry.add("code", 2)
    root.mkdir()
    folders = AdapterFolders(root, registry)
    for put in (lambda path: path.write_text(""), lambda path: path.symlink_to("/nowhere")):
        put(folders.path(chat))
        with pytest.raises(IntegrityError, match=r"cannot be read(?s:.*)expected:(?s:.*)do:"):
            folders.ensure(chat)
        assert folders.ensure(code).is_dir()
        folders.path(chat).unlink()


@pytest.mark.parametrize("kind", ["part", "use", "lock"])
def test_a_file_in_place_of_the_state_is_a_store_error(registry, root, kind):
    (root / ".state").mkdir(parents=True)
    (root / ".state" / kind).write_text("")
    with pytest.raises(StoreError, match=r"cannot be used(?s:.*)do:"):
        AdapterFolders(root, registry).ensure(registry.add("chat"))


def test_damaged_folders_are_moved_away_and_downloaded_again(registry, root):
    chat, code = registry.add("chat", 1), registry.add("code", 2)
    folders = AdapterFolders(root, registry)
    for adapter in (chat, code):
        folders.ensure(adapter)
    (root / "notes").mkdir()
    flip(folders.path(chat) / "adapter_model.safetensors")
    for process in (folders, AdapterFolders(root, registry)):
        assert process.set_damaged_aside([code]) == (
            (chat.engine_name,) if process is folders else ()
        )
    assert (root / ".state" / "damaged" / chat.engine_name).is_dir()
    assert (root / "notes").is_dir()
    assert adapter_weights_sha256(folders.ensure(chat)) == chat.weights_sha256
    assert registry.downloads == 3
