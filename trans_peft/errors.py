"""The exceptions of this library, and helpers to raise them.

    TransPeftError
    ├── InvalidSpecError      (ValueError)    a recipe, spec, suite or policy that cannot work
    ├── DataError             (ValueError)    rows of data that cannot be used; lists all of them
    ├── UploadError           (ValueError)    a base upload that is refused; lists all reasons
    ├── AdapterError          (ValueError)    a PEFT folder that cannot be used
    ├── ContentError          (ValueError)    untrusted content that cannot be evaluated
    │   └── LimitExceededError                it exceeds a limit on time, memory or size
    ├── IsolationError        (RuntimeError)  a child process was killed or did not start: retry
    ├── UnsupportedModelError (TypeError)     a model of an architecture that is not supported
    ├── NotFoundError         (LookupError)   no such family, version, adapter or file
    │   └── NotServedError                    no version of the adapter serves on that base
    ├── IntegrityError        (OSError)       content does not match its hash or ETag
    ├── StoreError            (OSError)       a store, a server or a disk fails
    │   ├── AccessError       (PermissionError)   it denies access: do not retry
    │   └── BaseUnreadableError               a base version cannot be read: repair it first
    ├── WorkerError           (RuntimeError)  this worker cannot do it: correct it, or use another
    ├── EvaluationError       (RuntimeError)  a model produced no answers that can be scored
    ├── EngineUnavailableError (RuntimeError) an engine is not installed, or cannot run here
    └── TrainingError         (RuntimeError)  a training process ended without an adapter
        ├── OutOfMemoryError  (MemoryError)
        └── TrainingCancelled

Each class also inherits from the builtin in parentheses, so that callers can catch that. A verdict
about an adapter is a value (`trans_peft.domain.evaluation.Verdict`), never an exception.
"""

import difflib
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "AccessError",
    "AdapterError",
    "BaseUnreadableError",
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
    "WorkerError",
    "closest",
    "full_disk_error",
    "is_full_disk",
    "listed",
    "listed_lines",
    "map_exceptions",
    "replacing_paths_in_errors",
    "translating_full_disk_errors",
    "unknown_name",
]


def listed(values: Sequence[str], count: int = 5) -> str:
    """Return the first `count` values, separated by commas, and how many others there are.

    Example: `listed(["a", "b", "c"], 2)` is "a, b and 1 more".
    """
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(values[:count]) + more


def listed_lines(values: Sequence[str], count: int) -> list[str]:
    """Return the first `count` values and, if there are others, a last line "and N more"."""
    more = [f"and {len(values) - count} more"] if len(values) > count else []
    return [*values[:count], *more]


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names, those that are spelled most like `name` first."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return sorted(known, key=lambda other: (-likeness(other), other))


@contextmanager
def map_exceptions(
    table: Mapping[type[Exception], Callable[[Any], "TransPeftError | None"]],
) -> Iterator[None]:
    """Translate exceptions of the block: raise what the first entry for their type returns.

    An exception passes unchanged if it is a TransPeftError already, if no entry matches its type,
    or if the entry returns None.
    """
    try:
        yield
    except TransPeftError:
        raise
    except Exception as error:
        for kind, translate in table.items():
            if isinstance(error, kind):
                translated = translate(error)
                if translated is None:
                    raise
                raise translated from error
        raise


@contextmanager
def replacing_paths_in_errors(names: Mapping[Path, str]) -> Iterator[None]:
    """Replace paths by names in the messages of the block's errors.

    A temporary copy of a folder is then reported under the name of the folder that was copied.
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
    """Base class. The message states the problem, what was expected and found, and what to do.

    The parts are joined into one text, so that the error can be pickled between processes.
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
    """A PEFT folder that cannot be used."""


class ContentError(TransPeftError, ValueError):
    """Untrusted content (a tokenizer, a template, a pattern, a file) that cannot be evaluated."""


class LimitExceededError(ContentError):
    """Evaluating untrusted content exceeds a limit on time, memory or size."""


class IsolationError(TransPeftError, RuntimeError):
    """A child process was killed from outside or did not start. Its content may be valid."""


class UnsupportedModelError(TransPeftError, TypeError):
    """A model of an architecture that this library does not support."""


class NotFoundError(TransPeftError, LookupError):
    """No such family, version, adapter, alias or file."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> NotFoundError:
    """Return the error for a name that no `what` ("adapter") has, with the names most like it."""
    names = closest(name, known)
    return NotFoundError(
        f"there is no {what} {name!r}",
        expected=f"one of {listed(names)}" if names else f"the name of an existing {what}",
        found=None if names else f"no {what} at all",
        do="check the spelling, and that MLFLOW_TRACKING_URI names the right server",
    )


class NotServedError(NotFoundError):
    """The adapter exists, but no version of it serves on the requested base."""


class IntegrityError(TransPeftError, OSError):
    """Content does not match its recorded hash or ETag, or cannot be decoded."""


class StoreError(TransPeftError, OSError):
    """A store, a server or a disk fails. The request itself may be valid: retry later."""


class AccessError(StoreError, PermissionError):
    """A store or server denies access. Retrying does not help."""


class BaseUnreadableError(StoreError):
    """The record or the files of a base version cannot be read. No adapter is at fault."""


class WorkerError(TransPeftError, RuntimeError):
    """This worker cannot do what is asked: its code is older, or it lacks GPUs or an engine."""


class EvaluationError(TransPeftError, RuntimeError):
    """A model produced no answers that can be scored: logits not finite, or out of memory."""


class TrainingError(TransPeftError, RuntimeError):
    """A training process that ended without an adapter."""


class OutOfMemoryError(TrainingError, MemoryError):
    """The training process ran out of device or host memory."""


class TrainingCancelled(TrainingError):  # noqa: N818  a cancellation is not an error
    """The training process was stopped because the process that started it ended."""


def translating_full_disk_errors(folder: str | Path) -> AbstractContextManager[None]:
    """Raise StoreError if the block fails because the disk of `folder` is full."""
    return map_exceptions(
        {Exception: lambda error: full_disk_error(folder, error) if is_full_disk(error) else None}
    )


def is_full_disk(error: Exception) -> bool:
    """Whether the operating system reports a full disk or an exhausted quota.

    `shutil.copytree` and libraries in Rust, such as safetensors, raise errors of their own, with
    the number in the text.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in full
    return any(
        f"[Errno {number}]" in str(error) or f"(os error {number})" in str(error) for number in full
    )


def full_disk_error(folder: str | Path, found: object) -> StoreError:
    """Return the error for a full disk. `folder` is a temporary or a state folder of a worker."""
    return StoreError(
        f"the disk of {folder} is full",
        expected="free space for temporary files and for the state of the worker",
        found=found,
        do="free space on it, or set TMPDIR or TRANS_PEFT_STATE to a folder on a larger disk",
    )
