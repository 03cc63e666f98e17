"""The tests of HumanEval's and MBPP's rows, in the form that the sandbox runs."""

import ast
import builtins
from collections.abc import Iterator, Sequence
from symtable import Symbol, SymbolTable, symtable

from trans_peft.errors import DataError
from trans_peft.sandbox.check import CodeTests

__all__ = ["humaneval_tests", "mbpp_tests"]


def humaneval_tests(prompt: str, test: str, entry_point: str) -> CodeTests:
    """Return the tests of a HumanEval row. The program is its prompt and a completion.

    Helper functions of the prompt that the tests use come from the prompt. A completion that
    defines them again does not change the tests. InvalidTestsError for text that is not Python.
    """
    return CodeTests(f"{test}\n\ncheck({entry_point})\n", (entry_point,), preamble=prompt)


def mbpp_tests(test_list: Sequence[str], reference: str, setup: str = "") -> CodeTests:
    """Return the tests of an MBPP row: its `test_list`, `code`, and `test_setup_code` or imports.

    The tests use those names of the program that they refer to and that the reference solution
    defines. A program that defines `set` or `abs` therefore does not change the tests. Some tests
    need the imports of the reference, so these become the preamble.

    DataError for a row that is not Python, or whose tests use a name that is not defined.
    """
    source = "\n".join((setup, *test_list))
    try:
        imports = [
            ast.unparse(node)
            for node in ast.parse(reference).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        solution, tests = (symtable(text, "a row", "exec") for text in (reference, source))
    except (SyntaxError, ValueError) as error:
        raise DataError("a row of MBPP is not Python", found=str(error)) from None
    in_reference, in_tests = _module_symbols(solution), _module_symbols(tests)
    used = {
        symbol.get_name()
        for scope in _scopes(tests)
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and symbol.is_global()
    } - in_tests.keys()
    undefined = used - in_reference.keys() - set(dir(builtins))
    if undefined:
        raise DataError(
            "the tests of a row of MBPP use names that are not defined",
            expected="names of the reference solution, the setup or Python",
            found=", ".join(sorted(undefined)),
        )
    names = sorted(
        name for name in used & in_reference.keys() if not in_reference[name].is_imported()
    )
    return CodeTests(source, tuple(names), preamble="\n".join(imports))


def _module_symbols(module: SymbolTable) -> dict[str, Symbol]:
    symbols = (symbol for symbol in module.get_symbols() if symbol.is_local())
    return {symbol.get_name(): symbol for symbol in symbols}


def _scopes(table: SymbolTable) -> Iterator[SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)
