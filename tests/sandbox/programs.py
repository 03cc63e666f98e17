"""Limits and helpers with which the tests run programs."""

from dataclasses import replace
from textwrap import dedent

from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.run import RunResult
from trans_peft.sandbox.runner import select_runner

MEBIBYTE = 1 << 20
LIMITS = SandboxLimits(wall_s=4, cpu_s=1, memory_bytes=128 * MEBIBYTE, scratch_bytes=2 * MEBIBYTE)
SHORT_WALL_LIMIT = replace(LIMITS, wall_s=0.5)


def run(program: str, limits: SandboxLimits = LIMITS) -> RunResult:
    """Run an indented program in a sandbox with all guards."""
    return select_runner().run(dedent(program), limits)


def attempts(*statements: str, imports: str = "os") -> str:
    """Return a program that tries each statement and prints those that raised nothing."""
    tries = [
        f"try:\n    {statement}\n    print({statement!r})\nexcept BaseException:\n    pass"
        for statement in statements
    ]
    return "\n".join((f"import {imports}", *tries, "print('tried')"))
