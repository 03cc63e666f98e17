"""Servers that are away, that fail, that lose their answers, that are slow: in mid-upgrade."""

import time
from contextlib import ExitStack

import pytest

from tests.faults.disturb import ends_as, judging, see_through, stopped, worker
from tests.faults.proxy import Weather, proxied
from tests.faults.upgrade import PATIENCE_S, Upgrade, make_family
from tests.stories.place import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * 3600)]

AWAY_S = 30
SHARE = 0.05
VARIABLES = {
    "mlflow": "MLFLOW_TRACKING_URI",
    "prefect": "PREFECT_API_URL",
    "s3": "AWS_ENDPOINT_URL",
}


@pytest.mark.parametrize("server", VARIABLES)
def test_a_server_that_is_away_for_30_s_while_a_fleet_is_judged(
    server, stack, undisturbed, told, tmp_path
):
    family = make_family(stack, f"{server}-away", tmp_path)
    upgrade = Upgrade(family).begin()
    wait_until(lambda: judging(stack, family), PATIENCE_S)
    with stopped(stack, server):
        time.sleep(AWAY_S)
    scheduled = see_through(upgrade)
    told(fault=f"{server} away for {AWAY_S} s", seconds=upgrade.seconds, scheduled=scheduled)
    ends_as(undisturbed, family)


@pytest.fixture
def behind_proxies(stack, tmp_path):
    """Return a context manager: the only worker reaches the servers named through this weather."""

    def begin(family, weathers):
        context = ExitStack()
        environment = {}
        for server, weather in weathers.items():
            url = stack.settings.urls[server]
            own = context.enter_context(proxied(url, weather, keeps_host=server == "s3"))
            environment[VARIABLES[server]] = f"{own}/api" if server == "prefect" else own
        context.enter_context(stopped(stack, "worker"))
        context.enter_context(worker(stack, family.name, tmp_path / "worker", **environment))
        return context

    return begin


def disturbed(stack, behind_proxies, family, weathers):
    with behind_proxies(family, weathers):
        upgrade = Upgrade(family).begin()
        scheduled = see_through(upgrade)
        seconds = round(upgrade.seconds)
    return {
        "seconds": seconds,
        "scheduled": scheduled,
        "requests": {server: weather.seen for server, weather in weathers.items()},
        "disturbed": {server: weather.met for server, weather in weathers.items()},
    }


def test_servers_that_fail_and_lose_their_answers(
    stack, undisturbed, behind_proxies, told, tmp_path
):
    """500, 503 and resets, all three servers at once, before they did their work and after it."""
    family = make_family(stack, "fails", tmp_path)
    weathers = {server: Weather(seed=5, share=SHARE) for server in VARIABLES}
    told(fault="fails", share=SHARE, **disturbed(stack, behind_proxies, family, weathers))
    assert all(weather.met for weather in weathers.values())
    ends_as(undisturbed, family)


def test_servers_that_take_seconds_to_answer(stack, undisturbed, behind_proxies, told, tmp_path):
    family = make_family(stack, "slow", tmp_path)
    weathers = {
        server: Weather(seed=6, share=SHARE, kinds=("wait",), wait_s=3) for server in VARIABLES
    }
    told(fault="slow", share=SHARE, **disturbed(stack, behind_proxies, family, weathers))
    ends_as(undisturbed, family)
