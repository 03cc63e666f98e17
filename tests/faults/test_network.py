"""Servers that are unavailable, fail, lose responses or are slow during an upgrade."""

import time
from contextlib import ExitStack

import pytest

from tests.end_to_end.running_stack import wait_until
from tests.faults.disturb import assert_ends_as, judging, stopped, wait_for_end, worker
from tests.faults.proxy import RandomFaults, proxied
from tests.faults.upgrade import PATIENCE_S, Upgrade, make_family

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * 3600)]

AWAY_S = 30
SHARE = 0.05
VARIABLES = {
    "mlflow": "MLFLOW_TRACKING_URI",
    "prefect": "PREFECT_API_URL",
    "s3": "AWS_ENDPOINT_URL",
}


@pytest.mark.parametrize("server", VARIABLES)
def test_a_server_is_unavailable_for_30_s_during_evaluation(
    server, stack, undisturbed, record_fault, tmp_path
):
    family = make_family(stack, f"{server}-away", tmp_path)
    upgrade = Upgrade(family).begin()
    wait_until(lambda: judging(stack, family), PATIENCE_S)
    with stopped(stack, server):
        time.sleep(AWAY_S)
    scheduled = wait_for_end(upgrade)
    record_fault(
        fault=f"{server} away for {AWAY_S} s", seconds=upgrade.seconds, scheduled=scheduled
    )
    assert_ends_as(undisturbed, family)


@pytest.fixture
def behind_proxies(stack, tmp_path):
    """Return a context in which the only worker reaches these servers through faulty proxies."""

    def begin(family, faults_by_server):
        context = ExitStack()
        environment = {}
        for server, plan in faults_by_server.items():
            url = stack.settings.urls[server]
            own = context.enter_context(proxied(url, plan, keeps_host=server == "s3"))
            environment[VARIABLES[server]] = f"{own}/api" if server == "prefect" else own
        context.enter_context(stopped(stack, "worker"))
        context.enter_context(worker(stack, family.name, tmp_path / "worker", **environment))
        return context

    return begin


def disturbed(stack, behind_proxies, family, faults_by_server):
    with behind_proxies(family, faults_by_server):
        upgrade = Upgrade(family).begin()
        scheduled = wait_for_end(upgrade)
        seconds = round(upgrade.seconds)
    return {
        "seconds": seconds,
        "scheduled": scheduled,
        "requests": {server: plan.seen for server, plan in faults_by_server.items()},
        "disturbed": {server: plan.met for server, plan in faults_by_server.items()},
    }


def test_servers_fail_and_lose_responses(
    stack, undisturbed, behind_proxies, record_fault, tmp_path
):
    """500, 503 and resets of all three servers, before and after they did the work."""
    family = make_family(stack, "fails", tmp_path)
    faults_by_server = {server: RandomFaults(seed=5, share=SHARE) for server in VARIABLES}
    record_fault(
        fault="fails", share=SHARE, **disturbed(stack, behind_proxies, family, faults_by_server)
    )
    assert all(plan.met for plan in faults_by_server.values())
    assert_ends_as(undisturbed, family)


def test_servers_respond_slowly(stack, undisturbed, behind_proxies, record_fault, tmp_path):
    family = make_family(stack, "slow", tmp_path)
    faults_by_server = {
        server: RandomFaults(seed=6, share=SHARE, kinds=("wait",), wait_s=3) for server in VARIABLES
    }
    record_fault(
        fault="slow", share=SHARE, **disturbed(stack, behind_proxies, family, faults_by_server)
    )
    assert_ends_as(undisturbed, family)
