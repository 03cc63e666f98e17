"""The figures in docs/verdicts.md are equal to those that the code computes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from scipy.stats import norm

from tests.validation.statistics.test_intervals import trinomial
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.validation.scoring import RULES
from trans_peft.validation.statistics.intervals import power_of_non_inferiority, score_statistic

PAGE = (Path(__file__).parents[2] / "docs" / "verdicts.md").read_text()


def table(after):
    """Return the rows of numbers of the table below a comment."""
    lines = PAGE.split(after, 1)[1].split("\n\n")[1].splitlines()
    return [[int(number) for number in re.findall(r"\d+", line)] for line in lines[2:]]


@pytest.mark.parametrize("row", table("<!-- power:"), ids=lambda row: f"{row[0]} items")
def test_the_power_table_matches_the_code(row):
    n, *percents = row
    shares = (0.05, 0.1, 0.2, 0.3)
    expected = [round(100 * power_of_non_inferiority(n, share, 0.05, 0.05)) for share in shares]
    assert percents == expected


@pytest.mark.parametrize("row", table("<!-- chances:"), ids=lambda row: f"lost {row[0]}")
def test_the_table_of_outcomes_matches_the_code(row):
    loss, *percents = row
    b, c, p = trinomial(500, (0.2 + loss / 100) / 2, (0.2 - loss / 100) / 2)
    t, z = score_statistic(500, b, c, -0.05), norm.isf(0.05)
    smaller, larger = p[t > z].sum(), p[t < -z].sum()
    assert percents == [round(100 * x) for x in (smaller, larger, 1 - smaller - larger)]


@pytest.mark.parametrize(
    ("items", "discordant", "level"),
    [(52, 0.10, "5.4 %"), (52, 0.06, "5.8 %"), (52, 0.05001, "6.9 %")],
)
def test_the_largest_levels_match_the_code(items, discordant, level):
    assert level in PAGE.split("**Bounds.**")[1].split("**Margin.**")[0]
    b, c, p = trinomial(items, (discordant + 0.05) / 2, (discordant - 0.05) / 2)
    passed = p[score_statistic(items, b, c, -0.05) > norm.isf(0.05)].sum()
    assert f"{100 * passed:.1f} %" == level


@pytest.mark.parametrize(("margin", "items"), [(0.05, 510), (0.03, 1390), (0.02, 3100)])
def test_the_items_for_80_percent_power_match_the_code(margin, items):
    assert f"{items:,}" in PAGE
    assert power_of_non_inferiority(items, 0.2, margin, 0.05) >= 0.8
    assert power_of_non_inferiority(items - 10, 0.2, margin, 0.05) < 0.8


def test_the_example_policy_is_valid():
    fields = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    policy = TypeAdapter(GatePolicy).validate_python(fields)
    assert fields.keys() == {field.name for field in dataclasses.fields(GatePolicy)}
    assert policy.per_strategy.alpha == pytest.approx(0.05 / 5)


@pytest.mark.parametrize("name", [*Verdict, *RULES])
def test_every_verdict_and_every_scoring_rule_is_listed(name):
    assert f"| `{name}` |" in PAGE
