"""Choose how programs are run on this machine: the `CodeRunner` protocol and its implementation.

`NamespaceRunner` is the only implementation. Decision record 0082 says why, and what another one
needs.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from trans_peft.sandbox.check import CodeResult, CodeTests, check_program
from trans_peft.sandbox.guards import Guard, MissingGuardsError, require_guards
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.run import RunResult, missing_guards, run_script

__all__ = ["RUNNERS", "CodeRunner", "NamespaceRunner", "select_runner"]


class CodeRunner(Protocol):
    """Runs Python programs, isolated from this machine.

    Each call runs in new processes, all of which have ended when it returns. Both methods raise
    MissingGuardsError before they run anything if a guard is missing that the runner was not
    allowed to miss.
    """

    @property
    def guards(self) -> frozenset[Guard]:
        """The guards that hold on this machine, found by trying them."""
        ...

    @property
    def missing(self) -> Mapping[Guard, str]:
        """All other guards, each with the reason why it does not hold."""
        ...

    def run(self, program: str, limits: SandboxLimits) -> RunResult:
        """Run the text of a program as a script and return its output."""
        ...

    def check(self, program: str, tests: CodeTests, limits: SandboxLimits) -> CodeResult:
        """Run tests against the text of a program, in a process that the program cannot reach."""
        ...


@dataclass(frozen=True)
class NamespaceRunner:
    """Runs programs in Linux namespaces with a seccomp filter, without any installed program."""

    allow_missing: Set[Guard] = frozenset()

    @property
    def guards(self) -> frozenset[Guard]:
        """All guards that the kernel accepted when the first sandbox of this process started."""
        return frozenset(Guard) - self.missing.keys()

    @property
    def missing(self) -> Mapping[Guard, str]:
        """The other guards, each with the kernel's error."""
        return missing_guards()

    def run(self, program: str, limits: SandboxLimits) -> RunResult:
        """Run the program in one sandbox."""
        return run_script(program, limits, self.allow_missing)

    def check(self, program: str, tests: CodeTests, limits: SandboxLimits) -> CodeResult:
        """Run the tests in one sandbox and the program in another."""
        return check_program(program, tests, limits, self.allow_missing)


RUNNERS: tuple[Callable[[Set[Guard]], CodeRunner], ...] = (NamespaceRunner,)
"""The implementations, in order of preference. Each takes the guards that may be missing."""


def select_runner(
    allow_missing: Set[Guard] = frozenset(),
    runners: Sequence[Callable[[Set[Guard]], CodeRunner]] = RUNNERS,
) -> CodeRunner:
    """Return the first runner that lacks no guard outside `allow_missing` on this machine.

    MissingGuardsError, with the guards of the runner that lacks the fewest, if there is none.
    """
    errors: list[MissingGuardsError] = []
    for make_runner in runners:
        runner = make_runner(allow_missing)
        try:
            require_guards(runner.missing, allow_missing)
        except MissingGuardsError as error:
            errors.append(error)
        else:
            return runner
    raise min(errors, key=lambda error: len(error.missing))
