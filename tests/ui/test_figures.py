"""Outcomes in the registry may contain any figures. No page fails or hangs because of them."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ui.conftest import client_of
from tests.ui.fleets import FAMILY, ExampleFleet
from tests.ui.html import Page
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.errors import IntegrityError

PATHS = [
    f"/families/{FAMILY}{path}"
    for path in ("", "?sort=difference", "/upgrade", "/adapters/chat", "/adapters/chat/on/v2")
]
API = [
    f"/api/families/{FAMILY}{path}"
    for path in ("/adapters", "/progress", "/adapters/chat", "/adapters/chat/verdicts/v2")
]
IDENTITY = {"adapter", "base", "weights_sha256", "policy_sha256", "strategy", "verdict", "prefix"}
INF, NAN = float("inf"), float("nan")

numbers = st.sampled_from([INF, -INF, NAN, 0, -1, 1e8, -1e8, 1e308, -1e308, 5e-324, 10**300])
numbers |= st.floats() | st.integers()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    fleet = ExampleFleet(tmp_path_factory.mktemp("fleet"))
    fleet.add_base("v1")
    fleet.add_base("v2")
    fleet.train("chat", "v1")
    fleet.transfer("chat", "v2", {"exceptions": (12, 9)}, strategy=RecoveryStrategy.DISTILLED)
    return fleet


@pytest.fixture(scope="module")
def stored(fleet):
    """The outcome as it is stored: JSON in a tag."""
    (outcome,) = fleet.platform.registry.outcomes("chat")
    return json.loads(to_json(outcome))


def changed(value, draw, name=""):
    """Return stored JSON with other numbers and texts."""
    if name in IDENTITY:
        return value
    if isinstance(value, dict):
        return {key: changed(inner, draw, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed(inner, draw) for inner in value]
    if isinstance(value, bool):
        return draw(st.booleans())
    if isinstance(value, int | float):
        return draw(st.just(value) | numbers)
    return draw(st.just(value) | st.text()) if isinstance(value, str) else value


class OneOutcome:
    """A registry in which the adapter has this outcome alone."""

    def __init__(self, registry, outcome):
        self._registry, self._outcome = registry, outcome

    def adapter(self, name):
        return replace(self._registry.adapter(name), outcomes=(self._outcome,))

    def fleet(self, family):
        found = self._registry.fleet(family)
        return replace(found, live=tuple(self.adapter(one.name) for one in found.live))


def check_all_pages(fleet, stored):
    """Request every page. Returns them by path, parsed; nothing if the registry refuses the tag."""
    try:
        outcome = from_json(TransferOutcome, json.dumps(stored), where="the tag")
    except IntegrityError:
        return {}
    platform = replace(fleet.platform, registry=OneOutcome(fleet.platform.registry, outcome))
    client, found = client_of(platform), {}
    for path in (*PATHS, *API):
        began = time.monotonic()
        response = client.get(path)
        assert response.status_code == 200, (path, response.text)
        assert len(response.content) < 100_000, path
        assert time.monotonic() - began < 5, path
        found[path] = response.json() if path in API else Page(response.text)
    return found


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_every_page_shows_any_stored_outcome(fleet, stored, data):
    check_all_pages(fleet, changed(stored, data.draw))


@pytest.mark.parametrize("lower", [-1e8, -1e308, -INF, NAN])
def test_an_axis_is_no_longer_than_scores_can_differ(fleet, stored, lower):
    odd = json.loads(json.dumps(stored))
    odd["judgment"]["suites"][0]["versus_old_base"] |= {"lower": lower, "upper": 1e308}
    view = check_all_pages(fleet, odd)[API[-1]]
    picture = view["suites"][0]["comparisons"][0]["picture"]
    assert len(picture["ticks"]) <= 8
    assert picture["is_open_below"] == (lower in (-INF,) or lower != lower)
    assert 4 <= picture["lower"] < picture["zero"] < picture["upper"] <= 96


@pytest.mark.parametrize("odd", [INF, -INF, NAN])
def test_figures_that_are_not_finite_are_unknown(fleet, stored, odd):
    stored = json.loads(json.dumps(stored)) | {"seconds": odd}
    stored["judgment"] |= {"margin_points": odd, "alpha": odd}
    stored["judgment"]["suites"][0] |= {"score": odd, "power": odd}
    stored["judgment"]["suites"][0]["versus_old_base"] |= {"difference": odd}
    found = check_all_pages(fleet, stored)
    verdict, view = found[PATHS[-1]].text, found[API[-1]]
    assert "Margin not recorded One-sided level not recorded" in verdict
    assert "Score \N{EN DASH} on v2" in verdict and "nothing was lost: unknown." in verdict
    assert "Took" not in verdict and "took" not in found[PATHS[3]].text
    assert not {"nan", "inf", "nan%", "inf%"} & {word.lower() for word in verdict.split()}
    (suite,) = view["suites"]
    comparison = suite["comparisons"][0]
    unknown = (view["margin_points"], view["alpha"], view["station"]["seconds"], suite["score"])
    unknown += (suite["power"], comparison["difference"], comparison["picture"]["difference"])
    assert set(unknown) == {None}
    (row,) = found[API[0]]["rows"]
    assert row["cells"][1]["difference"] is None
    assert found[API[1]]["bases"][0]["seconds_each"] is None
