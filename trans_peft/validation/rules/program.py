"""Whether a program that a model wrote passes its tests: what of it counts, and the sandbox.

What counts is what evalplus keeps (`evalplus.sanitize`): of the prompt and its completion together
the longest stretch of lines that is Python, and of that the imports and whatever the tested names
need. Print statements, examples and a half-written last function do not count. Written with `ast`
instead of tree-sitter, it also keeps what evalplus drops to a program's harm: decorated functions,
and helpers without a `return`.

The tests come with the reference (`trans_peft.data.templates`), the verdict from
`trans_peft.validation.sandbox.check`. It hangs on Python's version, so the suite names that.
"""

import ast
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from trans_peft.errors import DataError, InvalidSpecError
from trans_peft.validation.rules.longest_python import longest_python, parsed
from trans_peft.validation.sandbox.check import CodeTests, check_code, humaneval_tests, mbpp_tests
from trans_peft.validation.sandbox.guards import Guard, guards_named, refuse
from trans_peft.validation.sandbox.limits import Limits
from trans_peft.validation.sandbox.run import missing_guards

__all__ = ["PYTHON", "code", "extract"]

# Processor time decides, so that a busy machine changes no result; a program that waits is cut off.
_LIMITS = Limits(cpu_s=10.0, wall_s=120.0)

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
"""The Python that programs are run by here, as `code` names it."""


def code(setting: str, may_lack: Collection[str] = frozenset()) -> Callable[[str, str], float]:
    """Return the rule under which the prompt and the answer together pass the reference's tests.

    `setting` is a suite's: the Python that runs the programs, and after it the guards of the
    sandbox without which the suite's author would run them (`python3.11`,
    `python3.11+network+user`). `may_lack` is the worker's: the guards that its operator lets it
    lack. A guard may be missing where both name it, so a suite can demand more guards than the
    operator and never fewer. InvalidSpecError where this is another Python or there is no such
    guard. The rule raises EvaluationError where this machine lacks a guard that may not be missing.
    """
    python, *names = setting.split("+")
    if python != PYTHON or not {*names} <= {*map(str, Guard)}:
        raise InvalidSpecError(
            "programs cannot be run as the suite asks for it",
            expected=f"code:{PYTHON}, and after a + each guard that may be missing "
            f"({', '.join(Guard)})",
            found=f"code:{setting}",
            do="evaluate where that Python is, or evaluate all sides again on this one",
        )
    allowed = guards_named(names) & guards_named(may_lack)

    def passes(answer: str, reference: str) -> float:
        prompt, tests = _asked(reference)
        refuse(missing_guards(), allowed)
        if not answer.strip():
            return 0.0
        program = extract(prompt + answer, tests.names)
        result = check_code(program, tests, limits=_LIMITS, allow_missing=allowed)
        return 100.0 if result.passed else 0.0

    return passes


def _asked(reference: str) -> tuple[str, CodeTests]:
    try:
        row: dict[str, Any] = json.loads(reference)
        prompt = row.pop("prompt")
        tests = humaneval_tests(prompt, **row) if "entry_point" in row else mbpp_tests(**row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "the reference holds no tests of a program",
            expected="what the templates humaneval, mbpp and mbpp_plus write",
            found=reference,
        ) from error
    return prompt, tests


def extract(text: str, names: Sequence[str]) -> str:
    """Return what of a text defines the names, as Python; empty where no two lines are Python.

    Where a name is defined twice, the first definition with a `return` counts, or the first. Where
    none of the names is defined, all that is Python is returned.
    """
    stretch = longest_python(text.replace("\t", "    ").split("\n"))
    module = parsed(stretch)
    if module is None:
        return ""
    imports = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    defined: dict[str, ast.stmt] = {}
    whole = set[str]()  # names whose definition is no stub
    for node in module.body:
        names_here = [name for name in _defines(node) if name not in whole]
        stub = bool(names_here) and _is_stub(node)
        for name in names_here:
            if not stub:
                whole.add(name)
                defined[name] = node
            else:
                defined.setdefault(name, node)
    needed, asked = set[str](), [name for name in names if name in defined]
    if not asked:
        return stretch
    while asked:
        name = asked.pop()
        if name in defined and name not in needed:
            needed.add(name)
            asked += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    kept = {id(defined[name]) for name in needed} | set(map(id, imports))
    try:
        body = [ast.unparse(node) for node in module.body if id(node) in kept]
    except RecursionError:  # nested too deeply to be written again
        return stretch
    return "\n".join(body)


def _defines(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _is_stub(node: ast.stmt) -> bool:
    function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return function and not any(isinstance(part, ast.Return) for part in ast.walk(node))
