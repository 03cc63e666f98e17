"""The bytes that an experiment needs on the disk of this machine."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from trans_peft.domain.base import BaseVersion
from trans_peft.domain.experiment import PlannedTraining
from trans_peft.errors import StoreError
from trans_peft.ports import Platform

if TYPE_CHECKING:
    from trans_peft.experiment.prepare import Prepared

__all__ = ["Disk", "check_disk", "copies", "disk"]

_COPIES = 2 * 3
"""A checkpoint has an adapter's weights and both moments; two checkpoints exist at one time."""


@dataclass(frozen=True)
class Disk:
    """Bytes that the missing trainings need on the disk, and bytes that are free.

    Attributes:
        bases: copies of bases that are not on this machine.
        adapters: adapters and checkpoints.
        free: free bytes.
    """

    bases: int
    adapters: int
    free: int

    @property
    def needed(self) -> int:
        """The bytes that are needed."""
        return self.bases + self.adapters


def disk(missing: Iterable[PlannedTraining], prepared: "Prepared", platform: Platform) -> Disk:
    """Return the bytes that trainings need on the disk of this machine."""
    sizes: dict[tuple[str, str], int] = {}
    adapters = largest = 0
    for planned in missing:
        of = (planned.family, planned.method)
        if of not in sizes:
            sizes[of] = _adapter_bytes(planned, prepared, platform)
        adapters += sizes[of]
        largest = max(largest, sizes[of])
    found = copies(prepared.bases.values(), platform)
    return Disk(found.bases, adapters + _COPIES * largest, found.free)


def copies(bases: Iterable[BaseVersion], platform: Platform) -> Disk:
    """Return the bytes for copies of bases alone."""
    by_content = {base.fingerprint_sha256: base for base in bases}
    needed = sum(_copy_bytes(base, platform) for base in by_content.values())
    platform.work_dir.mkdir(parents=True, exist_ok=True)
    return Disk(needed, 0, shutil.disk_usage(platform.work_dir).free)


def check_disk(found: Disk, folder: Path) -> None:
    """Raise StoreError if the disk does not have the bytes that are needed."""
    if found.needed > found.free:
        raise StoreError(
            f"the experiment does not fit on the disk of {folder}",
            expected=f"{found.needed / 1e9:.1f} GB: {found.bases / 1e9:.1f} GB for copies of "
            f"bases, {found.adapters / 1e9:.1f} GB for adapters and checkpoints",
            found=f"{found.free / 1e9:.1f} GB are free",
            do="free disk space, pass a folder of another disk as --state, or leave out methods, "
            "seeds or sweeps",
        )


def _adapter_bytes(planned: PlannedTraining, prepared: "Prepared", platform: Platform) -> int:
    from trans_peft.training.memory import trainable_parameters

    config = platform.catalog.fingerprint(prepared.base(planned)).config
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(config)
        return 4 * trainable_parameters(prepared.recipe(planned), Path(folder))


def _copy_bytes(base: BaseVersion, platform: Platform) -> int:
    """Return the size of a base in a bucket that this machine has no copy of."""
    if "://" not in base.uri or (platform.work_dir / "bases" / base.fingerprint_sha256).exists():
        return 0
    return sum(file.size for file in platform.store.list(base.uri))
