"""Data files that would take more memory or time than they may."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from trans_peft.data import parsing, read_examples, sources
from trans_peft.data.parsing import checked
from trans_peft.domain.bounds import MAX_DATA_ROWS, MAX_ROW_CHARACTERS
from trans_peft.domain.data import DataSource
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError, LimitExceededError
from trans_peft.isolation import CallLimits

STORE = FileStore()
ROW = {"prompt": "2 + 2 =", "completion": " 4"}


def repeated(text: str, rows: int) -> pyarrow.Table:
    """Columns with the same text in every row, which is stored once."""
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text])
    )
    return pyarrow.table({"prompt": texts, "completion": texts})


def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(repeated("x" * 1_000_000, 4_000), path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=f"(?s){path} holds too much data.*at most 1024 MiB"):
        read_examples(DataSource(str(path)), STORE)


def test_one_batch_that_is_larger_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "_LIMITS", CallLimits(memory_bytes=256 << 20))
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(repeated("x" * 40_000_000, 30), path)
    with pytest.raises((LimitExceededError, DataError), match=f"{path} (needs more mem|holds too)"):
        read_examples(DataSource(str(path)), STORE)


def test_a_parquet_file_with_too_many_rows_is_refused_by_its_metadata(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(repeated("x", MAX_DATA_ROWS + 1), path)
    with pytest.raises(DataError, match=f"(?s){path} has too many rows.*{MAX_DATA_ROWS + 1}"):
        read_examples(DataSource(str(path)), STORE)


@pytest.mark.parametrize("members", [1, 3])
def test_a_gzip_file_is_not_decompressed_beyond_the_bound(members):
    data = gzip.compress(b" " * 1000) * members
    assert len(parsing._decompressed(data, "rows.jsonl.gz", 3000)) == 1000 * members
    with pytest.raises(DataError, match=r"rows.jsonl.gz holds too much data"):
        parsing._decompressed(data, "rows.jsonl.gz", 1000 * members - 1)


@pytest.mark.parametrize("text", ["[" + "{}," * 4_000_000 + "{}]", '{"a":[' + "[]," * 4_000_000])
def test_json_that_takes_more_memory_than_it_may_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(parsing, "_LIMITS", CallLimits(memory_bytes=128 << 20))
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(LimitExceededError, match=f"(?s)the data file {path} needs more memory"):
        read_examples(DataSource(str(path)), STORE)


@pytest.mark.parametrize("text", ['{"a":' * 100_000, "[" * 100_000, '{"a":[{"b":' * 50_000])
def test_deeply_nested_json_is_an_invalid_row(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + text + "\n")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_examples(DataSource(str(path)), STORE)


def test_a_stored_file_is_not_read_beyond_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DATA_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 100)
    with pytest.raises(DataError, match=f"{path} is too large"):
        read_examples(DataSource(str(path)), STORE)


def test_rows_that_are_too_long_are_refused_by_id():
    rows = [("line 1", ROW), ("line 2", {"id": "b", "prompt": "x", "completion": "y"})]
    rows.append(("line 3", {"id": "c", "prompt": "x" * MAX_ROW_CHARACTERS, "completion": "y"}))
    with pytest.raises(DataError, match=r"(?s)1 of 3 rows are too long.*line 3 \(id c\): "):
        checked(rows, "rows", "")


def test_surrogates_and_line_separators_survive_the_child_process(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = ROW | {"prompt": "a\u2028b\x85c \N{GRINNING FACE}", "choices": [" 4", " 5"], "id": "x"}
    path.write_text(json.dumps(row) + "\r\n" + json.dumps(row | {"id": "y"}, ensure_ascii=False))
    first, second = read_examples(DataSource(str(path)), STORE)
    assert first.prompt == second.prompt == row["prompt"]
    assert first.choices == (" 4", " 5")
