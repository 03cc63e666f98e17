"""Find the longest run of lines in a text that is valid Python, without trying all pairs of lines.

A text of n lines has n²/2 runs of lines. Three facts keep the search near-linear:

- If the parser fails before the end of its input, no valid run with that start reaches the line of
  the error. CPython distinguishes this case from incomplete input with
  PyCF_ALLOW_INCOMPLETE_INPUT, as in `codeop`. The parsed window grows only while the input is
  incomplete.
- Inside a valid run, no longer run starts at the first line of a statement.
- Blank lines, comments and decorators at the start of a run do not change whether it is valid.

The time is quadratic for a single statement that never ends, such as `try` without `except`.
"""

import ast
import codeop
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import accumulate

__all__ = ["longest_python", "parsed"]

_FLAGS = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]
_INCOMPLETE = "incomplete input"
_FIRST_WINDOW = 8
_DECORATOR = re.compile(r"@\w[\w.]*(\([^()\"'#\\]*\))? *")
_DECORATED = ("@", "def ", "class ", "async def ")
_NEVER_LAST = (":", "\\", "(", "[", "{")


def longest_python(lines: Sequence[str]) -> str:
    """Return the run of at least two lines with the most lines that are not blank.

    Of equally long runs the first is returned; "" if there is none.
    """
    search = _Search(lines)
    best, longest = 0, ""
    for start in search.starts():
        if search.filled(start, len(lines)) <= best:
            break
        end, module = search.longest_from(start)
        if module is None:
            search.skip_decorated(start)
            continue
        search.skip_statements(start, end, module)
        filled = search.filled(start, end)
        if filled > best:
            best, longest = filled, "\n".join(lines[start:end])
    return longest


def parsed(text: str) -> ast.Module | None:
    """Return the syntax tree of a text, None if it is not valid Python."""
    try:
        return _parse(text)
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return None


class _Search:
    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines
        self._skipped = [False] * len(lines)
        self._filled = [0, *accumulate(bool(line.strip()) for line in lines)]
        # Python also ends a line at a carriage return.
        returns = (line.removesuffix("\r").count("\r") for line in lines)
        self._numbers = [0, *accumulate(1 + count for count in returns)]
        self._transparent = [_is_transparent(line) for line in lines]

    def starts(self) -> Iterator[int]:
        """Yield the lines at which a run may start that is longer than those found so far."""
        for start, line in enumerate(self._lines):
            if self._skipped[start]:
                continue
            if line[:1].isspace() and line.strip() and not line.lstrip().startswith("#"):
                continue  # a program does not start with an indented line
            if self._transparent[start]:
                self._skip_run(start)
            yield start

    def filled(self, start: int, end: int) -> int:
        """Return how many lines from `start` to before `end` are not blank."""
        return self._filled[end] - self._filled[start]

    def longest_from(self, start: int) -> tuple[int, ast.Module | None]:
        """Return the end of the longest run from `start` and its syntax tree, None if none."""
        end = self._bound(start)
        while end > start + 1:
            if not self._lines[end - 1].strip() or self._never_last(end - 1):
                end -= 1
                continue
            try:
                return end, _parse("\n".join(self._lines[start:end]))
            except SyntaxError as error:
                end = min(end - 1, self._line_of(error, start, end))
            except (MemoryError, RecursionError, ValueError):
                end -= 1
        return start, None

    def skip_statements(self, start: int, end: int, module: ast.Module) -> None:
        """Exclude these lines as starts, except those inside a statement of several lines."""
        inside = bytearray(end - start)
        for node in module.body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            a, b = (self._index(start, number) - start for number in (first, node.end_lineno or 0))
            inside[a + 1 : b + 1] = b"\1" * (b - a)
        for index, within in enumerate(inside, start):
            self._skipped[index] |= not within

    def skip_decorated(self, start: int) -> None:
        """Exclude the lines after decorators from which no run starts."""
        for line in range(start, len(self._lines) - 1):
            if not _DECORATOR.fullmatch(self._lines[line]):
                break
            if not self._lines[line + 1].startswith(_DECORATED):
                break
            self._skipped[line + 1] = True

    def _skip_run(self, start: int) -> None:
        after = start + 1
        while after < len(self._lines) and self._transparent[after]:
            self._skipped[after] = True
            after += 1
        if after < len(self._lines):
            self._skipped[after] = True

    def _bound(self, start: int) -> int:
        """Return an upper bound for the end of every run from `start`."""
        size, total = _FIRST_WINDOW, len(self._lines)
        while True:
            end = min(start + size, total)
            try:
                _parse("\n".join(self._lines[start:end]), _FLAGS)
            except SyntaxError as error:
                if error.lineno is None:  # as for a null byte
                    return self._too_deep(start, end)
                if error.msg != _INCOMPLETE:
                    return self._line_of(error, start, end)
            except (MemoryError, RecursionError, ValueError):
                return self._too_deep(start, end)
            if end == total:
                return total
            size *= 2

    def _too_deep(self, start: int, end: int) -> int:
        """Return the first end at which the parser fails because of nesting or memory."""
        low, high = start, end
        while low < high:
            middle = (low + high) // 2
            try:
                _parse("\n".join(self._lines[start : middle + 1]), _FLAGS)
            except SyntaxError as error:
                low, high = (low, middle) if error.lineno is None else (middle + 1, high)
            except (MemoryError, RecursionError, ValueError):
                high = middle
            else:
                low = middle + 1
        return low

    def _line_of(self, error: SyntaxError, start: int, end: int) -> int:
        return end if error.lineno is None else min(self._index(start, error.lineno), end)

    def _index(self, start: int, number: int) -> int:
        """Return the index of the line with a number that Python counts from `start`."""
        wanted, low, high = self._numbers[start] + number, start, len(self._lines)
        while low < high:
            middle = (low + high) // 2
            if self._numbers[middle + 1] < wanted:
                low = middle + 1
            else:
                high = middle
        return low

    def _never_last(self, index: int) -> bool:
        """Whether the line alone shows that no program ends with it."""
        line = self._lines[index].rstrip()
        plain = not {"#", '"', "'"} & set(line)
        if not plain:
            return False
        if line.endswith(_NEVER_LAST):
            return True
        continued = index > 0 and self._lines[index - 1].endswith("\\")
        return bool(_DECORATOR.fullmatch(line.lstrip())) and not continued


def _is_transparent(line: str) -> bool:
    rest = line.lstrip(" \t\f")
    return not rest or (rest.startswith("#") and "\r" not in rest and "\0" not in rest)


def _parse(text: str, flags: int = ast.PyCF_ONLY_AST) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in the text
        return compile(text, "<unknown>", "exec", flags, dont_inherit=True)
