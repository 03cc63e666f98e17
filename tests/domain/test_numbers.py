"""Numbers that JSON cannot hold are refused where they are written, and have no content hash."""

import math

import pytest

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.identity import content_sha256
from trans_peft.edges.json_codec import from_json
from trans_peft.errors import IntegrityError, InvalidSpecError

DATA = DataSource("x.jsonl", sha256="0" * 64)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, "0.5", True])
def test_a_threshold_is_a_finite_number(threshold):
    with pytest.raises(InvalidSpecError, match="threshold must be a finite number"):
        Suite("exam", DATA, threshold=threshold)


@pytest.mark.parametrize("threshold", [None, 0, 0.5, 1, -3.0])
def test_any_finite_threshold_is_taken(threshold):
    assert Suite("exam", DATA, threshold=threshold).suite_sha256


@pytest.mark.parametrize("threshold", ["NaN", "Infinity", "-Infinity", '"nan"', '"inf"', "1e999"])
def test_a_stored_suite_with_another_threshold_cannot_be_read(threshold):
    text = f'{{"name": "exam", "data": {{"uri": "x"}}, "threshold": {threshold}}}'
    with pytest.raises(IntegrityError, match="threshold must be a finite number"):
        from_json(Suite, text, where="the tag")


@pytest.mark.parametrize(
    "value", [math.nan, [math.inf], {"r": -math.inf}, {"a": [{"b": math.nan}]}]
)
def test_a_value_that_json_cannot_hold_has_no_hash(value):
    with pytest.raises(InvalidSpecError, match="contains NaN or an infinite number"):
        content_sha256(value)
