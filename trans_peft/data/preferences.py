"""Rows of preferences: one prompt with a chosen and a rejected answer.

Prompt and answers are texts, or lists of messages as in TRL's format. Each row becomes two rows of
`trans_peft.data.rows`, one for each answer, so that the same checks hold for both.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from trans_peft.data.example import Example
from trans_peft.data.rows import InvalidRow, Row, examples_from, field_names

__all__ = ["preferences_from"]

_FIELDS = ("prompt", "chosen", "rejected")


def preferences_from(
    rows: list[Row], name: str, metadata: Collection[str] = ()
) -> tuple[Example, ...]:
    """Return the examples of rows, with the chosen answer as `completion` and with `rejected`.

    DataError with the place and reason of every invalid row. For `metadata` see `examples_from`.
    """
    answers = examples_from(
        [answer for where, row in rows for answer in _answers(where, row)],
        name,
        metadata,
        expected="rows with prompt, chosen and rejected: texts, or lists of messages with one "
        "answer each",
        counted="answers",
    )
    return tuple(
        replace(chosen, rejected=rejected.completion, place=where)
        for (where, _), chosen, rejected in zip(rows, answers[::2], answers[1::2], strict=True)
    )


def _answers(where: str, row: object) -> Iterator[Row]:
    """Yield a row for each answer, or the row itself if it has another shape."""
    if isinstance(row, InvalidRow) or not isinstance(row, dict):
        yield where, row
        return
    if any(field not in row for field in _FIELDS):
        yield where, InvalidRow(f"must have {', '.join(_FIELDS)}, found {field_names(row)}")
        return
    prompt, *answers = (row[field] for field in _FIELDS)
    if answers[0] == answers[1]:
        yield where, InvalidRow("chosen and rejected are equal")
        return
    rest = {key: value for key, value in row.items() if key not in _FIELDS}
    for field, answer in zip(_FIELDS[1:], answers, strict=True):
        place = f"{where}, {field}"
        if not isinstance(prompt, list):
            yield place, {**rest, "prompt": prompt, "completion": answer}
        elif isinstance(answer, list) and len(answer) == 1:
            yield place, {**rest, "messages": [*prompt, *answer]}
        else:
            yield place, InvalidRow("must be a list with one message, because prompt is a list")
        rest.pop("id", None)  # both answers are one example
