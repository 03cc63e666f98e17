"""The process in which math-verify compares answers: one JSON question a line, one answer a line.

Started by `mathematics`. Before each comparison the operating system is told how much processor
time the process may have used when it is through; a process that needs more is killed there.
"""

import json
import logging
import re
import resource
import sys
import time
from contextlib import suppress
from typing import Any

_MEMORY_BYTES = 4 * 2**30
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")


def main() -> None:
    """Answer questions until there are no more."""
    logging.disable(logging.CRITICAL)  # math-verify warns that nothing would limit its time
    from math_verify import verify

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # not every system limits it
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    _say("ready")
    for line in sys.stdin:
        question = json.loads(line)
        limit_s = int(time.process_time()) + 1 + question["cpu_limit_s"]
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        reference, answer = _parsed(question["reference"]), _parsed(question["answer"])
        equal = verify(reference, answer, timeout_seconds=None)
        _say(json.dumps(bool(equal)))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _parsed(text: str) -> list[Any]:
    """Return what math-verify reads in a final answer: as a formula, and if it has words, as text.

    A formula without dollar signs would be read as its first number; a number with its unit
    ("18 dollars") would be read as a product of letters.
    """
    from math_verify import parse

    read = parse(f"${text}$", parsing_timeout=None)
    return read + parse(text, parsing_timeout=None) if _WORD.search(text) else read


if __name__ == "__main__":
    main()
