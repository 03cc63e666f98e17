"""The child's side of one isolated call: limits, the call itself, and its answer as JSON."""

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
from trans_peft.isolation.limits import Limits, is_out_of_memory

__all__ = ["run"]


def run(call: socket.socket, stderr: int, header: dict[str, Any]) -> NoReturn:
    """Run the call that `call` describes under its limits, answer there, and end this process."""
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (stderr, 1), (stderr, 2)):
            os.dup2(source, target)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is too large is an OSError
        with suppress(OSError):
            os.chdir(header["folder"])
        _prefer_as_victim()
        with call, call.makefile("rwb") as stream:
            size = int.from_bytes(stream.read(8), "big")
            request = stream.read(size)
            answer = json.dumps(_answer(request, Limits(**header["limits"]))).encode()
            if len(answer) > header["limits"]["result_bytes"]:
                answer = json.dumps({"limit": "result", "found": len(answer)}).encode()
            stream.write(len(answer).to_bytes(8, "big") + answer)
            stream.flush()
    except MemoryError:
        os._exit(3)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _answer(request: bytes, limits: Limits) -> dict[str, Any]:
    limits.apply()
    try:
        function, args = pickle.loads(request)  # noqa: S301  the parent process wrote it
        result = function(*args)
        _check_plain(result)
        return {"result": result}
    except TransPeftError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except BaseException as error:  # a panic in Rust is no Exception
        if is_out_of_memory(error):
            return {"limit": "memory"}
        return {"other": type(error).__name__, "text": str(error)[:2000]}


def _check_plain(value: Any) -> None:
    """Raise TypeError for a result that JSON would change or cannot hold."""
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


def _prefer_as_victim() -> None:
    """Let a kernel that is out of memory end this process before any other."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
