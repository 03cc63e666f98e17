"""Local folders and hub data sets that a process may read on behalf of a recipe or a suite.

Recipes, suites and adapters contain the URIs of their data. On a shared worker such a URI must not
give access to the worker's own files, so the operator lists the places that may be read. There is
no list on a user's own machine. Access to buckets is controlled by credentials, not by this list.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from trans_peft.domain.names import quoted
from trans_peft.errors import AccessError, InvalidSpecError

__all__ = ["HUB", "Places"]

HUB = "hub:"
"""Prefix of the URI of a hub data set."""

_SETTING = "TRANS_PEFT_READABLE"
_FILE = "file://"


@dataclass(frozen=True)
class Places:
    """Folders and hub data sets that may be read.

    Attributes:
        folders: absolute paths; everything below them may be read. None allows any local path.
        data_sets: names on the hub, in which `*` matches any characters ("openai/*"). None allows
            any data set.
    """

    folders: tuple[Path, ...] | None = None
    data_sets: tuple[str, ...] | None = None

    @classmethod
    def named(cls, text: str, *, also: Sequence[str] = ()) -> "Places":
        """Parse a setting: folders and `hub:NAME`, separated by commas.

        `also` are URIs from other settings of the operator; paths and `file://` URIs among them are
        added, and others ignored. InvalidSpecError for a relative path or another scheme in `text`.
        """
        entries = [entry.strip() for entry in text.split(",") if entry.strip()]
        local = [_path_of(uri) for uri in also if _is_local(uri)]
        folders = [Path(entry) for entry in [*local, *(e for e in entries if not _is_hub(e))]]
        wrong = [str(folder) for folder in folders if not folder.is_absolute()]
        if wrong:
            raise InvalidSpecError(
                f"{_SETTING} has entries that are neither folders nor hub data sets",
                expected="absolute paths of folders and hub:OWNER/NAME, separated by commas",
                found=", ".join(wrong),
            )
        names = tuple(entry.removeprefix(HUB) for entry in entries if _is_hub(entry))
        return cls(tuple(folders), names)

    def check_path(self, path: Path, uri: str) -> Path:
        """Return the path without symbolic links and `..`.

        AccessError if the path may not be read, and if no file can have it: with a NUL character,
        with text that the file system cannot encode, or through a loop of symbolic links.
        """
        try:
            real = _without_links(path)
            os.fsencode(real)
        except (OSError, ValueError, RuntimeError) as error:
            raise AccessError(
                f"{quoted(uri, 200)} cannot be used as a local path",
                expected="the path of a file or folder",
                found=str(error),
                do="correct the URI; MLflow shows it as the source of the version, or in its tag "
                "trans_peft.uri",
            ) from error
        if self.folders is None:
            return real
        if any(real.is_relative_to(folder.resolve()) for folder in self.folders):
            return real
        raise AccessError(
            f"this worker may not read the local path {uri}",
            expected=f"a bucket, or a path below {', '.join(map(str, self.folders)) or '(none)'}",
            found=str(real),
            do=f"put the data into a bucket, or ask the operator to add its folder to {_SETTING}",
        )

    def check_data_set(self, name: str, uri: str) -> None:
        """Raise AccessError if the hub data set may not be read."""
        if self.data_sets is None or any(fnmatchcase(name, each) for each in self.data_sets):
            return
        raise AccessError(
            f"this worker may not read the hub data set {uri}",
            expected=f"a bucket, or one of {', '.join(self.data_sets) or '(none)'}",
            found=name,
            do=f"put the data into a bucket, or ask the operator to add hub:{name} to {_SETTING}",
        )


def _without_links(path: Path) -> Path:
    """Return the absolute path without symbolic links, also if no file has it.

    Raises OSError for a loop of links (RuntimeError before Python 3.13). `Path.resolve` raises it
    only in strict mode since Python 3.13.
    """
    try:
        return path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path.resolve()


def _path_of(uri: str) -> str:
    return unquote(uri.removeprefix(_FILE)) if uri.startswith(_FILE) else uri


def _is_hub(uri: str) -> bool:
    return uri.startswith(HUB)


def _is_local(uri: str) -> bool:
    return bool(uri) and ("://" not in uri or uri.startswith(_FILE))
