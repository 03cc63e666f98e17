"""The child's side of one isolated call: sets the limits, calls the function, sends the result."""

import json
import os
import pickle
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from trans_peft.errors import TransPeftError
from trans_peft.isolation.limits import CallLimits, is_memory_limit_error

__all__ = ["run"]


def run(call: socket.socket, stderr: int, header: dict[str, Any]) -> NoReturn:
    """Execute the request on the socket `call` under its limits, reply there, and end this process.

    The exit code is 3 if memory ran out, and 1 after any other unexpected exception.
    """
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (stderr, 1), (stderr, 2)):
            os.dup2(source, target)
        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # exceeding the file size limit raises OSError
        with suppress(OSError):
            os.chdir(header["folder"])
        _prefer_for_oom_kill()
        with call, call.makefile("rwb") as stream:
            size = int.from_bytes(stream.read(8), "big")
            request = stream.read(size)
            reply = json.dumps(_execute(request, CallLimits(**header["limits"]))).encode()
            if len(reply) > header["limits"]["result_bytes"]:
                reply = json.dumps({"limit": "result", "found": len(reply)}).encode()
            stream.write(len(reply).to_bytes(8, "big") + reply)
            stream.flush()
    except MemoryError:
        os._exit(3)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _execute(request: bytes, limits: CallLimits) -> dict[str, Any]:
    limits.apply()
    try:
        function, args = pickle.loads(request)  # noqa: S301  the parent process wrote it
        result = function(*args)
        _check_plain(result)
        return {"result": result}
    except TransPeftError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except BaseException as error:  # a panic in Rust is not an Exception
        if is_memory_limit_error(error):
            return {"limit": "memory"}
        return {"other": type(error).__name__, "text": str(error)[:2000]}


def _check_plain(value: Any) -> None:
    """Raise TypeError for a result that JSON cannot represent unchanged."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"isolated calls return dicts with str keys, not {key!r}")
            _check_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(f"isolated calls return plain JSON values, not {type(value).__name__}")


def _prefer_for_oom_kill() -> None:
    """Let the kernel kill this process before all others if the machine runs out of memory."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
