"""The errors of the sandbox."""

__all__ = ["InvalidLimitsError", "InvalidTestsError", "SandboxError", "SandboxFailedError"]


class SandboxError(Exception):
    """Base class of the sandbox's errors.

    Attributes:
        problem: what is wrong.
        expected: what should have been there.
        found: what was there.
        do: what to do about it.
    """

    def __init__(
        self, problem: str, *, expected: object = None, found: object = None, do: str | None = None
    ) -> None:
        self.problem, self.expected, self.found, self.do = problem, expected, found, do
        parts = {"expected: ": expected, "found:    ": found, "do:       ": do}
        lines = [f"  {name}{value}" for name, value in parts.items() if value is not None]
        super().__init__("\n".join([problem, *lines]))


class InvalidLimitsError(SandboxError, ValueError):
    """Limits under which no program can run."""


class InvalidTestsError(SandboxError, ValueError):
    """Tests that are not Python, or that use nothing of the program."""


class SandboxFailedError(SandboxError, RuntimeError):
    """The sandbox itself did not start or failed, whatever the program in it did."""
