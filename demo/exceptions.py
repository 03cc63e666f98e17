"""Task `exceptions`: predict the class of a raised exception from its message.

An example is `raise TypeError("unhashable type: 'list'")`. Placeholders of f-strings, `%` and
`.format` are shown as `{}`. The prompt is source code ("# message", "raise"), so that a base
without an adapter can answer it as well.
"""

import ast
import re
from collections.abc import Iterator

from demo.sources import SourceFile, words
from demo.tasks import Example

__all__ = ["CLASSES", "examples"]

CLASSES = (
    "AssertionError",
    "AttributeError",
    "ImportError",
    "KeyError",
    "NotImplementedError",
    "RuntimeError",
    "TypeError",
    "ValueError",
)
"""The eight most frequent builtin classes except `Exception`."""

_RAISE = re.compile(rf"^[ \t]*raise (?:{'|'.join(CLASSES)})\(", re.MULTILINE)
_LONGEST_STATEMENT = 2_000  # characters
_MESSAGE_LENGTH = range(12, 91)  # characters; about 25 tokens at most
_FIELD = re.compile(r"\{[^{}]*\}")
_PERCENT = re.compile(r"%(\(\w+\))?[-+# 0-9.]*[a-zA-Z]")


def examples(file: SourceFile) -> Iterator[Example]:
    """Yield each raised message of three words or more with its class."""
    for match in _RAISE.finditer(file.text):
        raised = _parse(file.text[match.start() : match.start() + _LONGEST_STATEMENT].lstrip())
        if raised is None or not raised.args:
            continue
        message = " ".join((_text(raised.args[0]) or "").split())
        if len(message) in _MESSAGE_LENGTH and len(words(message)) >= 3:
            name = raised.func.id if isinstance(raised.func, ast.Name) else ""
            yield Example(f"# {message}\nraise", f" {name}\n", text=message, label=name)


def _parse(source: str) -> ast.Call | None:
    """Parse the statement at the start of `source`, from as few lines as possible."""
    end = -1
    while (end := source.find("\n", end + 1)) != -1:
        try:
            statement = ast.parse(source[:end]).body[0]
        except (SyntaxError, ValueError):
            continue
        if isinstance(statement, ast.Raise) and isinstance(statement.exc, ast.Call):
            return statement.exc
        return None
    return None


def _text(node: ast.expr) -> str | None:
    """Return the message as it appears in the source; None if it is computed."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or "{}" for part in parts)
        case ast.BinOp(left=template, op=ast.Mod()):
            shown = _text(template)
            return None if shown is None else _PERCENT.sub("{}", shown)
        case ast.BinOp(left=first, op=ast.Add(), right=second):
            a, b = _text(first), _text(second)
            return None if a is None or b is None else a + b
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            shown = _text(template)
            return None if shown is None else _FIELD.sub("{}", shown)
    return None
