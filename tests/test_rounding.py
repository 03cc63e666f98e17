"""How far two computations of one result may differ."""

import math

import pytest
import torch

from trans_peft.rounding import difference_beyond_rounding, rounding_tolerance


@pytest.mark.parametrize(
    ("dtype", "roundings", "expected"),
    [
        (torch.float32, 4, 1e-3),
        (torch.float16, 4, 4 * 2**-10),
        (torch.float16, 8, 8 * 2**-10),
        (torch.bfloat16, 4, 4 * 2**-7),
        (torch.bfloat16, 8, 8 * 2**-7),
    ],
)
def test_tolerance_of_a_dtype(dtype, roundings, expected):
    assert rounding_tolerance(torch.ones(1, dtype=dtype), roundings) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_a_difference_above_the_tolerance_is_returned(dtype):
    expected = torch.tensor([3.0, 4.0], dtype=dtype)
    tolerance = rounding_tolerance(expected)
    assert difference_beyond_rounding(expected.float() * (1 + tolerance / 2), expected) is None
    found = difference_beyond_rounding(expected.float() * (1 + tolerance * 2), expected)
    assert found == pytest.approx(2 * tolerance, rel=1e-3)


def test_other_shapes_and_values_that_are_not_finite_differ():
    ones = torch.ones(2)
    assert difference_beyond_rounding(torch.ones(3), ones) == math.inf
    for value in (math.nan, math.inf):
        assert difference_beyond_rounding(torch.tensor([1.0, value]), ones) is not None
    assert difference_beyond_rounding(torch.zeros(2), torch.zeros(2)) is None
    assert difference_beyond_rounding(ones, torch.zeros(2)) == math.inf
