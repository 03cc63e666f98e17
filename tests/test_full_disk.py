"""Errors of a full disk, which each library reports in its own way."""

import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trans_peft.errors import StoreError, translating_full_disk_errors

SAVED = "Error while serializing: I/O error: {} (os error {})"


def copied(folder):
    """Copy a folder to a full device, with `shutil`."""
    source, target = folder / "source", folder / "target"
    for made in (source, target):
        made.mkdir()
    (source / "file").write_text("text")
    (target / "file").symlink_to("/dev/full")
    shutil.copytree(source, target, dirs_exist_ok=True)


def saved(message, number):
    """Raise what safetensors raises, whose writer in Rust needs a real disk."""
    raise SafetensorError(SAVED.format(message, number))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_copies_of_folders_to_a_full_disk_are_errors_of_the_store(tmp_path):
    with pytest.raises(StoreError, match="is full"), translating_full_disk_errors(tmp_path):
        copied(tmp_path)


def test_tensors_that_a_full_disk_cannot_hold_are_errors_of_the_store(tmp_path):
    with pytest.raises(StoreError, match="is full"), translating_full_disk_errors(tmp_path):
        saved("No space left on device", errno.ENOSPC)
    with pytest.raises(SafetensorError), translating_full_disk_errors(tmp_path):
        saved("Permission denied", errno.EACCES)
