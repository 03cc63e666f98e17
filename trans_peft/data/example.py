"""One question and its answer, as text or as a chat, and the token ids that a model sees of it."""

from dataclasses import dataclass
from typing import Any

from trans_peft.errors import DataError

__all__ = ["Example", "Message"]


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
    `choices` are all the answers to choose from, the completion among them. `reference` is what an
    answer is marked against where that is not the completion (unit tests, for a program).
    """

    id: str
    prompt: str
    completion: str
    messages: tuple[Message, ...] | None = None
    choices: tuple[str, ...] = ()
    reference: str = ""

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


def _need_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the data is a chat, but the base's tokenizer has no chat template",
            do="take prompt/completion rows, or a base with a chat template",
        )
