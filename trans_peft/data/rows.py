"""Check rows and convert them to examples.

Rows have one of three shapes: prompt/completion, chat `messages` with the assistant's answer last,
and instruction/input/output, which is rendered with the Alpaca prompt of LLM-Adapters
(AGI-Edgerunners/LLM-Adapters, `generate_prompt`). One error lists all invalid rows. A row of any
shape may also have `choices` (all answers to choose from) and `reference` (what answers are scored
against, if not the completion), and a chat `tools`. Other fields are metadata, or an error if they
could change the result (`trans_peft.data.fields`).
"""

import reprlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from trans_peft.data.example import ChatMessage, Example
from trans_peft.data.fields import OWN_FIELDS, unsupported_fields
from trans_peft.data.tools import tools_reasons, tools_text
from trans_peft.domain.excerpts import excerpt
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import DataError, listed, listed_lines

__all__ = ["NO_ANSWER", "InvalidRow", "Row", "examples_from", "field_names", "without_answer"]

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_SHAPES = {
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
    "instruction/output": ("instruction", "output"),
}
_EXPECTED = "rows of one shape: " + "; ".join(" + ".join(keys) for keys in _SHAPES.values())
_OPTIONAL = {"messages": ("tools",), "instruction/output": ("input",)}
_READ = {shape: OWN_FIELDS.union(keys, _OPTIONAL.get(shape, ())) for shape, keys in _SHAPES.items()}
_MESSAGE_FIELDS = ("role", "content")
_ROLES = ("system", "user", "assistant")
_MESSAGE_LIMIT = 20
_NAME_LIMIT = 60
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel = 3


NO_ANSWER = "(no answer)"
"""The completion of an example that is a prompt only."""

_NO_PART_OF_A_PROMPT = ("completion", "output", "choices", "reference", "id")


@dataclass(frozen=True)
class InvalidRow:
    """Takes the place of a row that could not be parsed."""

    reason: str


Row = tuple[str, Any]
"""A row's place in its file ("line 3") and its value, or an `InvalidRow`."""


def examples_from(
    rows: list[Row],
    name: str,
    metadata: Collection[str] = (),
    *,
    expected: str = _EXPECTED,
    counted: str = "rows",
    do: str = "correct or remove these rows",
) -> tuple[Example, ...]:
    """Return the examples of rows. DataError with the place and reason of every invalid row.

    `metadata` are fields that the source names as metadata, whatever other formats use them for.
    `expected`, `counted` and `do` are texts of the error: the format of the file, what `rows` are,
    and how to correct them.
    """
    problems: list[tuple[str, str]] = []
    examples: list[Example] = []
    shapes: dict[str, str] = {}  # shape -> place of its first row
    own_ids: dict[str, str] = {}  # id -> place
    content_counts: dict[str, int] = {}
    for where, row in rows:
        reasons = list(_reasons(row))
        if not reasons:
            shapes.setdefault(_shape(row), where)
            own_id = str(row["id"]) if row.get("id") is not None else ""
            if own_id in own_ids:
                reasons.append(f"id {excerpt(own_id, 60)} is also the id of {own_ids[own_id]}")
            elif own_id:
                own_ids[own_id] = where
            example = _example(row, own_id, content_counts, where)
            reasons += unsupported_fields(row, _READ[_shape(row)].union(metadata), _text(example))
            examples.append(example)
        problems += [(where, reason) for reason in reasons]
    if not rows:
        raise DataError(f"{name} has no rows")
    if len(shapes) > 1:
        seen = ", ".join(f"{shape} (first in {where})" for shape, where in shapes.items())
        problems.append(("all rows", f"must have one shape, found {seen}"))
    if problems:
        bad = len({where for where, _ in problems})
        lines = [f"{where}: {reason}" for where, reason in problems]
        shown = listed_lines(lines, _MESSAGE_LIMIT)
        raise DataError(
            f"{name}: {bad} of {len(rows)} {counted} are invalid\n    " + "\n    ".join(shown),
            expected=expected,
            do=do,
        )
    return tuple(examples)


def without_answer(row: Any) -> tuple[Any, bool]:
    """Return a row with `NO_ANSWER` as its answer and without its id, and whether it had an answer.

    In a chat the answers are the last messages as far as they are the assistant's. What is not a
    row is returned as it is, for `examples_from` to refuse.
    """
    if not isinstance(row, dict):
        return row, False
    found = {key: value for key, value in row.items() if key not in _NO_PART_OF_A_PROMPT}
    has_answer = any(row.get(key) is not None for key in ("completion", "output"))
    if isinstance(row.get("messages"), list):
        turns = list(row["messages"])
        while turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            turns.pop()
        has_answer = len(turns) < len(row["messages"])
        found["messages"] = [*turns, {"role": "assistant", "content": NO_ANSWER}]
    elif "instruction" in row:
        found["output"] = NO_ANSWER
    else:
        found["completion"] = NO_ANSWER
    return found, has_answer


def _shape(row: dict[str, Any]) -> str:
    return next(shape for shape, keys in _SHAPES.items() if all(key in row for key in keys))


def _reasons(row: Any) -> Iterator[str]:
    """Yield every reason why a row is invalid."""
    if isinstance(row, InvalidRow):
        yield row.reason
        return
    if not isinstance(row, dict):
        yield f"must be a JSON object, found {type(row).__name__}"
        return
    shapes = [shape for shape, keys in _SHAPES.items() if all(key in row for key in keys)]
    if len(shapes) != 1:
        found = " and ".join(shapes) if shapes else field_names(row)
        if "chosen" in row and "rejected" in row:
            found += " (preferences are read if the recipe has objective: dpo)"
        yield f"must have one of the known shapes, found {found}"
        return
    if type(row.get("id")) not in (str, int, type(None)) or row.get("id") == "":
        yield f"id must be text or a whole number, found {_shown(row['id'])}"
    elif isinstance(row.get("id"), str):
        yield from _unicode_reasons("id", row["id"])
    yield from _scoring_reasons(row)
    if shapes == ["messages"]:
        yield from _chat_reasons(row["messages"])
        yield from tools_reasons(row.get("tools"))
        return
    for key in _SHAPES[shapes[0]]:
        yield from _text_reasons(key, row[key])
    if shapes == ["instruction/output"]:
        given = row.get("input")
        if not isinstance(given, (str, type(None))):
            yield f"input must be text, found {type(given).__name__}"
        elif given:
            yield from _unicode_reasons("input", given)


def _scoring_reasons(row: dict[str, Any]) -> Iterator[str]:
    if row.get("reference") is not None:
        yield from _text_reasons("reference", row["reference"])
    choices = row.get("choices")
    if choices is None:
        return
    if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) for c in choices):
        yield f"choices must be a list of texts, found {_shown(choices)}"
    elif len(choices) < 2 or len(set(choices)) < len(choices):
        yield f"choices must be at least two different texts, found {_shown(choices)}"
    elif (answer := _answer(row)) not in choices:
        yield f"the answer {_shown(answer)} is not one of the choices {_shown(choices)}"
    else:
        for choice in choices:
            yield from _unicode_reasons("a choice", choice)


def _answer(row: dict[str, Any]) -> Any:
    """Return the answer of a row of any shape, None if it has none."""
    shape = _shape(row)
    if shape != "messages":
        return row[_SHAPES[shape][-1]]
    last = row["messages"][-1:] if isinstance(row["messages"], list) else []
    return last[0].get("content") if last and isinstance(last[0], dict) else None


def _text_reasons(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{key} must be text, found {type(value).__name__}"
    elif not value.strip():
        yield f"{key} is empty"
    else:
        yield from _unicode_reasons(key, value)


def _unicode_reasons(key: str, text: str) -> Iterator[str]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        yield f"{key} has half of a surrogate pair (\\u{code:04x}), which is not a character"


def _shown(value: Any) -> str:
    """Return a short text for an error message, for a value of any length and depth."""
    return _SHORT.repr(value)


def field_names(row: dict[str, Any]) -> str:
    """Return the names of a row's fields for a message."""
    names = [name if name.isprintable() else repr(name) for name in row]
    shown = [name if len(name) <= _NAME_LIMIT else f"{name[:_NAME_LIMIT]}..." for name in names]
    return f"the fields {listed(shown, _MESSAGE_LIMIT) or '(none)'}"


def _chat_reasons(messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or len(messages) < 2:
        yield "messages must be a list of at least two messages, a question and its answer"
        return
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            yield f"message {number} must be an object with role and content"
            return
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            yield (
                f"message {number} has the role {_shown(role)}, expected one of "
                + ", ".join(_ROLES)
            )
        elif role == "system" and number > 1:
            yield f"message {number} has the role system, which only the first message may have"
        yield from _text_reasons(f"the content of message {number}", message.get("content"))
        for name, value in message.items():
            if name not in _MESSAGE_FIELDS and value is not None:
                yield f"message {number} has the field {_shown(name)}, which is not supported"
    if messages[-1].get("role") != "assistant":
        role = _shown(messages[-1].get("role"))
        yield f"the last message must have the role assistant, found {role}"
    if not any(message.get("role") == "user" for message in messages[:-1]):
        yield "no message before the answer has the role user"


def _text(example: Example) -> str:
    """Return the prompt and the answer of an example."""
    turns = [turn.content for turn in example.messages or ()]
    return "\n".join([example.prompt, *turns, example.completion])


def _example(
    row: dict[str, Any], own_id: str, content_counts: dict[str, int], where: str
) -> Example:
    messages = None
    shape = _shape(row)
    if shape == "messages":
        messages = tuple(ChatMessage(turn["role"], turn["content"]) for turn in row["messages"])
        prompt, completion = "", messages[-1].content
    elif shape == "instruction/output":
        template = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
        prompt = template.format(instruction=row["instruction"], input=row.get("input"))
        completion = row["output"]
    else:
        prompt, completion = row["prompt"], row["completion"]
    choices, reference = tuple(row.get("choices") or ()), row.get("reference") or ""
    tools = tools_text(row.get("tools")) if shape == "messages" else ""
    if not own_id:
        # Equal rows are interchangeable, so it does not matter which of them gets which number.
        more = [choices, reference] if choices or reference else []
        more += [{"tools": tools}] if tools else []
        content = content_sha256([prompt, completion, messages, *more])[:16]
        content_counts[content] = count = content_counts.get(content, 0) + 1
        own_id = content if count == 1 else f"{content}-{count}"
    return Example(own_id, prompt, completion, messages, choices, reference, where, tools=tools)
