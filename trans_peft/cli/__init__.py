"""The command line `trans-peft`: adapters in folders and buckets, without any server.

A composition root like `tasks.composition`: it binds the lifecycle functions that the flows run to
ports in memory and in folders. Every command prints text and tables, or one JSON value with
`--json`. Progress and errors go to stderr.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from trans_peft.errors import StoreError, TransPeftError, is_full_disk
from trans_peft.extras import explaining_missing_extras

__all__ = ["main"]

_OF_THE_MACHINE = frozenset(
    {errno.EACCES, errno.EDQUOT, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
     errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}
)  # fmt: skip
"""Errors of folders and disks. A file that is missing (ENOENT) is an error of this program."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 1 if an adapter is incompatible or its verdict is not `passed`, 2 for
    invalid input, 3 if the command failed, and 130 if the user interrupted it. An error of
    `trans_peft.errors` is printed as a message without a traceback, and so is an error of a folder
    or a disk, such as a full one.
    """
    try:
        with explaining_missing_extras():
            from trans_peft.cli.app import app
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)  # noqa: T201  rich is part of the missing extra
        return 3

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would break our own bars
    try:
        with warnings.catch_warnings():
            # Future changes of a library concern the authors of this package, not its users.
            warnings.simplefilter("ignore", FutureWarning)
            return int(app(arguments, result_action="return_value", exit_on_error=False) or 0)
    except TransPeftError as error:
        _print_error(error)
        return 2 if isinstance(error, (ValueError, TypeError, LookupError)) else 3
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from cyclopts import CycloptsError

        if isinstance(error, CycloptsError):  # cyclopts has printed it
            return 2
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            _print_error(_store_error(error))
            return 3
        traceback.print_exc()
        return 3


def _store_error(error: OSError) -> StoreError:
    path = error.filename or "one of the folders in the command"
    if is_full_disk(error):
        return StoreError(
            f"the disk of {path} is full",
            found=error.strerror,
            do="free space on it, or pass folders of another disk as --out and --state",
        )
    return StoreError(
        f"{path} cannot be read or written",
        expected="files and folders that this user may read and write",
        found=error.strerror,
        do="correct its permissions, or choose another folder",
    )


def _print_error(error: TransPeftError) -> None:
    from trans_peft.cli.show import stderr
    from trans_peft.cli.workspace import DOWNLOADED_FROM

    text = str(error)
    for folder, uri in DOWNLOADED_FROM.items():
        text = text.replace(str(folder), uri)
    stderr.print(f"{type(error).__name__}: {text}", style="red")
