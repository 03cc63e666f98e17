"""Values that two sandboxes exchange: what is encoded, and what decoding accepts."""

import json
import signal
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trans_peft.sandbox import protocol, values

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False)
    | st.fractions() | st.just(range(1, 9, 2))
)  # fmt: skip
hashables = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(deque)
        | st.sets(hashables, max_size=3)
        | st.frozensets(hashables, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(hashables, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=10,
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["object", "type", *values._CODECS]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)  # fmt: skip


def refuse(value: object) -> object:
    raise values.UnrepresentableError(repr(value))


def round_trip(value: object) -> object:
    return values.decode(json.loads(json.dumps(values.encode(value, refuse))), refuse)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_plain_values_keep_their_value_and_type(value):
    decoded = round_trip(value)
    assert decoded == value
    assert repr(decoded) == repr(value) or isinstance(
        value, set | frozenset | dict | list | tuple | deque
    )
    assert type(decoded) is type(value)


@pytest.mark.parametrize(
    ("value", "decoded"),
    [
        (10**5000, 10**5000),
        (float("inf"), float("inf")),
        ("\ud800\0", "\ud800\0"),
        (Decimal("1.10"), Decimal("1.10")),
        (Fraction(1, 3), Fraction(1, 3)),
        (type("Pair", (tuple,), {})((1, 2)), (1, 2)),
        (
            type("Equal", (str,), {"__eq__": lambda *_: True, "__str__": lambda _: "x"})("a"),
            "a",
        ),
        (signal.SIGKILL, 9),
        (int, int),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_is_encoded_as_its_base(value, decoded):
    assert round_trip(value) == decoded
    assert type(round_trip(value)) is type(decoded)


def test_an_iterator_is_read_and_decoded_as_an_iterator():
    assert list(round_trip(x * x for x in range(3))) == [0, 1, 4]
    assert round_trip(iter([1])) != [1]


@settings(max_examples=50, deadline=None)
@given(json_values)
def test_decoding_arbitrary_data_gives_a_plain_value_or_an_expected_error(data):
    expected = (ArithmeticError, LookupError, TypeError, ValueError, values.UnrepresentableError)
    with suppress(*expected):
        values.decode(data, refuse)


def test_a_value_that_contains_itself_is_refused():
    value: list[object] = []
    value.append(value)
    with pytest.raises(values.UnrepresentableError, match="contains itself"):
        round_trip(value)


def test_a_message_that_is_too_long_is_not_sent():
    class Sink:
        def write(self, data: bytes) -> None:
            raise AssertionError("something was written")

        flush = write

    with pytest.raises(protocol.InvalidMessageError):
        protocol.send(Sink(), "x" * protocol.MAX_MESSAGE_BYTES)
