import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from trans_peft.data import (
    ChatMessage,
    Example,
    parse_examples,
    pin,
    prompt_ids,
    read_examples,
    write_examples,
)
from trans_peft.domain.data import DataSource
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError, IntegrityError, NotFoundError

STORE = FileStore()
PLAIN = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
}
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}


def jsonl(folder: Path, *rows: object) -> DataSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(path))


def read(folder: Path, *rows: object) -> tuple[Example, ...]:
    return read_examples(jsonl(folder, *rows), STORE)


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "turns"),
    [
        (PLAIN, "2 + 2 =", " 4", None),
        (CHAT, "", "4", 3),
        (
            ALPACA,
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n",
            "4",
            None,
        ),
        (
            ALPACA | {"input": ""},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
            "4",
            None,
        ),
    ],
)
def test_each_shape_gives_an_example(tmp_path, row, prompt, completion, turns):
    (example,) = read(tmp_path, row)
    assert (example.prompt, example.completion) == (prompt, completion)
    assert (example.messages and len(example.messages)) == turns


def test_braces_in_an_instruction_stay_as_they_are(tmp_path):
    (example,) = read(tmp_path, ALPACA | {"instruction": "Fill {input} in {x}"})
    assert "Fill {input} in {x}" in example.prompt


BAD = [
    ("{", "not JSON"),
    ('{"prompt": NaN, "completion": "x"}', "NaN is not JSON"),
    ("[1]", "must be a JSON object, found list"),
    ('{"text": "x"}', "must have one of the known shapes, found the fields text"),
    (json.dumps(PLAIN | CHAT), "found prompt/completion and messages"),
    (json.dumps(PLAIN | {"completion": " "}), "completion is empty"),
    (json.dumps(PLAIN | {"prompt": 3}), "prompt must be text, found int"),
    (json.dumps(PLAIN | {"prompt": None}), "prompt must be text, found NoneType"),
    (json.dumps(PLAIN | {"id": 1.5}), "id must be text or a whole number, found 1.5"),
    (json.dumps(PLAIN | {"id": True}), "id must be text or a whole number, found True"),
    (json.dumps(PLAIN | {"id": ""}), "id must be text or a whole number, found ''"),
    (json.dumps(ALPACA | {"input": 3}), "input must be text, found int"),
    (json.dumps({"messages": []}), "at least two messages, a question and its answer"),
    (
        json.dumps({"messages": CHAT["messages"][:2]}),
        "the last message must have the role assistant",
    ),
    (
        json.dumps({"messages": CHAT["messages"][::2]}),
        "no message before the answer has the role user",
    ),
    (json.dumps({"messages": ["hi", "ho"]}), "message 1 must be an object"),
    (
        json.dumps({"messages": [{"role": "tool", "content": "x"}, *CHAT["messages"][1:]]}),
        "message 1 has the role 'tool'",
    ),
    (
        json.dumps({"messages": CHAT["messages"][1:2] + CHAT["messages"]}),
        "which only the first message may have",
    ),
    (
        json.dumps({"messages": [{"role": "user", "content": ""}, CHAT["messages"][2]]}),
        "the content of message 1 is empty",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_is_refused_with_its_line_and_reason(line, reason):
    with pytest.raises(DataError, match=r"1 of 2 rows") as caught:
        parse_examples(f"{json.dumps(PLAIN)}\n{line}\n".encode(), "rows")
    assert "line 2: " in str(caught.value)
    assert reason in str(caught.value)


def test_all_invalid_rows_are_listed_in_one_error():
    lines = "\n".join([*(line for line, _ in BAD), ""]).encode()
    with pytest.raises(DataError) as caught:
        parse_examples(lines, "rows")
    for number, (_, reason) in enumerate(BAD, start=1):
        assert f"line {number}: " in str(caught.value)
        assert reason in str(caught.value)


def test_a_long_list_of_bad_rows_is_cut_but_counted():
    with pytest.raises(DataError, match=r"rows: 1000 of 1000 rows are invalid") as caught:
        parse_examples(b"{\n" * 1000, "rows")
    assert "and 980 more" in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_invalid_utf8_is_a_bad_row():
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        parse_examples(b'{"prompt": "\xff"}\n', "rows")


def test_rows_of_two_shapes_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"prompt/completion \(first in line 1\), messages"):
        read(tmp_path, PLAIN, CHAT)


def test_a_repeated_id_is_refused(tmp_path):
    with pytest.raises(DataError, match="line 3: id '7' is also the id of line 1"):
        read(tmp_path, PLAIN | {"id": 7}, PLAIN | {"id": 8}, PLAIN | {"id": "7"})


@pytest.mark.parametrize("rows", [b"", b"\n \n"])
def test_no_rows_is_an_error(rows):
    with pytest.raises(DataError, match="no rows"):
        parse_examples(rows, "rows")


texts = st.text(min_size=1, max_size=8).filter(lambda text: text.strip())
plain_rows = st.fixed_dictionaries({"prompt": texts, "completion": texts})


@given(rows=st.lists(plain_rows, min_size=1, max_size=4), seed=st.integers())
@settings(max_examples=25, deadline=None)
def test_ids_do_not_depend_on_the_order_of_rows(rows, seed):
    shuffled = random.Random(seed).sample(rows, len(rows))
    lines = [
        "".join(json.dumps(row) + "\n" for row in order).encode() for order in (rows, shuffled)
    ]
    first, second = (parse_examples(data, "rows") for data in lines)
    assert len({example.id for example in first}) == len(rows)
    assert {e.id: e for e in first} == {e.id: e for e in second}


@given(rows=st.lists(plain_rows, min_size=1, max_size=4, unique_by=str))
@settings(max_examples=20, deadline=None)
def test_written_examples_read_back_equal(tmp_path_factory, rows):
    chat = [
        {"messages": [{"role": "user", "content": row["prompt"]}, CHAT["messages"][2]]}
        for row in rows
    ]
    for shape in (rows, chat):
        examples = parse_examples("\n".join(map(json.dumps, shape)).encode(), "rows")
        path = write_examples(examples, tmp_path_factory.getbasetemp() / "written.jsonl")
        assert parse_examples(path.read_bytes(), "rows") == examples


def test_parquet_and_json_lines_give_the_same_examples(tmp_path):
    rows = [PLAIN, PLAIN | {"completion": " 5"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    parquet = read_examples(DataSource(str(tmp_path / "rows.parquet")), STORE)
    assert parquet == read(tmp_path, *rows)


def test_a_chat_in_parquet_is_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT]), tmp_path / "rows.parquet")
    assert read_examples(DataSource(str(tmp_path / "rows.parquet")), STORE) == read(tmp_path, CHAT)


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"{}")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_examples(DataSource(str(tmp_path / "rows.parquet")), STORE)


def test_a_hub_data_set_is_read_by_name_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([PLAIN])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = read_examples(DataSource("hub:someone/sums:easy:test"), STORE)
    assert [example.completion for example in examples] == [" 4"]
    pinned = pin(DataSource("hub:someone/sums"), STORE)
    assert read_examples(pinned, STORE) == examples
    assert asked[:2] == [("someone/sums", "easy", "test"), ("someone/sums", None, "train")]


@pytest.mark.parametrize(
    ("uri", "config", "split"),
    [
        ("hub:meta-math/MetaMathQA::train[:100000]", None, "train[:100000]"),
        ("hub:someone/sums:easy:train[10%:20%]+test[-5:]", "easy", "train[10%:20%]+test[-5:]"),
    ],
)
def test_a_slice_of_a_split_is_read(monkeypatch, uri, config, split):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((config, split))
        return datasets.Dataset.from_list([PLAIN])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_examples(DataSource(uri), STORE)
    assert asked == [(config, split)]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hub:o/n::train[5]", r"the split 'train\[5\]', which .* train\[:100000\]"),
        ("hub:o/n::train[:5", "the split"),
        ("hub:o/n::train[:300%]", "Percent slice"),
        ("hub:o/n:main:test:more", "the split 'test:more'"),
        ("hub:o/n:train[:5]", "after a second colon"),
    ],
)
def test_a_wrong_slice_is_refused_before_the_hub_is_asked(monkeypatch, uri, message):
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_examples(DataSource(uri), STORE)


@pytest.mark.parametrize("uri", ["rows.csv", "rows", "hub:", "hub:a:b:c:d"])
def test_an_unsupported_uri_is_refused(uri):
    with pytest.raises(DataError, match="expected"):
        read_examples(DataSource(uri), STORE)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        pin(DataSource(str(tmp_path / "rows.jsonl")), STORE)


def test_a_pinned_source_with_other_bytes_is_refused(tmp_path):
    source = pin(jsonl(tmp_path, PLAIN), STORE)
    assert read_examples(source, STORE)
    jsonl(tmp_path, PLAIN | {"completion": " 5"})
    with pytest.raises(IntegrityError, match=source.sha256):
        read_examples(source, STORE)
    with pytest.raises(IntegrityError):
        pin(source, STORE)


def test_limit_keeps_the_first_rows_but_checks_all(tmp_path):
    source = jsonl(tmp_path, PLAIN | {"id": 1}, PLAIN | {"id": 2}, PLAIN | {"id": 3})
    assert [e.id for e in read_examples(source, STORE, limit=2)] == ["1", "2"]
    with pytest.raises(DataError):
        read_examples(jsonl(tmp_path, PLAIN, {}), STORE, limit=1)


def test_a_prompt_is_the_start_of_the_whole_in_token_ids():
    tokenizer = tiny_tokenizer()
    chat = Example("1", "", "4", (ChatMessage("user", "2 + 2?"), ChatMessage("assistant", "4")))
    for example in (Example("2", "2 + 2 =", " 4"), chat):
        prompt, whole = example.prompt_ids(tokenizer), example.full_ids(tokenizer)
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == f"{example.completion}<eos>"


def test_a_chat_needs_a_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    chat = Example("1", "", "4", (ChatMessage("user", "2 + 2?"), ChatMessage("assistant", "4")))
    with pytest.raises(DataError, match="no chat template"):
        chat.prompt_ids(tokenizer)


def test_all_chats_that_the_template_refuses_are_listed():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no ' ~ messages[0].role) }}"
    chats = [
        Example(id_, "", "4", (ChatMessage("user", "2 + 2?"), ChatMessage("assistant", "4")))
        for id_ in ("1", "2")
    ]
    with pytest.raises(DataError) as caught:
        prompt_ids([Example("0", "plain", "4"), *chats], tokenizer)
    assert "2 of 3 rows" in str(caught.value)
    assert "id 1: the chat template failed: TemplateError: no user" in str(caught.value)
    assert "id 2" in str(caught.value)
    given_template = "{{ messages[0].content }}"
    found = prompt_ids([Example("0", "plain", "4"), *chats], tokenizer, given_template)
    assert [tokenizer.decode(ids) for ids in found] == ["plain", "2 + 2?", "2 + 2?"]
