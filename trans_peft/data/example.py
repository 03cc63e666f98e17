"""Examples (a prompt and its answer, as text or as a chat) and their token ids."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trans_peft.data.encoding import encoded
from trans_peft.errors import DataError, listed_lines
from trans_peft.text.chat import render_prompts, template_of, turn_end

__all__ = ["ChatMessage", "Example", "end_of_turn", "full_ids", "prompt_ids", "token_counts"]

_SHOWN = 20
_NAME_LIMIT = 100


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One prompt and its answer.

    Attributes:
        id: the row's id, or a hash of its content. Results are paired by it, in any order of rows.
        prompt: the text before the answer; empty in a chat.
        completion: the answer.
        messages: the whole chat with the answer as its last message; None for text.
        choices: all answers to choose from, including the completion; empty where there are none.
        reference: what answers are scored against, if that is not the completion (for a program,
            its unit tests).
        place: the row's place in its file ("line 3"), for error messages. Not compared.
        cluster: value of the column that the source names as `cluster`; empty without one.
        slice: value of the column that the source names as `slice`; empty without one.
        tools: the functions that the prompt of a chat offers, as the JSON text of a list of
            schemas; empty without them.
        rejected: the answer that the completion is preferred to; empty without preferences.
    """

    id: str
    prompt: str
    completion: str
    messages: tuple[ChatMessage, ...] | None = None
    choices: tuple[str, ...] = ()
    reference: str = ""
    place: str = field(default="", compare=False)
    cluster: str = ""
    slice: str = ""
    tools: str = ""
    rejected: str = ""

    @property
    def location(self) -> str:
        """The row's place in its file and its id, for error messages."""
        id_ = self.id if len(self.id) <= _NAME_LIMIT else f"{self.id[:_NAME_LIMIT]}..."
        return f"{self.place} (id {id_})" if self.place else f"id {id_}"

    @property
    def characters(self) -> int:
        """Total number of characters of all texts of the example."""
        texts = [self.prompt, self.completion, self.rejected, self.reference, self.tools]
        texts += self.choices
        texts += [turn.content for turn in self.messages or ()]
        return sum(map(len, texts))

    def prompt_text(self) -> str:
        """Return the text of the prompt, without the answer and the system message."""
        if self.messages is None:
            return self.prompt
        return "\n".join(turn.content for turn in self.messages[:-1] if turn.role != "system")

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """Return `prompt_ids` of this example alone, with the tokenizer's own chat template."""
        return prompt_ids([self], tokenizer)[0]

    def full_ids(self, tokenizer: Any) -> list[int]:
        """Return `full_ids` of this example alone, with the tokenizer's own chat template."""
        return full_ids([self], tokenizer)[0]

    def with_rejected(self) -> "Example":
        """Return the example with the rejected answer as its completion."""
        messages = self.messages and (
            *self.messages[:-1],
            ChatMessage(self.messages[-1].role, self.rejected),
        )
        return replace(self, completion=self.rejected, messages=messages, rejected="")

    def trl_row(self) -> dict[str, Any]:
        """Return the example in TRL's format: text, or lists of messages.

        The keys are `prompt` and `completion`; `prompt`, `chosen` and `rejected` with preferences.
        """
        if self.rejected:
            chosen, rejected = replace(self, rejected="").trl_row(), self.with_rejected().trl_row()
            return {
                "prompt": chosen["prompt"],
                "chosen": chosen["completion"],
                "rejected": rejected["completion"],
            }
        if self.messages is None:
            return {"prompt": self.prompt, "completion": self.completion}
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        tools = {"tools": json.loads(self.tools)} if self.tools else {}
        return {"prompt": turns[:-1], "completion": turns[-1:], **tools}


def prompt_ids(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> list[list[int]]:
    """Return the token ids of each example's prompt.

    Chats are rendered with `template`, by default the tokenizer's own. Template and tokenizer run
    in a child process with limits. Raises DataError if there is no template, or with every row
    that the template cannot render, and LimitExceededError.
    """
    return encoded(_prompt_ids, examples, tokenizer, template, characters=_characters)


def full_ids(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> list[list[int]]:
    """Return the token ids of each example's prompt, its answer and the end of the answer.

    A text ends with the end-of-text token, a chat with what the template writes. For arguments and
    errors see `prompt_ids`.
    """
    return encoded(_full_ids, examples, tokenizer, template, characters=_characters)


def token_counts(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> list[tuple[int, int, bool]]:
    """Return for each example (prompt tokens, all tokens, whether the prompt is a prefix of all).

    For arguments and errors see `prompt_ids`.
    """
    found = encoded(_token_counts, examples, tokenizer, template, characters=_characters)
    return [(prompt, whole, starts) for prompt, whole, starts in found]


def end_of_turn(example: Example, tokenizer: Any, template: str | None = None) -> int | None:
    """Return the id of the special token that the chat template writes after an answer.

    None for a text, and for a template that writes none.
    """
    (found,) = encoded(_ends_of_turns, [example], tokenizer, template, characters=_characters)
    return None if found is None else int(found)


def _ends_of_turns(
    examples: Sequence[Example], tokenizer: Any, template: str | None
) -> list[int | None]:
    return [
        turn_end(tokenizer, _turns(e.messages), template) if e.messages else None for e in examples
    ]


def _characters(example: Example) -> int:
    return example.characters


def _prompt_ids(
    examples: Sequence[Example], tokenizer: Any, template: str | None
) -> list[list[int]]:
    prompts = {
        i: _turns(example.messages[:-1])
        for i, example in enumerate(examples)
        if example.messages is not None
    }
    chats = _chat_ids(examples, prompts, tokenizer, template, add_generation_prompt=True)
    return [
        chats[i] if i in chats else list(tokenizer(text=example.prompt)["input_ids"])
        for i, example in enumerate(examples)
    ]


def _full_ids(examples: Sequence[Example], tokenizer: Any, template: str | None) -> list[list[int]]:
    whole = {
        i: _turns(example.messages)
        for i, example in enumerate(examples)
        if example.messages is not None
    }
    chats = _chat_ids(examples, whole, tokenizer, template, add_generation_prompt=False)
    found = []
    for i, example in enumerate(examples):
        if i in chats:
            found.append(chats[i])
            continue
        end = "" if example.completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        found.append(list(tokenizer(text=example.prompt + example.completion + end)["input_ids"]))
    return found


def _token_counts(
    examples: Sequence[Example], tokenizer: Any, template: str | None
) -> list[tuple[int, int, bool]]:
    prompts = _prompt_ids(examples, tokenizer, template)
    wholes = _full_ids(examples, tokenizer, template)
    return [
        (len(prompt), len(whole), whole[: len(prompt)] == prompt)
        for prompt, whole in zip(prompts, wholes, strict=True)
    ]


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


def _chat_ids(
    examples: Sequence[Example],
    conversations: Mapping[int, list[dict[str, str]]],
    tokenizer: Any,
    template: str | None,
    *,
    add_generation_prompt: bool,
) -> dict[int, list[int]]:
    """Return the token ids of each conversation, by the position of its example."""
    if not conversations:
        return {}
    template = template_of(tokenizer) if template is None else template
    if template is None:
        raise DataError(
            "the data has chats, but the base's tokenizer has no chat template",
            do="use prompt/completion rows, or a base with a chat template",
        )
    texts, problems = render_prompts(
        template,
        list(conversations.values()),
        special_tokens=tokenizer.special_tokens_map,
        add_generation_prompt=add_generation_prompt,
        tools=[examples[i].tools for i in conversations],
    )
    rows = [
        f"{examples[i].location}: {problem}"
        for i, problem in zip(conversations, problems, strict=True)
        if problem
    ]
    if rows:
        raise DataError(
            f"{len(rows)} of {len(examples)} rows cannot be rendered as chats\n    "
            + "\n    ".join(listed_lines(rows, _SHOWN)),
            do="change these rows so that the template can render them, or fix the template",
        )
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {number: list(row) for number, row in zip(conversations, ids, strict=True)}
