"""Rows of training and evaluation data: read, checked all at once, and pinned to their bytes.

Three row shapes are understood, in JSON Lines, Parquet or a hub data set: prompt/completion, chat
`messages` (the last one is the assistant's answer) and instruction/input/output, which is rendered
with the Alpaca prompt of LLM-Adapters (AGI-Edgerunners/LLM-Adapters, `generate_prompt`). Unlike a
bare `datasets.load_dataset`, every bad row is told with its line in one error, and a source that is
pinned is never read with other bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trans_peft.domain.data import DataSource
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import DataError, IntegrityError
from trans_peft.ports import ArtifactStore

__all__ = ["Example", "Message", "parse_examples", "pin", "read_examples", "write_examples"]

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
_ROLES = ("system", "user", "assistant")
_MESSAGE_LIMIT = 20


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    `id` is the row's own, or a hash of its content, so that results can be paired whatever the
    order of the rows. `completion` is the answer. What stands before it is `prompt`, or in a chat
    `messages[:-1]` (`messages` is the whole chat, the answer last; `prompt` is then empty).
    """

    id: str
    prompt: str
    completion: str
    messages: tuple[Message, ...] | None = None

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """Return the token ids that a model is given before it answers, trained or evaluated.

        A chat is rendered with the tokenizer's own template; without one it is a DataError.
        """
        if self.messages is None:
            return list(tokenizer(text=self.prompt)["input_ids"])
        _need_template(tokenizer)
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages[:-1]]
        rendered = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"])

    def full_ids(self, tokenizer: Any) -> list[int]:
        """Return the token ids of the prompt, the answer, and the token that ends it."""
        if self.messages is None:
            end = "" if self.completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
            return list(tokenizer(text=self.prompt + self.completion + end)["input_ids"])
        _need_template(tokenizer)
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return list(
            tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        )

    def trl_row(self) -> dict[str, Any]:
        """Return the example in TRL's prompt/completion format (text, or lists of messages)."""
        if self.messages is None:
            return {"prompt": self.prompt, "completion": self.completion}
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return {"prompt": turns[:-1], "completion": turns[-1:]}


def read_examples(
    source: DataSource, store: ArtifactStore, *, limit: int | None = None
) -> tuple[Example, ...]:
    """Read all rows of a source (the first `limit` of them), checked.

    Raises DataError with every bad row and its line, IntegrityError if a pinned source has other
    bytes, NotFoundError if there is nothing.
    """
    rows, sha256 = _load(source, store)
    _check_pin(source, sha256)
    return _examples(rows, source.uri)[:limit]


def pin(source: DataSource, store: ArtifactStore) -> DataSource:
    """Return the source bound to the bytes it has now. IntegrityError if it was bound to others.

    A hub data set has no one file: its hash is that of its rows as canonical JSON Lines.
    """
    _, sha256 = _load(source, store)
    _check_pin(source, sha256)
    return source.pinned(sha256)


def parse_examples(lines: bytes, name: str) -> tuple[Example, ...]:
    """Read JSON Lines that are already here; `name` is for the messages of a DataError."""
    return _examples(_json_rows(lines), name)


def write_examples(examples: Iterable[Example], path: Path) -> Path:
    """Write examples as JSON Lines that `parse_examples` reads back to equal ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row: dict[str, Any] = {"id": example.id}
            if example.messages is None:
                row |= {"prompt": example.prompt, "completion": example.completion}
            else:
                row["messages"] = [vars(turn) for turn in example.messages]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


# -- where rows come from ---------------------------------------------------------------------

_Row = tuple[str, Any]
"""Where a row stands ("line 3"), and its value; a `_Unreadable` where it has none."""


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _load(source: DataSource, store: ArtifactStore) -> tuple[list[_Row], str]:
    if source.uri.startswith("hub:"):
        return _hub_rows(source.uri)
    readers: dict[str, Callable[[bytes], list[_Row]]] = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    suffix = Path(source.uri).suffix
    if suffix not in readers:
        raise DataError(
            f"{source.uri} is of no kind that can be read",
            expected=f"a name that ends in {', '.join(readers)}, or hub:NAME[:CONFIG[:SPLIT]]",
            found=suffix or "no ending",
        )
    with store.read(source.uri) as chunks:
        data = b"".join(chunks)
    return readers[suffix](data), hashlib.sha256(data).hexdigest()


def _json_rows(data: bytes) -> list[_Row]:
    return [
        (f"line {number}", _json_value(line))
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip()
    ]


def _json_value(line: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(line.decode(), parse_constant=refuse)
    except UnicodeDecodeError:
        return _Unreadable("not UTF-8 text")
    except ValueError as error:
        return _Unreadable(f"not JSON ({error})")


def _parquet_rows(data: bytes) -> list[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except pyarrow.ArrowException as error:
        raise DataError("the file is not Parquet", found=error) from error
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _hub_rows(uri: str) -> tuple[list[_Row], str]:
    name, config, split, *rest = [*uri.removeprefix("hub:").split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f"{uri} names no hub data set", expected="hub:NAME[:CONFIG[:SPLIT]]")
    import datasets

    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub client raises many kinds
        raise DataError(
            f"the hub data set {uri} cannot be read",
            found=f"{type(error).__name__}: {error}",
            do="check its name, configuration and split, and that the hub can be reached",
        ) from error
    rows = list(table)
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return [(f"row {n}", row) for n, row in enumerate(rows, start=1)], sha256.hexdigest()


def _check_pin(source: DataSource, sha256: str) -> None:
    if source.sha256 and source.sha256 != sha256:
        raise IntegrityError(
            f"{source.uri} has changed since it was pinned",
            expected=f"sha256 {source.sha256}",
            found=f"sha256 {sha256}",
            do="put the old bytes back, or leave the hash out of the recipe to take these",
        )


# -- what rows must be ------------------------------------------------------------------------


def _examples(rows: list[_Row], name: str) -> tuple[Example, ...]:
    problems: list[tuple[str, str]] = []
    examples: list[Example] = []
    shapes: dict[str, str] = {}  # shape -> where it was first seen
    own_ids: dict[str, str] = {}  # id -> where
    content_counts: dict[str, int] = {}
    for where, row in rows:
        reasons = list(_reasons(row))
        if not reasons:
            shapes.setdefault(_shape(row), where)
            own_id = str(row["id"]) if row.get("id") is not None else ""
            if own_id in own_ids:
                reasons.append(f"id {own_id!r} stands in {own_ids[own_id]} already")
            elif own_id:
                own_ids[own_id] = where
            examples.append(_example(row, own_id, content_counts))
        problems += [(where, reason) for reason in reasons]
    if not rows:
        raise DataError(f"{name} has no rows")
    if len(shapes) > 1:
        seen = ", ".join(f"{shape} (first in {where})" for shape, where in shapes.items())
        problems.append(("all rows", f"must have one shape, found {seen}"))
    if problems:
        bad = len({where for where, _ in problems})
        shown = [f"{where}: {reason}" for where, reason in problems[:_MESSAGE_LIMIT]]
        if len(problems) > _MESSAGE_LIMIT:
            shown.append(f"and {len(problems) - _MESSAGE_LIMIT} more")
        raise DataError(
            f"{name}: {bad} of {len(rows)} rows cannot be used\n    " + "\n    ".join(shown),
            expected="rows of one shape: "
            + "; ".join(" + ".join(keys) for keys in _SHAPES.values()),
            do="correct or remove these rows",
        )
    return tuple(examples)


def _shape(row: dict[str, Any]) -> str:
    return next(shape for shape, keys in _SHAPES.items() if all(key in row for key in keys))


def _reasons(row: Any) -> Iterator[str]:
    """Yield every reason why one row cannot be used."""
    if isinstance(row, _Unreadable):
        yield row.reason
        return
    if not isinstance(row, dict):
        yield f"a JSON object is needed, found {type(row).__name__}"
        return
    shapes = [shape for shape, keys in _SHAPES.items() if all(key in row for key in keys)]
    if len(shapes) != 1:
        found = " and ".join(shapes) if shapes else f"the fields {', '.join(row) or '(none)'}"
        yield f"one known shape is needed, found {found}"
        return
    if type(row.get("id")) not in (str, int, type(None)) or row.get("id") == "":
        yield f"id must be text or a whole number, found {row['id']!r}"
    if shapes == ["messages"]:
        yield from _chat_reasons(row["messages"])
        return
    for key in _SHAPES[shapes[0]]:
        yield from _text_reasons(key, row[key])
    if shapes == ["instruction/output"] and not isinstance(row.get("input"), (str, type(None))):
        yield f"input must be text, found {type(row['input']).__name__}"


def _text_reasons(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{key} must be text, found {type(value).__name__}"
    elif not value.strip():
        yield f"{key} is empty"


def _chat_reasons(messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or len(messages) < 2:
        yield "messages must be a list of at least a question and its answer"
        return
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            yield f"message {number} must be an object with role and content"
            return
        role = message.get("role")
        if role not in _ROLES:
            yield f"message {number} has the role {role!r}, expected one of {', '.join(_ROLES)}"
        elif role == "system" and number > 1:
            yield f"message {number} is the system's; only the first may be"
        yield from _text_reasons(f"the content of message {number}", message.get("content"))
    if messages[-1].get("role") != "assistant":
        yield f"the last message must be the assistant's, found {messages[-1].get('role')!r}"
    if not any(message.get("role") == "user" for message in messages[:-1]):
        yield "no message of the user stands before the answer"


def _example(row: dict[str, Any], own_id: str, content_counts: dict[str, int]) -> Example:
    messages = None
    if "messages" in row:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
        prompt, completion = "", messages[-1].content
    elif "instruction" in row:
        template = _ALPACA_WITH_INPUT if row.get("input") else _ALPACA
        prompt = template.format(instruction=row["instruction"], input=row.get("input"))
        completion = row["output"]
    else:
        prompt, completion = row["prompt"], row["completion"]
    if not own_id:
        # Equal rows cannot be told apart, so it does not matter which of them gets which number.
        content = content_sha256([prompt, completion, messages])[:16]
        content_counts[content] = count = content_counts.get(content, 0) + 1
        own_id = content if count == 1 else f"{content}-{count}"
    return Example(own_id, prompt, completion, messages)


def _need_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the data is a chat, but the base's tokenizer has no chat template",
            do="take prompt/completion rows, or a base with a chat template",
        )
