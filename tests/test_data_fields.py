"""Which fields a row may have: what changes a prompt or a weight is never dropped silently."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.data import parse_examples, read_examples
from trans_peft.data.fields import unsupported_fields
from trans_peft.data.templates import through_template
from trans_peft.domain.data import DataSource
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError

PLAIN = {"prompt": "Add 2 and 2.", "completion": " 4"}
CHAT = {
    "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4"}]
}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
READ = ("messages", "tools")
SHAPES = {"prompt/completion": PLAIN, "messages": CHAT, "instruction/output": ALPACA}


def parse(*rows):
    return parse_examples("\n".join(map(json.dumps, rows)).encode(), "rows")


CHANGING = {
    "system": "Answer in French.",
    "System_Prompt": "Answer in French.",
    "systemPrompt": "Answer in French.",
    "system-message": "Answer in French.",
    "history": [["hi", "hello"]],
    "tools": [{"name": "f"}],
    "tool_calls": [{"name": "f"}],
    "tool_choice": "auto",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "documents": [{"text": "x"}],
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": True},
    "enable_thinking": False,
    "reasoning_content": "because",
    "images": ["a.png"],
    "image": "a.png",
    "audio": "a.wav",
    "suffix": "behind",
    "few_shot": ["x"],
    "weight": 0,
    "Weight": 1,
    "sample_weight": 0.5,
    "loss_mask": [0, 1],
    "completion_mask": [0, 1],
    "train": False,
    "chosen": "yes",
    "rejected": "no",
    "completions": ["a"],
    "label": False,
    "labels": [1, 2],
    "input_ids": [1, 2],
    "context": "a text that is not in the prompt",
    "sys": "Answer in French.",
    "sytem": "Answer in French.",
    "system_msg": "Answer in French.",
    "few_shot_prompt": "Q: 1 A: 2",
    "shots": ["x"],
    "tool": {"name": "f"},
    "tool_definitions": [{"name": "f"}],
    "functions_json": "[]",
    "messages_history": ["hi"],
    "previous_turns": ["hi"],
    "multi_turn": ["hi"],
    "chat_template_args": {"x": 1},
    "assistant_prefix": "Sure, ",
    "prefill": "Sure, ",
    "preprompt": "Be short.",
    "image_path": "a.png",
    "image_url": "https://example.com/a.png",
    "completion_weight": 0.5,
    "is_masked": True,
    "chosen_response": "yes",
    "rejected_response": "no",
    "options": ["a text that is not in the prompt"],
    "query": "a text that is not in the prompt",
    "preamble": "a text that is not in the prompt",
}
METADATA = {
    "source": "web", "split": "train", "url": "https://example.com", "category": 3, "score": 0.5,
    "answer": "B", "created_at": "2024-01-01", "label": 3, "labels": ["easy"], "meta": {"tools": 1},
    "difficulty": None, "prompt_id": "7", "num_turns": 2, "language": "en", "turns": 2,
    "image_id": 4, "function_name": "f", "operating_system": "linux", "system_count": 2,
    "history_length": 3, "few_shot_count": 0, "context_length": 2048, "context": 2048,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "name"),
    [(shape, name) for shape in SHAPES for name in CHANGING if (shape, name) != READ],
)
def test_a_field_that_would_change_the_prompt_or_the_loss_is_refused(shape, name):
    with pytest.raises(DataError) as caught:
        parse(SHAPES[shape], SHAPES[shape] | {name: CHANGING[name]})
    assert f"line 2: the field {name!r} is not" in str(caught.value)
    assert "1 of 2 rows" in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_an_empty_field_is_ignored(shape, empty):
    row = SHAPES[shape]
    assert parse(dict.fromkeys(CHANGING, empty) | row) == parse(row)


@pytest.mark.parametrize("shape", SHAPES)
def test_metadata_changes_nothing(shape):
    row = SHAPES[shape]
    assert parse(row | METADATA) == parse(row)


@pytest.mark.parametrize(
    ("row", "more"),
    [
        (PLAIN, {"instruction": "Add 2 and 2.", "input": "2"}),
        (PLAIN, {"output": "4", "question": "Add"}),
        (CHAT, {"prompt": "2 + 2?"}),
        (CHAT, {"conversation": None, "query": "2 + 2?", "response": "It is 4"}),
        (ALPACA, {"response": "4"}),
        (ALPACA, {"question": "Add."}),
    ],
)
def test_a_text_that_the_prompt_or_answer_contains_is_ignored(row, more):
    assert parse(row | more) == parse(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (PLAIN | {"input": "3 and 3"}, "input"),
        (PLAIN | {"instruction": "Subtract."}, "instruction"),
        (CHAT | {"prompt": "Be short."}, "prompt"),
        (CHAT | {"completion": "5"}, "completion"),
        (ALPACA | {"prompt": "Be short."}, "prompt"),
        (PLAIN | {"messages": CHAT["messages"][:1]}, "messages"),
    ],
)
def test_a_text_of_another_shape_that_is_not_used_is_refused(row, name):
    if name == "messages":
        with pytest.raises(DataError, match="prompt/completion and messages"):
            parse(row)
        return
    with pytest.raises(DataError, match=f"line 1: the field '{name}' is not read"):
        parse(row)


@given(
    name=st.one_of(
        st.sampled_from(["name", "tool_calls", "tool_call_id", "weight", "train", "id", "Role"]),
        st.text(max_size=8).filter(lambda name: name not in ("role", "content")),
    ),
    value=st.one_of(st.booleans(), st.integers(), st.text(max_size=4), st.lists(st.integers())),
    at=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_every_unknown_field_of_a_message_is_refused(name, value, at):
    turns = [dict(turn) for turn in CHAT["messages"]]
    turns[at][name] = value
    with pytest.raises(DataError, match=f"line 1: message {at + 1} has the field"):
        parse({"messages": turns})


@pytest.mark.parametrize(
    "content", [None, 4, ["a"], [{"type": "text", "text": "a"}], {"text": "a"}, True]
)
def test_the_content_of_a_message_is_text(content):
    turns = [{"role": "user", "content": content}, CHAT["messages"][1]]
    with pytest.raises(DataError, match="line 1: the content of message 1 must be text"):
        parse({"messages": turns})


@pytest.mark.parametrize("role", [None, 3, [], {}, "tool", "User", "developer", "", "function"])
def test_a_role_that_is_not_known_is_refused(role):
    turns = [{"role": role, "content": "x"}, *CHAT["messages"]]
    with pytest.raises(DataError, match="line 1: message 1 has the role"):
        parse({"messages": turns})


def test_missing_fields_of_a_parquet_struct_are_null_and_ignored(tmp_path):
    turns = [turn | {"tool_calls": None, "name": None} for turn in CHAT["messages"]]
    source = DataSource(str(tmp_path / "rows.parquet"))

    def write(turns):
        table = pyarrow.Table.from_pylist([{"messages": turns, "tools": None}])
        pyarrow.parquet.write_table(table, source.uri)

    write(turns)
    assert read_examples(source, FileStore()) == parse(CHAT)
    turns[0]["name"] = "Kim"
    write(turns)
    with pytest.raises(DataError, match="row 1: message 1 has the field 'name'"):
        read_examples(source, FileStore())


def test_a_raw_row_may_have_other_columns_but_none_that_would_change_the_prompt():
    row = {"question": "2 + 2?", "answer": "4\n#### 4", "context": "dropped", "id": 5}
    ((_, read),) = through_template([("line 1", row)], "gsm8k")
    assert "2 + 2?" in read["prompt"]
    ((_, refused),) = through_template([("line 1", row | {"system": "Be short."})], "gsm8k")
    assert "the field 'system' is not supported" in refused.reason


def test_all_unsupported_fields_are_listed():
    row = PLAIN | {"tools": [1], "weight": 0.5}
    assert len(list(unsupported_fields(row, frozenset(PLAIN), ""))) == 2
    with pytest.raises(DataError) as caught:
        parse(row)
    assert "'tools'" in str(caught.value)
    assert "'weight'" in str(caught.value)
