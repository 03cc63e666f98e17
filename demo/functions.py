"""Tasks `returns` and `docstrings`: predict parts of a function from its source.

`returns`: from the source without its return annotation to the annotation, one of eight.
`docstrings`: from the source without its docstring to the first line of the docstring, which is
compared by chrF.
"""

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from demo.sources import SourceFile, words
from demo.tasks import Example

__all__ = ["ANNOTATIONS", "docstrings", "returns"]

ANNOTATIONS = ("None", "bool", "dict[str, Any]", "float", "int", "list[str]", "str", "torch.Tensor")
"""The eight most frequent annotations whose meaning does not depend on the package."""

_SOURCE_LENGTH = 240  # characters shown of a function: about 70 tokens
_LINE_LENGTH = range(15, 61)  # characters of a docstring's first line


@dataclass(frozen=True)
class _Function:
    source: str  # head and body, without docstring and return annotation
    annotation: str
    docstring: str


def returns(file: SourceFile) -> Iterator[Example]:
    """Yield each function with one of the ANNOTATIONS."""
    for function in _functions(file):
        name = function.annotation.strip("'\"")
        name = "torch.Tensor" if name == "Tensor" else name
        if name in ANNOTATIONS:
            prompt = f"{function.source}\n# returns:"
            yield Example(prompt, f" {name}\n", text=function.source, label=name)


def docstrings(file: SourceFile) -> Iterator[Example]:
    """Yield each function whose docstring starts with one complete short sentence."""
    for function in _functions(file):
        line = function.docstring.split("\n")[0].strip()
        if len(line) in _LINE_LENGTH and line.endswith(".") and len(words(line)) >= 3:
            yield Example(f"{function.source}\n# what it does:", f" {line}\n", text=line)


def _functions(file: SourceFile) -> Iterator[_Function]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escape sequences in the source
            tree = ast.parse(file.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.name) < 3:
            continue
        docstring = ast.get_docstring(node) or ""
        body = node.body[1:] if docstring else node.body
        if not body:
            continue
        annotation = ast.unparse(node.returns) if node.returns else ""
        head = f"def {node.name}({ast.unparse(node.args)}):"
        text = ast.unparse(ast.Module(body[:6], []))
        shown = "\n    ".join([head, *text.splitlines()])[:_SOURCE_LENGTH]
        yield _Function(shown, annotation, docstring)
