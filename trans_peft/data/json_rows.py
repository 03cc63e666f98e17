"""Parse rows in JSON: one value a line (JSON Lines), or one list of values.

Python's `json` accepts more than JSON: it keeps the last value of a repeated key, and reads `NaN`
and `1e999` as floats. Both make a row invalid here. So do deep nesting and integers with more
digits than `sys.get_int_max_str_digits`, which Python cannot process. An invalid row does not
change the numbers of the rows after it.
"""

import codecs
import io
import json
import math
import re
import sys
from typing import Any

from trans_peft.data.rows import InvalidRow, Row
from trans_peft.domain.untrusted_json import check_depth, duplicates
from trans_peft.errors import DataError

__all__ = ["json_rows"]

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_SPACE = re.compile(r"[ \t\r\n]*")
_NAME_LIMIT = 60


def json_rows(data: bytes, name: str) -> list[Row]:
    """Return all rows with their places; an invalid row is an `InvalidRow` with the reason.

    Raises DataError for a file in UTF-16 or UTF-32.
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise DataError(
                f"{name} is {encoding} text", expected="UTF-8", do="write the file in UTF-8"
            )
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.lstrip().startswith(b"["):
        rows = _listed(data)
        if rows is not None:
            return rows
    return [
        (f"line {number}", _line(line))
        for number, line in enumerate(io.BytesIO(data), start=1)
        if line.strip()
    ]


def _listed(data: bytes) -> list[Row] | None:
    """Return the rows of a file that is one list, None if its first line is a complete value.

    The rows end at the first syntax error, because the end of an invalid value is unknown.
    """
    first = data.lstrip().split(b"\n", 1)
    if len(first) == 2 and first[1].strip() and not isinstance(_line(first[0]), InvalidRow):
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return [(f"line {line}", InvalidRow("not UTF-8 text"))]
    reader, rows = _Reader(), list[Row]()
    at = _after_space(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        return _ended(text, at + 1, rows)
    while True:
        where = f"item {len(rows) + 1}"
        row, at = reader.value(text, at)
        rows.append((where, row))
        if at < 0:
            return rows
        at = _after_space(text, at)
        sign = text[at : at + 1]
        if sign == "]":
            return _ended(text, at + 1, rows)
        if sign != ",":
            rows[-1] = (
                where,
                InvalidRow(f"not JSON (no comma or ] after it, at {_place(text, at)})"),
            )
            return rows
        at = _after_space(text, at + 1)


def _ended(text: str, at: int, rows: list[Row]) -> list[Row]:
    at = _after_space(text, at)
    if at < len(text):
        problem = f"not JSON (unexpected text at {_place(text, at)})"
        rows.append(("after the list", InvalidRow(problem)))
    return rows


def _line(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return InvalidRow("not UTF-8 text")
    value, at = _Reader().value(text, _after_space(text, 0))
    if at >= 0 and _after_space(text, at) < len(text):
        return InvalidRow(f"not JSON (unexpected text after the value, at column {at + 1})")
    return value


class _Reader:
    """Parses one value at a time and collects the faults that Python's `json` ignores."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """Return the value at a position and its end; the end is -1 after a syntax error."""
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(text, at)
        except RecursionError:
            return InvalidRow("not JSON that can be read (nested too deeply)"), -1
        except json.JSONDecodeError as error:
            return InvalidRow(f"not JSON ({error.msg} at {_place(text, error.pos)})"), -1
        if self._faults:
            return InvalidRow("; ".join(dict.fromkeys(self._faults))), end
        try:
            check_depth(value)
        except ValueError as error:
            return InvalidRow(f"not JSON that can be read ({error})"), end
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = duplicates(key for key, _ in pairs)
            self._faults.append(f"the key {twice[0][:_NAME_LIMIT]!r} is repeated in one object")
        return found

    def _constant(self, text: str) -> None:
        self._faults.append(f"{text} is not JSON")

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):
            self._faults.append(f"the number {text[:_NAME_LIMIT]} is too large")
        return number

    def _int(self, text: str) -> int:
        most = sys.get_int_max_str_digits()
        if most and len(text.lstrip("-")) > most:
            self._faults.append(f"a number of {len(text)} digits is too large")
            return 0
        return int(text)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _place(text: str, at: int) -> str:
    line = text.count("\n", 0, at) + 1
    return f"line {line}, column {at - text.rfind(chr(10), 0, at)}"
