"""A private root folder that contains Python, a scratch folder, and nothing else.

The root is a list of what is visible, not of what is hidden, so that a secret in an unexpected
place stays invisible. It has no /proc, so other processes' memory, environment and command lines
have no path.
"""

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from trans_peft.sandbox import kernel

__all__ = ["SCRATCH", "enter_private_root", "python_paths"]

SCRATCH = "/scratch"

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")
# The new root is mounted over a folder that every Linux has and that the new root does not need.
# No other process sees that, because the mount namespace is private.
_MOUNT_POINT = "/proc"
_SCRATCH_FILES = 1000


def python_paths() -> tuple[str, ...]:
    """Return the folders that a running interpreter reads: Python's library and shared objects."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    own = {f"{prefix}/{folder}" for prefix in prefixes for folder in ("lib", "lib64")}
    own.add(sysconfig.get_path("stdlib"))
    existing = [path for path in sorted({*own, *_LIBRARIES}) if Path(path).is_dir()]
    return tuple(p for p in existing if not any(p.startswith(f"{other}/") for other in existing))


def enter_private_root(paths: Sequence[str], scratch_bytes: int) -> None:
    """Replace the root folder by one with `paths` (read-only), devices and a scratch folder.

    The scratch folder is in memory. Call this in a new mount namespace. OSError where the kernel
    forbids a step.
    """
    kernel.make_mounts_private()
    kernel.mount_tmpfs(_MOUNT_POINT, "size=1m,nr_inodes=1000,mode=755")
    for path in paths:
        target = Path(_MOUNT_POINT + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():  # /lib -> usr/lib
            target.symlink_to(Path(path).readlink())
        else:
            target.mkdir()
            kernel.bind(path, str(target))
    Path(f"{_MOUNT_POINT}/dev").mkdir()
    for device in _DEVICES:
        Path(_MOUNT_POINT + device).touch()
        kernel.bind(device, _MOUNT_POINT + device)
    Path(_MOUNT_POINT + SCRATCH).mkdir()
    kernel.make_read_only(_MOUNT_POINT)
    kernel.mount_tmpfs(
        _MOUNT_POINT + SCRATCH,
        f"size={scratch_bytes},nr_inodes={_SCRATCH_FILES},mode=1777",
        executable=False,
    )
    kernel.pivot_root(_MOUNT_POINT)
