"""Which local folders and hub data sets this process may read on behalf of a recipe or a suite.

Recipes, suites and adapters name where their data lies. On a shared worker such a name must not
reach the worker's own files, so its operator lists the places that may be read. A user's own
machine has no such list. Buckets are not listed here: the credentials decide about them.
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
"""What the URI of a hub data set begins with."""

_SETTING = "TRANS_PEFT_READABLE"
_FILE = "file://"


@dataclass(frozen=True)
class Places:
    """Folders and hub data sets that may be read.

    Attributes:
        folders: absolute paths; everything below them may be read. None: any local path.
        data_sets: names on the hub, in which `*` stands for any characters ("openai/*"). None: any.
    """

    folders: tuple[Path, ...] | None = None
    data_sets: tuple[str, ...] | None = None

    @classmethod
    def named(cls, text: str, *, also: Sequence[str] = ()) -> "Places":
        """Return the places in a setting: folders and `hub:NAME`, separated by commas.

        `also` are URIs that the operator configured elsewhere; those without a scheme count as
        folders. InvalidSpecError for a relative path or any other scheme.
        """
        entries = [entry.strip() for entry in text.split(",") if entry.strip()]
        local = [_path_of(uri) for uri in also if _is_local(uri)]
        folders = [Path(entry) for entry in [*local, *(e for e in entries if not _is_hub(e))]]
        wrong = [str(folder) for folder in folders if not folder.is_absolute()]
        if wrong:
            raise InvalidSpecError(
                f"{_SETTING} names what is no place to read from",
                expected="absolute folders and hub:NAME, separated by commas",
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
            real = path.resolve()
            os.fsencode(real)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise AccessError(
                f"{quoted(uri, 200)} cannot be used as a local path",
                expected="the path of a file or folder",
                found=str(error),
                do="correct the URI: MLflow's page shows it as the version's source, or in the tag "
                "trans_peft.uri",
            ) from error
        if self.folders is None:
            return real
        if any(real.is_relative_to(folder.resolve()) for folder in self.folders):
            return real
        raise AccessError(
            f"{uri} is a local path that this worker does not read",
            expected=f"a bucket, or a path below {', '.join(map(str, self.folders)) or '(none)'}",
            found=str(real),
            do=f"put the data into a bucket, or let the operator list its folder in {_SETTING}",
        )

    def check_data_set(self, name: str, uri: str) -> None:
        """Raise AccessError where the hub data set may not be read."""
        if self.data_sets is None or any(fnmatchcase(name, each) for each in self.data_sets):
            return
        raise AccessError(
            f"{uri} is a hub data set that this worker does not read",
            expected=f"a bucket, or one of {', '.join(self.data_sets) or '(none)'}",
            found=name,
            do=f"put the data into a bucket, or let the operator list hub:{name} in {_SETTING}",
        )


def _path_of(uri: str) -> str:
    return unquote(uri.removeprefix(_FILE)) if uri.startswith(_FILE) else uri


def _is_hub(uri: str) -> bool:
    return uri.startswith(HUB)


def _is_local(uri: str) -> bool:
    return bool(uri) and ("://" not in uri or uri.startswith(_FILE))
