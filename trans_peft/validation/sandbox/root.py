"""A root folder in which there is Python, a scratch folder, and nothing else.

Listed is what may be seen, not what is hidden: a secret in a place that nobody thought of stays
out. There is no /proc, so other processes' memory, environment and command lines have no path.
"""

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from trans_peft.validation.sandbox import kernel

__all__ = ["SCRATCH", "enter_private_root", "python_paths"]

SCRATCH = "/scratch"

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")
# In the caller's tree a folder that every Linux has and nothing is taken from; the new root is
# mounted over it, in a mount namespace that nobody else sees.
_MOUNT_POINT = "/proc"
_SCRATCH_FILES = 1000


def python_paths() -> tuple[str, ...]:
    """Return the folders that a running interpreter reads: its own library, and shared ones."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    own = {f"{prefix}/{folder}" for prefix in prefixes for folder in ("lib", "lib64")}
    own.add(sysconfig.get_path("stdlib"))
    wanted = [path for path in sorted({*own, *_LIBRARIES}) if Path(path).is_dir()]
    return tuple(p for p in wanted if not any(p.startswith(f"{other}/") for other in wanted))


def enter_private_root(paths: Sequence[str], scratch_bytes: int) -> None:
    """Leave the caller's files for `paths` (read-only), devices and a scratch folder in memory.

    Needs a mount namespace of its own. OSError where the kernel forbids a step.
    """
    kernel.receive_no_mounts_back()
    kernel.mount_tmpfs(_MOUNT_POINT, "size=1m,nr_inodes=1000,mode=755")
    for path in paths:
        place = Path(_MOUNT_POINT + path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():  # /lib -> usr/lib
            place.symlink_to(Path(path).readlink())
        else:
            place.mkdir()
            kernel.bind(path, str(place))
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
    kernel.move_root(_MOUNT_POINT)
