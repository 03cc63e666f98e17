"""The scoring rule `code`: a program that a model wrote passes its tests in the sandbox.

The rule keeps what evalplus keeps (`evalplus.sanitize`): of the prompt and its completion, the
longest sequence of lines that is Python, and of that the imports and the definitions that the
tested names need. Print statements, examples and an unfinished last function are dropped. This
implementation uses `ast` instead of tree-sitter. Unlike evalplus, it also keeps decorated functions
and helper functions without a `return`, which a program may need.

The tests come with the reference (`trans_peft.data.templates`). The verdict comes from
`trans_peft.sandbox.check` and depends on Python's version, so that a suite names the version.
"""

import ast
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trans_peft.domain.bounds import MAX_PROGRAM_PROMPT_CHARACTERS
from trans_peft.domain.excerpts import excerpt
from trans_peft.domain.untrusted_json import parse_json
from trans_peft.errors import DataError, EvaluationError, InvalidSpecError
from trans_peft.sandbox.check import CodeTests
from trans_peft.sandbox.errors import InvalidTestsError, SandboxError
from trans_peft.sandbox.guards import MACHINE_REQUIREMENTS, Guard, MissingGuardsError
from trans_peft.sandbox.limits import SandboxLimits
from trans_peft.sandbox.runner import select_runner
from trans_peft.validation.guards import guards_named
from trans_peft.validation.rules.longest_python import longest_python, parsed
from trans_peft.validation.rules.program_tests import humaneval_tests, mbpp_tests

__all__ = ["PYTHON", "code", "extract"]

# Processor time decides, so that a busy machine changes no result. The wall limit ends programs
# that wait.
_LIMITS = SandboxLimits(cpu_s=10.0, wall_s=120.0)
_MAX_ERROR_CHARACTERS = 500

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
"""The version of Python that runs programs here, in the form that `code` expects."""


def code(parameter: str, may_lack: Collection[str] = frozenset()) -> Callable[[str, str], float]:
    """Return the rule that gives 100 to a program that passes its tests, and 0 to others.

    The program is the prompt and the answer together. The tests are in the reference. `parameter`
    comes from the suite: the version of Python, and after it the guards that the suite's author
    allows to be missing (`python3.11`, `python3.11+network+user`). `may_lack` comes from the
    operator of the worker: the guards that the worker may lack. A guard may be missing only if both
    name it, so that a suite can demand more guards than the operator, and never fewer.

    InvalidSpecError for another version of Python or an unknown guard. The rule raises
    EvaluationError if this machine lacks a guard that must not be missing, and DataError for a
    reference without usable tests.
    """
    python, *names = parameter.split("+")
    if python != PYTHON or not {*names} <= {*map(str, Guard)}:
        raise InvalidSpecError(
            "this worker cannot run programs with the suite's settings",
            expected=f"code:{PYTHON}, and after a + each guard that may be missing "
            f"({', '.join(Guard)})",
            found=excerpt(f"code:{parameter}"),
            do="evaluate on a worker with that version of Python, or change the suite and evaluate "
            "all adapters and bases again",
        )
    allowed = guards_named(names) & guards_named(may_lack)

    def passes(answer: str, reference: str) -> float:
        prompt, tests = _parse_reference(reference)
        with _translating_sandbox_errors():
            runner = select_runner(allowed)
            if not answer.strip():
                return 0.0
            program = extract(prompt + answer, tests.names)
            return 100.0 if runner.check(program, tests, _LIMITS).passed else 0.0

    return passes


@contextmanager
def _translating_sandbox_errors() -> Iterator[None]:
    """Raise EvaluationError for errors of the sandbox."""
    try:
        yield
    except MissingGuardsError as error:
        guards = sorted({*error.missing, *error.allowed})
        raise EvaluationError(
            error.problem,
            expected=error.expected,
            found=error.found,
            do=f"{MACHINE_REQUIREMENTS}. On a machine that is discarded afterwards, the operator "
            f"may set TRANS_PEFT_SANDBOX_MAY_LACK={','.join(guards)} on the worker, if the suite "
            f"names these guards too: code:{'+'.join([PYTHON, *guards])}",
        ) from error
    except SandboxError as error:
        raise EvaluationError(str(error)) from error


def _parse_reference(reference: str) -> tuple[str, CodeTests]:
    """Return the prompt and the tests that a reference contains."""
    try:
        row: dict[str, Any] = parse_json(reference)
        prompt = row.pop("prompt")
        if len(prompt) > MAX_PROGRAM_PROMPT_CHARACTERS:
            raise DataError(
                "the prompt in the reference is too long",
                expected=f"at most {MAX_PROGRAM_PROMPT_CHARACTERS} characters",
                found=f"{len(prompt)} characters",
            )
        tests = humaneval_tests(prompt, **row) if "entry_point" in row else mbpp_tests(**row)
    except InvalidTestsError as error:
        text = str(error)
        cut = text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[:_MAX_ERROR_CHARACTERS]}..."
        raise DataError(cut) from error
    except (AttributeError, KeyError, MemoryError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "the reference contains no tests of a program",
            expected="a reference that the template humaneval, mbpp or mbpp_plus wrote",
            found=excerpt(reference),
        ) from error
    return prompt, tests


def extract(text: str, names: Sequence[str]) -> str:
    """Return the Python code of a text that defines the names, with everything that it uses.

    Of several definitions of a name, the first with a `return` is taken, or the first. If the text
    defines none of the names, the result is all of its Python code. If no two lines of the text are
    Python, the result is empty.
    """
    source = longest_python(text.replace("\t", "    ").split("\n"))
    module = parsed(source)
    if module is None:
        return ""
    imports = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    definitions: dict[str, ast.stmt] = {}
    complete = set[str]()  # names with a definition that is not a stub
    for node in module.body:
        new_names = [name for name in _defined_names(node) if name not in complete]
        is_stub = bool(new_names) and _is_stub(node)
        for name in new_names:
            if is_stub:
                definitions.setdefault(name, node)
            else:
                complete.add(name)
                definitions[name] = node
    needed, queue = set[str](), [name for name in names if name in definitions]
    if not queue:
        return source
    while queue:
        name = queue.pop()
        if name in definitions and name not in needed:
            needed.add(name)
            nodes = ast.walk(definitions[name])
            queue += [node.id for node in nodes if isinstance(node, ast.Name)]
    kept = {id(definitions[name]) for name in needed} | set(map(id, imports))
    try:
        body = [ast.unparse(node) for node in module.body if id(node) in kept]
    except RecursionError:  # nested too deeply for ast.unparse
        return source
    return "\n".join(body)


def _defined_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _is_stub(node: ast.stmt) -> bool:
    function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return function and not any(isinstance(part, ast.Return) for part in ast.walk(node))
