"""Clusters and slices are read from the columns that a suite's data names."""

import json

import pytest

from trans_peft.data import pin, read_examples
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, ItemResult, Suite
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError
from trans_peft.lifecycle.evaluation import with_groups

ROWS = [
    {"prompt": "1 + 1 =", "completion": " 2", "conversation": "a", "language": "de"},
    {"prompt": "1 + 2 =", "completion": " 3", "conversation": "a", "language": "en"},
    {"prompt": "1 + 3 =", "completion": " 4", "conversation": 7, "language": " en "},
]


@pytest.fixture
def read(tmp_path):
    def read(rows, **columns):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = columns.pop("template", "")
        return read_examples(DataSource(str(path), "", template, **columns), FileStore())

    return read


def test_the_columns_that_the_source_names_are_read(read):
    examples = read(ROWS, cluster="conversation", slice="language")
    assert [(e.cluster, e.slice) for e in examples] == [("a", "de"), ("a", "en"), ("7", "en")]


def test_white_space_around_a_value_is_removed(read):
    rows = [{"prompt": f"{i}", "completion": "x", "c": c} for i, c in enumerate(["A ", "A", "\tA"])]
    for columns in ({"cluster": "c"}, {"slice": "c"}):
        assert [e.cluster + e.slice for e in read(rows, **columns)] == ["A"] * 3


def test_columns_do_not_change_the_ids_of_items(read):
    plain = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    before = read(plain)
    assert [e.id for e in read(ROWS, cluster="conversation")] == [e.id for e in before]
    assert {(e.cluster, e.slice) for e in before} == {("", "")}


def test_columns_of_rows_that_a_template_converts_are_read(read):
    rows = [{"question": f"{n}?", "answer": f"so #### {n}", "topic": f"t{n}"} for n in range(2)]
    assert [e.slice for e in read(rows, slice="topic", template="gsm8k")] == ["t0", "t1"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "line 2 (id {id}): the column 'customer' is empty"),
        ("", "line 2 (id {id}): the column 'customer' is empty"),
        ("  ", "line 2 (id {id}): the column 'customer' is '  '"),
        (1.5, "line 2 (id {id}): the column 'customer' is '1.5'"),
        (True, "line 2 (id {id}): the column 'customer' is 'True'"),
        ("x" * 201, "line 2 (id {id}): the column 'customer' has 201 characters"),
    ],
)
def test_a_row_without_a_valid_value_is_an_error(read, value, message):
    rows = [{**row, "customer": "c"} for row in ROWS]
    rows[1]["customer"] = value
    id_ = read(ROWS, cluster="conversation")[1].id
    with pytest.raises(DataError) as error:
        read([{**row, "conversation": ""} for row in rows], cluster="customer")
    assert message.format(id=id_) in str(error.value)
    assert "1 values of a column" in str(error.value)


def test_a_column_that_no_row_has_is_an_error_that_lists_the_rows(read):
    with pytest.raises(DataError, match=r"3 values .*\n.*line 1 .*'customer' is empty"):
        read([{**row, "conversation": ""} for row in ROWS], cluster="customer")


def test_the_columns_are_part_of_the_suites_hash_only_if_they_are_named():
    data = DataSource("rows.jsonl", "a" * 64)
    plain = Suite("tickets", data)
    # The hash of this suite before data sources had these fields.
    assert plain.suite_sha256 == "b703348f28ccdf616bef0fb01b69f4f003aa51c80c5553340b4170c1c699613e"
    hashes = {
        Suite("tickets", DataSource("rows.jsonl", "a" * 64, cluster=c, slice=s)).suite_sha256
        for c in ("", "customer")
        for s in ("", "customer")
    }
    assert len(hashes) == 4 and plain.suite_sha256 in hashes


def test_pinning_keeps_the_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    pinned = pin(DataSource(str(path), cluster="conversation"), FileStore())
    assert pinned.cluster == "conversation" and pinned.sha256


def test_results_get_the_groups_of_their_examples(read):
    examples = read(ROWS, cluster="conversation", slice="language")
    items = tuple(ItemResult(example.id, True) for example in reversed(examples))
    found = with_groups(Evaluation("tickets", "w", "b", "s", "d", items), examples)
    assert [(item.cluster, item.slice) for item in found.items] == [
        ("7", "en"),
        ("a", "en"),
        ("a", "de"),
    ]
    assert [item.id for item in found.items] == [item.id for item in items]


def test_more_than_twenty_slices_are_an_error(read):
    rows = [{**ROWS[0], "conversation": "", "prompt": f"{n}", "topic": n} for n in range(21)]
    with pytest.raises(
        DataError, match=r"'topic' has too many different values(.|\n)*at most 20(.|\n)*21"
    ):
        read(rows, slice="topic")
    assert len(read(rows[1:], slice="topic")) == 20
