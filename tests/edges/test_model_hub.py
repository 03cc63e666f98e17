"""Models of the hub, with the hub's client replaced."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from trans_peft.edges.model_hub import model_folder
from trans_peft.errors import InvalidSpecError, NotFoundError, StoreError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    found = SimpleNamespace(cached=False, online=True, size=10, calls=[])

    def snapshot_download(name, *, revision, allow_patterns, local_files_only):
        found.calls.append((name, revision, local_files_only))
        if not found.cached and (local_files_only or not found.online):
            raise LocalEntryNotFoundError("no")
        return str(tmp_path)

    def model_info(self, name, *, revision, files_metadata):
        files = [("model.safetensors", found.size), ("pytorch_model.bin", 1 << 62)]
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files]
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return found


def test_without_download_only_the_cache_is_read(hub, tmp_path):
    with pytest.raises(NotFoundError, match="not in the hub's cache"):
        model_folder("hub:a/b", download=False)
    hub.cached = True
    assert model_folder("hub:a/b@v1", download=False) == tmp_path
    assert hub.calls == [("a/b", None, True), ("a/b", "v1", True)]


@pytest.mark.parametrize("cached", [False, True])
def test_with_download_missing_files_are_fetched(hub, tmp_path, cached):
    hub.cached = cached
    assert model_folder("hub:a/b@refs/pr/1", download=True) == Path(tmp_path)
    assert hub.calls[-1] == ("a/b", "refs/pr/1", False)


def test_a_model_that_does_not_fit_is_not_downloaded(hub):
    hub.size = 1 << 62
    with pytest.raises(StoreError, match="does not fit on the disk"):
        model_folder("hub:a/b", download=True)
    assert all(is_local for _, _, is_local in hub.calls)


def test_an_unreachable_hub_is_reported(hub):
    hub.online = False
    with pytest.raises(StoreError, match="cannot be downloaded"):
        model_folder("hub:a/b", download=True)


@pytest.mark.parametrize("uri", ["hub:b", "hub:a/b/c", "hub:a b/c", "hub:a/b@"])
def test_a_malformed_name_is_refused(uri):
    with pytest.raises(InvalidSpecError, match="does not name a model"):
        model_folder(uri, download=False)
