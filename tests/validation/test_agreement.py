"""Agreement, counted from the hashes of answers."""

from dataclasses import replace

import pytest

from trans_peft.domain.evaluation import Evaluation, ItemResult
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.agreement import Agreement, equal_answers


def evaluation(answers, **changes):
    items = tuple(ItemResult(f"q{i}", False, answer) for i, answer in enumerate(answers))
    return replace(Evaluation("s", "w", "old", "suite", "greedy", items), **changes)


def test_equal_answers_are_counted_from_hashes():
    old, new = evaluation(["a", "b", "c"]), evaluation(["a", "x", "c"], base_fingerprint_sha256="n")
    assert equal_answers(old, new) == 2
    reversed_order = replace(new, items=new.items[::-1])
    assert equal_answers(old, reversed_order) == 2
    assert Agreement(prompts=3, equal=2, kl=0.0, positions=1).points == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (evaluation(["a", "b"]), "1 items are not in all evaluations"),
        (evaluation(["a", "b", "c"], decoding_sha256="other"), "decoding_sha256 differs"),
        (evaluation(["a", "b", ""]), "without answer hashes"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_rejected(new, message):
    with pytest.raises(InvalidSpecError, match=message):
        equal_answers(evaluation(["a", "b", "c"]), new)
