"""Every error this library raises on purpose, as one tree.

    TransPeftError
    ├── InvalidSpecError      (ValueError)    a recipe, spec, suite or policy that cannot work
    ├── DataError             (ValueError)    rows of data that cannot be used; all at once
    ├── UploadError           (ValueError)    a base upload that is refused; all reasons at once
    ├── AdapterError          (ValueError)    a PEFT folder that is not what it must be
    ├── ContentError          (ValueError)    untrusted content that cannot be evaluated
    │   └── LimitExceededError                it needs more time, memory or room than allowed
    ├── IsolationError        (RuntimeError)  a child process killed from outside: try again
    ├── UnsupportedModelError (TypeError)     a model in which what we look for is not to be found
    ├── NotFoundError         (LookupError)   no such family, version, adapter or file
    │   └── NotServedError                    no version of the adapter serves on that base
    ├── IntegrityError        (OSError)       bytes that are not what their hash says
    ├── StoreError            (OSError)       a store, or a disk, that fails: whoever asks
    │   └── AccessError       (PermissionError)   one that does not let us in
    ├── EvaluationError       (RuntimeError)  a model that gives no answers that could be marked
    └── TrainingError         (RuntimeError)  a training process that ended without an adapter
        ├── OutOfMemoryError  (MemoryError)
        └── TrainingCancelled

Each also inherits the builtin that a caller who does not know us would catch. A verdict about an
adapter is never an exception: it is a value (`trans_peft.domain.evaluation.Verdict`).
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "AccessError",
    "AdapterError",
    "ContentError",
    "DataError",
    "EvaluationError",
    "IntegrityError",
    "InvalidSpecError",
    "IsolationError",
    "LimitExceededError",
    "NotFoundError",
    "NotServedError",
    "OutOfMemoryError",
    "StoreError",
    "TrainingCancelled",
    "TrainingError",
    "TransPeftError",
    "UnsupportedModelError",
    "UploadError",
    "full_disk_error",
    "listed",
    "naming",
    "translating_full_disk_errors",
]

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


def listed(values: Sequence[str], count: int = 5) -> str:
    """Return the first `count` values for a message, and how many more there are."""
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(values[:count]) + more


@contextmanager
def naming(names: Mapping[Path, str]) -> Iterator[None]:
    """Write names in place of paths in the texts of the block's errors.

    For temporary copies: the reader of an error knows the folder that was copied, not the copy.
    """
    try:
        yield
    except TransPeftError as error:
        text = str(error)
        for path, name in names.items():
            text = text.replace(str(path), name)
        if text == str(error):
            raise
        raise type(error)(text) from error


class TransPeftError(Exception):
    """What went wrong, in words: the problem, what was expected, what was found, what to do.

    The parts are joined into one message at once, so that the error survives pickling between
    processes with nothing but its text.
    """

    def __init__(
        self, problem: str, *, expected: object = None, found: object = None, do: str | None = None
    ) -> None:
        parts = [problem]
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if found is not None:
            parts.append(f"  found:    {found}")
        if do is not None:
            parts.append(f"  do:       {do}")
        super().__init__("\n".join(parts))


class InvalidSpecError(TransPeftError, ValueError):
    """A recipe, spec, perturbation, suite or policy that cannot work."""


class DataError(TransPeftError, ValueError):
    """Rows of training or evaluation data that cannot be used; the message lists every one."""


class UploadError(TransPeftError, ValueError):
    """A base upload that is refused; the message lists every reason."""


class AdapterError(TransPeftError, ValueError):
    """A PEFT folder that is not what it must be."""


class ContentError(TransPeftError, ValueError):
    """Untrusted content (a tokenizer, a template, a pattern, a file) that cannot be evaluated."""


class LimitExceededError(ContentError):
    """Untrusted content that needs more time, memory or room than its evaluation may take."""


class IsolationError(TransPeftError, RuntimeError):
    """A child process that was killed from outside or did not start. Its content may be fine."""


class UnsupportedModelError(TransPeftError, TypeError):
    """A model in which what we look for is not to be found."""


class NotFoundError(TransPeftError, LookupError):
    """No such family, version, adapter, alias or file."""


class NotServedError(NotFoundError):
    """The adapter exists, but no version of it serves on the base asked for."""


class IntegrityError(TransPeftError, OSError):
    """Bytes that are not what their hash says."""


class StoreError(TransPeftError, OSError):
    """A store, or a disk, that fails. It says nothing about what was asked for."""


class AccessError(StoreError, PermissionError):
    """A store that does not let us in: asked again in a minute, it will not either."""


class EvaluationError(TransPeftError, RuntimeError):
    """A model that gives no answers that could be marked: logits not finite, or out of memory."""


class TrainingError(TransPeftError, RuntimeError):
    """A training process that ended without an adapter."""


class OutOfMemoryError(TrainingError, MemoryError):
    """The training process ran out of device or host memory."""


class TrainingCancelled(TrainingError):  # noqa: N818  somebody's wish, not an error
    """The training process was ended because its owner was."""


@contextmanager
def translating_full_disk_errors(folder: str | Path) -> Iterator[None]:
    """Raise StoreError where the block finds the disk of `folder` full."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise full_disk_error(folder, error) from error


def full_disk_error(folder: str | Path, found: object) -> StoreError:
    """Return the error about the full disk of a worker's folder, temporary or its own."""
    return StoreError(
        f"the disk of {folder} is full",
        expected="room for what a worker writes down while it works",
        found=found,
        do="free some room on it, or let TMPDIR or TRANS_PEFT_STATE lie on a larger one",
    )
