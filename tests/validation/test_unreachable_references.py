"""References that decoding cannot produce are refused, by item, before the model runs."""

import pytest

from tests.tiny import tiny_tokenizer
from trans_peft.data import ChatMessage, Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.errors import DataError, InvalidSpecError
from trans_peft.validation.tokenized_suite import prepare

TOKENIZER = tiny_tokenizer()  # a token for each byte


def suite(**options):
    return Suite("s", DataSource("x.jsonl", "0" * 64), **options)


def prepared(examples, **options):
    return prepare(TOKENIZER, suite(**options), examples, context=99).examples


@pytest.mark.parametrize("stop", [("",), ("\n", ""), "\n"])
def test_an_empty_stop_string_is_refused(stop):
    with pytest.raises(InvalidSpecError, match="stop must be a list of strings that are not empty"):
        suite(stop=stop)


@pytest.mark.parametrize(
    "example",
    [
        Example("b", "a", "abc"),
        Example("b", "a", " ab\n"),
        Example("b", "a", "x", reference="abc"),
        Example("b", "", "b", (ChatMessage("user", "a"), ChatMessage("assistant", "b"))),
    ],
)
def test_a_reference_with_a_stop_string_is_refused_by_item(example):
    with pytest.raises(DataError, match=r"id b: its reference contains the stop string 'b'"):
        prepared([Example("a", "a", "c"), example], stop=("b",))


@pytest.mark.parametrize("completion", ["a\n", "\na", " \n a \n"])
def test_a_stop_string_in_the_white_space_around_a_reference_does_not_count(completion):
    assert prepared([Example("a", "a", completion)], stop=("\n",))


@pytest.mark.parametrize(
    "example",
    [
        Example("b", "a", "abcde"),
        Example("b", "a", " abcde "),
        Example("b", "a", "x", reference="abcde"),
        Example("b", "", "abcde", (ChatMessage("user", "a"), ChatMessage("assistant", "abcde"))),
    ],
)
def test_a_reference_longer_than_an_answer_is_refused_by_item(example):
    with pytest.raises(DataError, match=r"id b: its reference has 5 tokens, and an answer at most"):
        prepared([Example("a", "a", "c"), example], max_new_tokens=4)
    assert prepared([example], max_new_tokens=5)


def test_white_space_around_a_reference_takes_no_tokens():
    assert prepared([Example("a", "a", "  abcd   ")], max_new_tokens=4)


def test_a_reference_with_an_end_token_is_refused_by_item():
    with pytest.raises(DataError, match="id b: its reference contains the token that ends"):
        prepared([Example("b", "a", "b<eos>")])


@pytest.mark.parametrize(
    ("scoring", "completion"),
    [("regex:b|c", "abcde"), ("json_equal", '{"b":\n "x"}'), ("math_verify:b", "ab 1"),
     ("chrf", "a b c d e"), ("label_f1", "a\nb")],
)  # fmt: skip
def test_other_rules_accept_answers_of_other_texts(scoring, completion):
    graded = scoring in ("chrf", "label_f1")
    assert prepared(
        [Example("a", "a", completion)],
        scoring=scoring,
        threshold=50.0 if graded else None,
        stop=("b", "\n"),
        max_new_tokens=4,
    )
