"""Tasks `returns`, `signatures` and `docstrings`: predict parts of a function from its source.

`returns`: from the source without its return annotation to the annotation, one of eight.
`signatures`: the same from the first line alone.
`docstrings`: from the source without its docstring to the first line of the docstring, which is
compared by chrF.
"""

import ast
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from demo.sources import SourceFile, words
from demo.tasks import Example

__all__ = ["ANNOTATIONS", "docstrings", "returns", "signatures"]

ANNOTATIONS = ("None", "bool", "dict[str, Any]", "float", "int", "list[str]", "str", "torch.Tensor")
"""The eight most frequent annotations whose meaning does not depend on the package."""

_SOURCE_LENGTH = 240  # characters shown of a function: about 70 tokens
_BLOCKS = frozenset({"body", "handlers", "orelse", "finalbody", "cases"})
_HEAD_LENGTH = 120  # characters of a function's first line: about 40 tokens
_LINE_LENGTH = range(15, 61)  # characters of a docstring's first line


@dataclass(frozen=True)
class _Function:
    node: ast.FunctionDef
    docstring: str

    @property
    def annotation(self) -> str:
        """The return annotation if it is one of the ANNOTATIONS, else an empty string."""
        if self.node.returns is None:
            return ""
        name = ast.unparse(self.node.returns).strip("'\"")
        name = "torch.Tensor" if name == "Tensor" else name
        return name if name in ANNOTATIONS else ""

    @property
    def head(self) -> str:
        """The first line, without the return annotation."""
        return f"def {self.node.name}({ast.unparse(self.node.args)}):"

    @property
    def source(self) -> str:
        """Head and body, without docstring and return annotation."""
        body = self.node.body[1:] if self.docstring else self.node.body
        text = ast.unparse(ast.Module(body[:6], []))
        return "\n    ".join([self.head, *text.splitlines()])[:_SOURCE_LENGTH]


def returns(file: SourceFile) -> Iterator[Example]:
    """Yield each function with one of the ANNOTATIONS."""
    for function in _annotated_functions(file):
        if name := function.annotation:
            source = function.source
            yield Example(f"{source}\n# returns:", f" {name}\n", text=source, label=name)


def signatures(file: SourceFile) -> Iterator[Example]:
    """Yield the first line of each function with one of the ANNOTATIONS, if it is short."""
    for function in _annotated_functions(file):
        if (name := function.annotation) and len(head := function.head) <= _HEAD_LENGTH:
            yield Example(f"{head}\n# returns:", f" {name}\n", text=head, label=name)


def docstrings(file: SourceFile) -> Iterator[Example]:
    """Yield each function whose docstring starts with one complete short sentence."""
    for function in _functions(file):
        line = function.docstring.split("\n")[0].strip()
        if len(line) in _LINE_LENGTH and line.endswith(".") and len(words(line)) >= 3:
            yield Example(f"{function.source}\n# what it does:", f" {line}\n", text=line)


def _annotated_functions(file: SourceFile) -> Iterator[_Function]:
    return _functions(file) if "->" in file.text else iter(())  # parsing costs milliseconds


def _functions(file: SourceFile) -> Iterator[_Function]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escape sequences in the source
            tree = ast.parse(file.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in _statements(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.name) < 3:
            continue
        docstring = ast.get_docstring(node) or ""
        if len(node.body) > bool(docstring):
            yield _Function(node, docstring)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the statements in the order of `ast.walk`, without its expressions, which are many."""
    waiting = deque[ast.AST]([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in node._fields:
            if field in _BLOCKS:
                waiting.extend(getattr(node, field))
