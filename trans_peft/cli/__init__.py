"""The command line `trans-peft`: adapters on folders and buckets, without any server.

A composition root like `tasks.composition`: it binds the same lifecycle verbs that the flows run to
ports in memory and in folders. Every command prints words and tables for people, or with `--json`
one JSON value; progress goes to stderr.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from trans_peft.errors import TransPeftError
from trans_peft.extras import explaining_missing_extras

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 all is well, 1 an adapter is not compatible or did not pass, 2 the input is at fault, 3 the
    command failed. An error of `trans_peft.errors` is told in words, never as a traceback.
    """
    try:
        with explaining_missing_extras():
            from trans_peft.cli.app import app
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)  # noqa: T201  the console needs the missing extra
        return 3

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours would be in shreds
    try:
        with warnings.catch_warnings():
            # What a library will change one day concerns its callers, not ours.
            warnings.simplefilter("ignore", FutureWarning)
            return int(app(arguments, result_action="return_value", exit_on_error=False) or 0)
    except TransPeftError as error:
        return _told(error, 2 if isinstance(error, (ValueError, TypeError, LookupError)) else 3)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from cyclopts import CycloptsError

        if isinstance(error, CycloptsError):  # it has printed itself
            return 2
        traceback.print_exc()
        return 3


def _told(error: TransPeftError, code: int) -> int:
    from trans_peft.cli.show import errors_out
    from trans_peft.cli.workspace import FETCHED

    text = str(error)
    for folder, uri in FETCHED.items():
        text = text.replace(str(folder), uri)
    errors_out.print(f"{type(error).__name__}: {text}", markup=False, highlight=False, style="red")
    return code
