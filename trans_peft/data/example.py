"""One question and its answer, as text or as a chat, and the token ids that a model sees of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """One question and its answer.

    `id` is the row's own, or a hash of its content, so that results can be paired whatever the
    order of the rows. `completion` is the answer. What stands before it is `prompt`, or in a chat
    `messages[:-1]` (`messages` is the whole chat, the answer last; `prompt` is then empty).
    `choices` are all the answers to choose from, the completion among them. `reference` is what an
    answer is marked against where that is not the completion (unit tests, for a program). `place`
    is where the row stands in its file ("line 3"), for messages; it does not make examples differ.
    """

    id: str
    prompt: str
    completion: str
    messages: tuple[ChatMessage, ...] | None = None
    choices: tuple[str, ...] = ()
    reference: str = ""
    place: str = field(default="", compare=False)

    @property
    def location(self) -> str:
        """Where the row stands and its id, for a message: a row without an id is known by place."""
        id_ = self.id if len(self.id) <= _NAME_LIMIT else f"{self.id[:_NAME_LIMIT]}..."
        return f"{self.place} (id {id_})" if self.place else f"id {id_}"

    @property
    def characters(self) -> int:
        """How many characters the example has in all its texts."""
        texts = [self.prompt, self.completion, self.reference, *self.choices]
        texts += [turn.content for turn in self.messages or ()]
        return sum(map(len, texts))

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """Return `prompt_ids` of this example alone, with the tokenizer's own chat template."""
        return prompt_ids([self], tokenizer)[0]

    def full_ids(self, tokenizer: Any) -> list[int]:
        """Return `full_ids` of this example alone, with the tokenizer's own chat template."""
        return full_ids([self], tokenizer)[0]

    def trl_row(self) -> dict[str, Any]:
        """Return the example in TRL's prompt/completion format (text, or lists of messages)."""
        if self.messages is None:
            return {"prompt": self.prompt, "completion": self.completion}
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return {"prompt": turns[:-1], "completion": turns[-1:]}


def prompt_ids(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> list[list[int]]:
    """Return, for each example, the token ids that a model gets before it answers.

    Chats are rendered with `template`, or with the tokenizer's own where that is None. Both the
    template and the tokenizer run in a child process with limits. DataError, with every row: no
    template, or a template that fails; LimitExceededError.
    """
    return encoded(_prompt_ids, examples, tokenizer, template, characters=_characters)


def full_ids(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> list[list[int]]:
    """Return, for each example, the token ids of prompt, answer and what ends the answer.

    A text ends with the end-of-text token, a chat as its template ends it. Otherwise as
    `prompt_ids`.
    """
    return encoded(_full_ids, examples, tokenizer, template, characters=_characters)


def token_counts(
    examples: Sequence[Example], tokenizer: Any, template: str | None = None
) -> list[tuple[int, int, bool]]:
    """Return the lengths of `prompt_ids` and `full_ids`, and whether one is the other's start."""
    found = encoded(_token_counts, examples, tokenizer, template, characters=_characters)
    return [(prompt, whole, starts) for prompt, whole, starts in found]


def end_of_turn(example: Example, tokenizer: Any, template: str | None = None) -> int | None:
    """Return the special token by which the template ends an answer; None for none, or a text."""
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
    asked = {
        i: _turns(example.messages[:-1])
        for i, example in enumerate(examples)
        if example.messages is not None
    }
    chats = _chat_ids(examples, asked, tokenizer, template, add_generation_prompt=True)
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
            "the data is a chat, but the base's tokenizer has no chat template",
            do="take prompt/completion rows, or a base with a chat template",
        )
    texts, problems = render_prompts(
        template,
        list(conversations.values()),
        special_tokens=tokenizer.special_tokens_map,
        add_generation_prompt=add_generation_prompt,
    )
    rows = [
        f"{examples[i].location}: {told}"
        for i, told in zip(conversations, problems, strict=True)
        if told
    ]
    if rows:
        raise DataError(
            f"{len(rows)} of {len(examples)} rows cannot be rendered as chats\n    "
            + "\n    ".join(listed_lines(rows, _SHOWN)),
            do="change these rows so that the template takes them, or mend the template",
        )
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {number: list(row) for number, row in zip(conversations, ids, strict=True)}
