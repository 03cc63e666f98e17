"""The table of a chain of updates, for constructed scores."""

import pytest

from study.chain import CHAIN, COMPENSATED, serves, table
from study.plan import V1
from study.score_file import Score

ITEMS = 1_000


def score(right, base, arm="plain", seed=1):
    marks = "1" * right + "0" * (ITEMS - right)
    return Score(f"{arm}{seed}{base}", "exceptions", arm, 120, seed, V1, base, marks, {}, 1.0)


@pytest.mark.parametrize(
    ("right", "alone"),
    [
        (600, True),
        (565, True),  # 35 of 1,000 lost: the bound at 5 % is -4.6 points
        (564, True),
        (560, False),  # 40 lost: -5.2 points
        (100, False),
    ],
)
def test_an_adapter_serves_if_its_bound_lies_above_the_margin(right, alone):
    assert serves(score(600, V1), (score(right, "all"),)) is alone


def test_two_strategies_share_the_level():
    old, new = score(600, V1), score(563, "all")
    assert serves(old, (new,))
    assert not serves(old, (new, score(100, "all", COMPENSATED)))  # at 2.5 %: -5.1 points
    assert serves(old, (score(100, "all"), score(590, "all", COMPENSATED)))


def test_the_table_counts_the_adapters_that_serve_on_each_version():
    found = [
        score(right, base, arm, seed)
        for seed in (1, 2)
        for base, arm, right in (
            (V1, "plain", 600),
            *((base, "plain", 600 if seed == 1 else 300) for base in CHAIN),
            *((base, COMPENSATED, 590) for base in CHAIN),
        )
    ]
    lines = table(found).splitlines()
    assert lines[2] == f"| {V1} | 60.0 | 2 of 2 |  |  |"
    assert lines[3:] == [f"| {base} | 45.0 | 1 of 2 | 59.0 | 2 of 2 |" for base in CHAIN]
