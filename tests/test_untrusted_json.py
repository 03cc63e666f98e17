"""JSON from outside: bounds on nesting and on the number of values, and linear time."""

import json
import time

import pytest

from trans_peft.data import parse_examples
from trans_peft.domain.adapter_config import parse_adapter_config
from trans_peft.domain.bounds import MAX_ADAPTER_CONFIG_BYTES, MAX_JSON_DEPTH, MAX_JSON_VALUES
from trans_peft.domain.excerpts import LONGEST_EXCERPT, excerpt
from trans_peft.domain.untrusted_json import check_value_count, duplicates, parse_json
from trans_peft.errors import DataError


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"x":', "}"), ('[{"x":', "}]")])
def test_nesting_is_bounded(opening, closing):
    depth = MAX_JSON_DEPTH // (2 if len(closing) == 2 else 1)
    assert parse_json(nested(depth, opening, closing))
    for deeper in (depth + 1, 480, 900, 100_000):
        with pytest.raises(ValueError, match=f"nested more than {MAX_JSON_DEPTH} levels"):
            parse_json(nested(deeper, opening, closing))


def test_the_number_of_values_is_bounded_before_parsing():
    text = "[" + "{}," * (MAX_JSON_VALUES // 2) + "{}]"
    started = time.process_time()
    with pytest.raises(ValueError, match=f"at most {MAX_JSON_VALUES}"):
        parse_json(text)
    assert time.process_time() - started < 1
    check_value_count("[" + "1," * (MAX_JSON_VALUES - 2) + "1]")


def test_text_that_is_not_json_is_a_value_error():
    for text in ("", "{", "nul", '{"a":1}x', "\ufeff1"):
        with pytest.raises(ValueError):
            parse_json(text)


def test_duplicates_are_sorted_and_listed_once():
    assert duplicates(["b", "a", "b", "c", "a", "b"]) == ["a", "b"]
    assert duplicates(["a", "b"]) == []


def test_an_excerpt_is_short_and_reports_the_length():
    assert excerpt("it's") == repr("it's")
    assert excerpt("x" * 5_000_000) == "'" + "x" * LONGEST_EXCERPT + "'... (5000000 characters)"


@pytest.fixture
def many_keys() -> bytes:
    names = [f'"k{n:06}":1' for n in range(90_000)]
    return ("{" + ",".join([*names, '"k000000":1']) + "}").encode()


def test_a_repeated_key_of_a_large_adapter_config_is_found_in_linear_time(many_keys):
    assert len(many_keys) > MAX_ADAPTER_CONFIG_BYTES
    started = time.process_time()
    with pytest.raises(ValueError, match="repeated keys: 'k000000'"):
        parse_adapter_config(many_keys)
    assert time.process_time() - started < 2


def test_a_repeated_key_of_a_large_row_is_found_in_linear_time(many_keys):
    started = time.process_time()
    with pytest.raises(DataError, match="line 1: the key 'k000000' is repeated"):
        parse_examples(many_keys, "rows")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("depth", [480, 900])
def test_nesting_is_a_problem_of_an_adapter_config_and_of_a_row(depth):
    config = f'{{"peft_type": "LORA", "x": {nested(depth)}}}'
    with pytest.raises(ValueError, match=r"it is not JSON .nested more than"):
        parse_adapter_config(config.encode())
    row = f'{{"prompt": "a", "completion": "b", "context": {nested(depth)}}}'
    with pytest.raises(DataError, match=r"line 1: not JSON that can be read .nested more than"):
        parse_examples(row.encode(), "rows")


def test_errors_about_an_adapter_config_do_not_quote_it_whole():
    config = {"peft_type": "LORA", "revision": ["x" * 500_000], "modules_to_save": "y" * 400_000}
    with pytest.raises(ValueError, match="revision must be text") as caught:
        parse_adapter_config(json.dumps(config).encode())
    assert len(str(caught.value)) < 1000


def test_errors_about_rows_do_not_quote_them_whole():
    long = "x" * 1_000_000
    row = {"prompt": "a", "completion": "b"}
    rows = [row | {"id": long}, row | {"id": long}, row | {f"tools_{long}": 1, "tools": [long]}]
    with pytest.raises(DataError, match="is also the id of line 1") as caught:
        parse_examples("\n".join(map(json.dumps, rows)).encode(), "rows")
    assert len(str(caught.value)) < 2000
