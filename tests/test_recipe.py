"""What a recipe's perturbation may say: checked before a model is touched."""

import pytest

from trans_peft.domain.recipe import Perturbation
from trans_peft.errors import InvalidSpecError

NOT_A_CHANCE = (-0.1, 1, 1.5, float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("name", ["masking_p", "dropping_p"])
@pytest.mark.parametrize("value", NOT_A_CHANCE)
def test_what_is_no_chance_is_refused(name, value):
    with pytest.raises(InvalidSpecError, match=rf"{name} must lie in \[0, 1\), not {value}"):
        Perturbation(**{name: value})


def test_every_problem_is_named_at_once():
    with pytest.raises(
        InvalidSpecError, match=r"masking_p must.*dropping_p must.*where must.*negative, found \[-1"
    ):
        Perturbation(float("nan"), 1.0, where="mlp", spared_layers=(0, -1))


@pytest.mark.parametrize(
    "asked", [{"granularity": "element"}, {"where": "both"}, {"spared_layers": (0, 2)}], ids=str
)
def test_how_without_how_much_is_refused(asked):
    (name,) = asked
    with pytest.raises(InvalidSpecError, match=f"{name} is given while .* both 0"):
        Perturbation(**asked)
    assert not Perturbation(masking_p=0.1, **asked).is_off
    assert not Perturbation(dropping_p=0.1, **asked).is_off


def test_plain_fine_tuning_is_said_by_saying_nothing_or_two_zeros():
    assert Perturbation().is_off
    assert Perturbation(masking_p=0.0, dropping_p=0.0) == Perturbation()
