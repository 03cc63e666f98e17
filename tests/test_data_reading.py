"""Bytes of a data file: whatever they are, rows or a DataError with the place come of them."""

import gzip
import io
import json
import sys
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from trans_peft.data import parse_examples, prompt_ids, read_examples, read_prompts, write_examples
from trans_peft.data.json_rows import json_rows
from trans_peft.data.parsing import checked, unchecked_rows
from trans_peft.data.rows import NO_ANSWER, InvalidRow
from trans_peft.data.templates import TEMPLATES
from trans_peft.domain.data import DataSource
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError

PLAIN = {"prompt": "2 + 2 =", "completion": " 4"}
GOOD = json.dumps(PLAIN)
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * (sys.get_int_max_str_digits() + 1)


def row(fields):
    return GOOD[:-1] + ", " + fields + "}"


FAULTS = {
    "a key twice": (row('"prompt": "x"'), "the key 'prompt' is repeated"),
    "a key of metadata twice": (row('"a": 1, "a": 2'), "the key 'a' is repeated"),
    "a nested key twice": (row('"a": [{"b": 1, "b": 1}]'), "the key 'b' is repeated"),
    "an escaped key twice": (row('"\\u0070rompt": "x"'), "the key 'prompt' is repeated"),
    "NaN": (row('"a": NaN'), "NaN is not JSON"),
    "Infinity": (row('"a": [-Infinity]'), "-Infinity is not JSON"),
    "a float too large": (row('"a": 1e999'), "the number 1e999 is too large"),
    "an integer too large": (row(f'"id": {LONG}'), "digits is too large"),
    "a negative integer too large": (row(f'"a": -{LONG}'), "digits is too large"),
    "nested too deeply": (row(f'"a": {DEEP}'), "nested too deeply"),
    "a lone surrogate in the prompt": (
        '{"prompt": "\\ud800", "completion": "x"}', "prompt has half of a surrogate pair (\\ud800)"
    ),
    "a lone surrogate in the answer": (
        '{"prompt": "x", "completion": "a\\udfff"}', "completion has half of a surrogate pair"
    ),
    "a lone surrogate in the id": (row('"id": "\\ud800"'), "id has half of a surrogate pair"),
    "a lone surrogate in the reference": (
        row('"reference": "\\ud800"'), "reference has half of a surrogate pair"
    ),
    "a lone surrogate in a choice": (
        row('"choices": [" 4", "\\ud800"]'), "a choice has half of a surrogate pair"
    ),
    "a lone surrogate in a message": (
        '{"messages": [{"role": "user", "content": "\\udc00"}, '
        '{"role": "assistant", "content": "x"}]}',
        "the content of message 1 has half of a surrogate pair",
    ),
    "a lone surrogate in the input": (
        '{"instruction": "x", "input": "\\udc00", "output": "x"}', "input has half of a"
    ),
    "a NUL byte": (GOOD[:5] + "\0" + GOOD[5:], "not JSON (Invalid control character"),
    "a byte order mark": ("\ufeff" + GOOD, "not JSON"),
    "two values": (GOOD + GOOD, "unexpected text after the value"),
    "no value": ("undefined", "not JSON"),
    "half a row": (GOOD[:-3], "not JSON"),
    "a row nested too deeply": (DEEP, "nested too deeply"),
    "a role that is a list": (
        '{"messages": [{"role": [], "content": "x"}, {"role": "assistant", "content": "x"}]}',
        "message 1 has the role []",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_line_is_reported_with_its_place(fault):
    line, message = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        parse_examples(f"{GOOD}\n\n{line}\n{GOOD}".encode(), "mine.jsonl")
    assert "mine.jsonl: 1 of 3 rows" in str(caught.value)
    assert "line 3: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_item_is_reported_with_its_place(fault):
    line, message = FAULTS[fault]
    with pytest.raises(DataError) as caught:
        parse_examples(f"[{GOOD},\n {line}, {GOOD}]".encode(), "mine.json")
    assert "mine.json: " in str(caught.value)
    assert "item 2: " in str(caught.value)
    if fault != "two values":
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[", "[,]", f"[{GOOD}", f"[{GOOD},", f"[{GOOD},]", f"[{GOOD}] x", f"[{GOOD} {GOOD}]", "]",
     f"[{GOOD}]\n[{GOOD}]"],
)  # fmt: skip
def test_a_broken_list_is_refused(text):
    with pytest.raises(DataError, match=r"not JSON|must be a JSON object"):
        parse_examples(text.encode(), "mine.json")


@pytest.mark.parametrize("text", ["[]", " [ ] ", "", " \r\n\t"])
def test_a_file_without_rows_is_refused(text):
    with pytest.raises(DataError, match=r"mine\.json has no rows"):
        parse_examples(text.encode(), "mine.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "latin-1", "cp1252"])
def test_a_file_in_another_encoding_is_refused(encoding):
    text = json.dumps(PLAIN | {"prompt": "é"}, ensure_ascii=False)
    with pytest.raises(DataError, match=r"mine\.jsonl(?s:.*)(UTF-|not JSON)"):
        parse_examples(f"{text}\n".encode(encoding), "mine.jsonl")


@pytest.mark.parametrize("text", [GOOD, f"[{GOOD}]", f"[\n{GOOD}\n]\n", f"\r\n{GOOD}\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_list_and_lines_and_a_byte_order_mark_give_the_same_rows(text, mark):
    assert parse_examples((mark + text).encode(), "x") == parse_examples(GOOD.encode(), "x")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(values, min_size=1, max_size=4), st.sampled_from([None, 1]))
@settings(max_examples=60, deadline=None)
def test_any_json_is_read_as_json_reads_it(rows, indent):
    text = json.dumps(rows, indent=indent)
    read = [value for _, value in json_rows(text.encode(), "x")]
    lines = "\n".join(map(json.dumps, rows))
    if not isinstance(rows[0], list):  # a list in the first line may open a list of rows
        assert [value for _, value in json_rows(lines.encode(), "x")] == rows
    if indent or len(rows) > 1 or not isinstance(rows[0], list):
        assert read == rows


messy = st.one_of(
    st.binary(max_size=60),
    st.text('{}[]",:\\ud80nulltrue01e+-. \n\0', max_size=40).map(str.encode),
    st.lists(values, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ["prompt", "completion", "messages", "instruction", "input", "output", "id",
                 "choices", "reference", "system", "label"]
            ),
            values,
            max_size=4,
        ),
        max_size=3,
    ).map(lambda rows: json.dumps(rows).encode()),
)  # fmt: skip


def rows_or_a_data_error(data, name, template=""):
    try:
        examples = checked(unchecked_rows(data, name), name, template)
    except DataError as error:
        assert name in str(error)
    else:
        assert examples


@given(messy, st.sampled_from(["mine.jsonl", "mine.json"]), st.sampled_from(["", *TEMPLATES]))
@example(DEEP.encode(), "mine.json", "")
@example(b'{"prompt": "\\ud800", "completion": "\\ud800"}', "mine.jsonl", "")
@example(("[" * 900 + "]" * 900).encode(), "mine.json", "boolq")
@settings(max_examples=150, deadline=None)
def test_no_bytes_raise_anything_but_a_data_error(data, name, template):
    rows_or_a_data_error(data, name, template)


def parquet(rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_changed_bytes_of_parquet_or_gzip_raise_anything_but_a_data_error(data):
    name = data.draw(st.sampled_from(["mine.parquet", "mine.jsonl.gz", "mine.parquet.gz"]))
    raw = parquet([PLAIN, PLAIN]) if ".parquet" in name else GOOD.encode()
    raw = bytearray(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    rows_or_a_data_error(bytes(raw[: data.draw(st.integers(0, len(raw)))]), name)


def two_columns(name):
    return pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["completion", name, name])


def test_a_repeated_column_is_refused(tmp_path):
    source = DataSource(str(tmp_path / "mine.parquet"))
    pyarrow.parquet.write_table(two_columns("prompt"), source.uri)
    with pytest.raises(DataError, match=r"mine\.parquet has several columns of the same name"):
        read_examples(source, FileStore())
    struct = pyarrow.struct([("role", pyarrow.string()), ("role", pyarrow.string())])
    turns = pyarrow.array([[]], pyarrow.list_(struct))
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), source.uri)
    with pytest.raises(DataError, match=r"messages.*role"):
        read_examples(source, FileStore())


def test_a_text_in_parquet_that_is_not_utf_8_is_refused(tmp_path):
    source = DataSource(str(tmp_path / "mine.parquet"))
    text = pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["a"]}), source.uri)
    with pytest.raises(DataError, match=r"mine\.parquet"):
        read_examples(source, FileStore())


def test_what_was_read_can_be_written(tmp_path):
    """A text that no file can hold is refused on reading, not found while writing."""
    texts = ["\u2028", "\0", "\U0001f600", "\ufeff", "\\ud800"]
    rows = [{"prompt": text + "x", "completion": text + "y"} for text in texts]
    examples = parse_examples("\n".join(map(json.dumps, rows)).encode(), "x")
    path = write_examples(examples, tmp_path / "rows.jsonl")
    assert parse_examples(path.read_bytes(), "x") == examples


def test_an_invalid_item_of_a_list_does_not_affect_others():
    text = f'[{GOOD}, {{"a": 1, "a": 2}}, 5, {GOOD}]'
    read = json_rows(text.encode(), "x")
    assert [where for where, _ in read] == ["item 1", "item 2", "item 3", "item 4"]
    assert [isinstance(value, InvalidRow) for _, value in read] == [False, True, False, False]


def test_an_example_has_the_place_of_its_row(tmp_path):
    """The id of a row without one is a hash, which does not help to find the row."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = tmp_path / "mine.jsonl"
    path.write_text(f"\n{json.dumps({'messages': turns})}\n{json.dumps({'messages': turns})}")
    examples = read_examples(DataSource(str(path)), FileStore())
    assert [example.place for example in examples] == ["line 2", "line 3"]
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        DataError, match=rf"line 3 \(id {examples[1].id}\): the chat template failed"
    ):
        prompt_ids(examples, tokenizer, "{{ raise_exception('no') }}")
    assert replace(examples[0], place="") == examples[0]


PROMPT_ROWS = {
    "prompt": ({"prompt": "a"}, {"completion": "b"}),
    "instruction": ({"instruction": "a", "input": "i"}, {"output": "b"}),
    "messages": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        {"role": "assistant", "content": "b"},
    ),
}


@pytest.mark.parametrize("shape", PROMPT_ROWS)
def test_prompts_are_those_of_complete_rows(tmp_path, shape):
    row, answer = PROMPT_ROWS[shape]
    turns = row.get("messages")
    complete = {"messages": [*turns, answer]} if turns else row | answer
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(complete)}\n")
    (without, with_answer), answered, _ = read_prompts(DataSource(str(path)), FileStore())
    assert answered == 1
    path.write_text(json.dumps(complete))
    (expected,) = read_examples(DataSource(str(path)), FileStore())
    for found in (without, with_answer):
        assert found.completion == NO_ANSWER
        assert found.prompt == expected.prompt
        assert (found.messages or ())[:-1] == (expected.messages or ())[:-1]


def test_two_answers_at_the_end_of_a_chat_are_no_part_of_the_prompt(tmp_path):
    turns = [{"role": "user", "content": "a"}]
    answers = [{"role": "assistant", "content": text} for text in ("secret", "secret too")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns + answers}))
    (found,), answered, _ = read_prompts(DataSource(str(path)), FileStore())
    assert answered == 1
    assert [turn.content for turn in found.messages] == ["a", NO_ANSWER]


def test_answers_do_not_leave_the_process_that_parses_prompts(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "completion": "secret", "choices": ["secret", "b"], "reference": "secret"}
    path.write_text(json.dumps(row))
    found = read_prompts(DataSource(str(path)), FileStore())
    assert found.answered == 1
    assert "secret" not in repr(found)


def test_invalid_prompts_are_left_out_without_their_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"id": "alice", "prompt": "a"},
        {"id": "alice", "prompt": "b"},
        {"prompt": "secret", "tools": ["secret"]},
        {"secret": "secret"},
        "secret",
        {"instruction": "c"},
    ]
    path.write_text("\n".join([*map(json.dumps, rows), "{secret"]))
    found = read_prompts(DataSource(str(path)), FileStore())
    assert found.invalid == ("line 3", "line 4", "line 5", "line 7")
    assert [example.prompt[-1] for example in found.prompts[:2]] == ["a", "b"]
    assert "secret" not in repr(found)
    assert "alice" not in repr(found)


def test_prompts_are_read_from_files_only(tmp_path):
    for source in (DataSource("hub:openai/gsm8k"), DataSource("rows.jsonl", template="gsm8k")):
        with pytest.raises(DataError, match="from files only"):
            read_prompts(source, FileStore())
