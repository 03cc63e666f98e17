"""The figures in docs/statistics.md are equal to those that the code computes."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from benchmarks.claims import flip_rates, leakage_rate, slice_rates
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.validation.statistics.clusters import ClusterCounts

PAGE = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text()


def table(after):
    """Return the rows of numbers of the table below a comment."""
    lines = PAGE.split(after, 1)[1].split("\n\n")[1].splitlines()
    return [[float(number) for number in re.findall(r"[\d.]+", line)] for line in lines[2:]]


@pytest.mark.parametrize("row", [row for row in table("<!-- flips:") if row[0] < 1000])
def test_the_table_of_negative_flips_matches_the_code(row):
    n, share, *percents = row
    assert percents == [round(100 * rate) for rate in flip_rates(int(n), share / 100)]


@pytest.mark.parametrize("row", table("<!-- slices:"), ids=lambda row: f"lost {row[0]:.0f}")
def test_the_table_of_slices_matches_the_simulation(row):
    loss, *percents = row
    found = slice_rates(loss / 100, adapters=20_000, seed=1)
    assert [100 * rate for rate in found] == pytest.approx(percents, abs=1.5)


@pytest.mark.parametrize("row", table("<!-- leakage:"), ids=lambda row: f"{row[0]:.0f} %")
def test_the_table_of_leakage_matches_the_code(row):
    leaked, *percents = row
    found = [leakage_rate(leaked / 100, loss) for loss in (0.05, 0.07)]
    assert percents == [round(100 * rate, 1) for rate in found]


@pytest.mark.parametrize(("flips", "bound"), [(0, "0.60"), (10, "3.37")])
def test_the_bounds_of_few_flips_match_the_code(flips, bound):
    counts = ClusterCounts.of([-1] * flips + [0] * (500 - flips), range(500))
    assert f"{100 * counts.largest_loss_share(0.05):.2f}" == bound
    assert f"{bound} points" in PAGE


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_examples_are_valid(text):
    fields = yaml.safe_load(text)
    if "promotion" in fields:
        assert TypeAdapter(PromotionPolicy).validate_python(fields["promotion"]).fdr == 0.1
    elif "suites" in fields:
        assert TypeAdapter(tuple[Suite, ...]).validate_python(fields["suites"])[0].data.uri
    else:
        assert TypeAdapter(GatePolicy).validate_python(fields) != GatePolicy()
