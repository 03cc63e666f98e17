"""Rows with a prompt, a chosen and a rejected answer."""

import json

import pytest

from trans_peft.data import ChatMessage, Example, parse_examples, write_examples
from trans_peft.data.parsing import examples_in
from trans_peft.domain.data import DataSource
from trans_peft.errors import DataError

USER = {"role": "user", "content": "Hello"}
TEXT = {"prompt": "Hello ", "chosen": "Hi!", "rejected": "Go away."}
CHAT = {
    "prompt": [USER],
    "chosen": [{"role": "assistant", "content": "Hi!"}],
    "rejected": [{"role": "assistant", "content": "Go away."}],
}


def lines(*rows):
    return "\n".join(map(json.dumps, rows)).encode()


def read(*rows):
    return parse_examples(lines(*rows), "pairs.jsonl", preferences=True)


def test_texts_and_chats_are_read():
    turns = (ChatMessage("user", "Hello"), ChatMessage("assistant", "Hi!"))
    (text,) = read({**TEXT, "id": 7, "score_chosen": 0.9})
    (chat,) = read(CHAT)
    assert text == Example("7", "Hello ", "Hi!", rejected="Go away.")
    assert chat == Example(chat.id, "", "Hi!", turns, rejected="Go away.")
    assert chat.place == "line 1"
    assert chat.with_rejected() == Example(
        chat.id, "", "Go away.", (turns[0], ChatMessage("assistant", "Go away."))
    )
    assert chat.trl_row() == CHAT
    assert text.characters == len("Hello Hi!Go away.")


@pytest.mark.parametrize("rows", [(TEXT, TEXT), (CHAT, CHAT)], ids=["texts", "chats"])
def test_written_preferences_are_read_back(tmp_path, rows):
    examples = read(*rows)
    assert examples[0].id != examples[1].id
    file = write_examples(examples, tmp_path / "pairs.jsonl")
    assert parse_examples(file.read_bytes(), "again", preferences=True) == examples
    source = DataSource("pairs.jsonl")
    assert examples_in(file.read_bytes(), source, limit=1, preferences=True) == examples[:1]


BAD = {
    "no object": (["Hello"], "line 2: must be a JSON object, found list"),
    "no rejected": (
        {"prompt": "Hello", "chosen": "Hi!"},
        "line 2: must have prompt, chosen, rejected, found the fields prompt, chosen",
    ),
    "equal": ({**TEXT, "rejected": "Hi!"}, "line 2: chosen and rejected are equal"),
    "empty": ({**TEXT, "rejected": " "}, "line 2, rejected: completion is empty"),
    "text after a chat": (
        {**CHAT, "chosen": "Hi!"},
        "line 2, chosen: must be a list with one message, because prompt is a list",
    ),
    "a whole chat": (
        {**CHAT, "rejected": [USER, *CHAT["rejected"]]},
        "line 2, rejected: must be a list with one message",
    ),
    "another role": ({**CHAT, "chosen": [USER]}, "line 2, chosen: the last message must have"),
    "a weight": ({**TEXT, "weight": 2}, "line 2, chosen: the field 'weight' is not supported"),
}


def test_all_bad_rows_are_reported_at_once():
    with pytest.raises(DataError) as caught:
        read(TEXT, *(row for row, _ in BAD.values()))
    found = str(caught.value)
    for number, (_, message) in enumerate(BAD.values(), start=2):
        assert message.replace("line 2", f"line {number}") in found
    assert "rows with prompt, chosen and rejected" in found


def test_preferences_are_no_answers():
    with pytest.raises(DataError, match="if the recipe has objective: dpo"):
        parse_examples(lines(TEXT), "pairs.jsonl")
    with pytest.raises(DataError, match="must have prompt, chosen, rejected"):
        read({"prompt": "Hello", "completion": "Hi!"})
