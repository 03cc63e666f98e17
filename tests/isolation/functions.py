"""Functions that the tests call in a child process."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from trans_peft import errors


def echo(*values: Any) -> Any:
    return list(values)


def matches_forever() -> bool:
    return bool(re.match(r"(([a-z_.0-9]+)+)+X", "a" * 64))


def loops_in_threads() -> None:
    for _ in range(4):
        threading.Thread(target=matches_forever).start()


def sleeps() -> None:
    time.sleep(600)


def ignores_signals() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def allocates(size: int) -> int:
    return len(bytearray(size))


def allocates_in_small_steps(size: int) -> int:
    kept = []
    while len(kept) * 1000 < size:
        kept.append(os.urandom(1000))
    return len(kept)


def allocates_with_torch(size: int) -> int:
    import torch

    return int(torch.ones(size, dtype=torch.uint8).sum())


def adds_with_torch(size: int) -> int:
    import torch

    return int(torch.ones(size, dtype=torch.int64).sum())


def encodes_huge(size: int) -> int:
    """Let three Replace rules of the tokenizers library multiply the length of a text."""
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    grow = normalizers.Replace("a", "a" * 1500)
    tokenizer.normalizer = normalizers.Sequence([grow, grow, grow])
    return len(tokenizer.encode("a" * size).ids)


def raises(name: str, text: str) -> None:
    kind = getattr(errors, name, None) or getattr(__import__("builtins"), name)
    raise kind(text)


def recurses(depth: int) -> int:
    return recurses(depth + 1)


def overflows_the_stack_of_c() -> None:
    sys.setrecursionlimit(10**9)
    value: Any = []
    for _ in range(10**6):
        value = [value]
    repr(value)


def dies(number: int) -> None:
    os.kill(os.getpid(), number)


def reads_null() -> None:
    ctypes.string_at(0)


def exits(code: int) -> None:
    os._exit(code)


def returns(kind: str) -> Any:
    return {
        "object": object(),
        "set": {1},
        "int keys": {1: 2},
        "bytes": b"",
        "deep": _deep(100_000),
        "large": "x" * 5000,
    }[kind]


def _deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def writes(path: str, size: int) -> None:
    Path(path).write_bytes(b"x" * size)


def sends_invalid_reply(path: str) -> None:
    """Write an invalid reply to every open socket, then end."""
    for fd in range(3, 64):
        try:
            os.write(fd, path.encode("latin-1"))
        except OSError:
            continue
    os._exit(0)


def environment() -> dict[str, str]:
    return dict(os.environ)


def folder() -> str:
    return str(Path.cwd())


def pids() -> list[int]:
    return [os.getpid(), os.getppid()]


def reports_and_sleeps(path: str) -> None:
    Path(path).write_text(f"{os.getpid()} {os.getppid()}\n")
    time.sleep(600)
