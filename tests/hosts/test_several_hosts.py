"""Workers on several hosts that share nothing but the URLs of MLflow, Prefect and S3.

A host is a network namespace (`network.py`). A relay delays every request, so that an upgrade waits
most of its time: the throughput of three hosts can then be measured on two cores. The time is that
from the promotion until the fleet serves. The efficiency of n hosts is t1 / (n * tn).
"""

import time
from threading import Thread

import pytest

from tests.end_to_end.running_stack import wait_until
from tests.faults.disturb import wait_for_end
from tests.faults.upgrade import PATIENCE_S, Upgrade, final_state, unfinished_runs

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(2 * 3600)]

CUT_S = 60


@pytest.fixture(scope="session")
def alone(families, hosts, record):
    """The seconds of an upgrade by one host, and its final state."""
    family = families[1]
    with hosts(1):
        seconds = seconds_to_serve(Upgrade(family).begin())
    record(hosts=1, seconds=round(seconds, 1))
    return seconds, final_state(family)


@pytest.mark.parametrize("number", [2, 3])
def test_hosts_end_as_one_and_take_less_time(number, alone, families, hosts, record):
    family, shards_of = families[number], {}
    alone_s, state = alone
    with hosts(number) as used:
        upgrade = Upgrade(family).begin()
        while not upgrade.over():
            for one in used:
                shards_of.setdefault(one.name, set()).update(shards_on(one, family))
            time.sleep(1)
        seconds = seconds_to_serve(upgrade)
    efficiency = alone_s / (number * seconds)
    record(
        hosts=number,
        seconds=round(seconds, 1),
        efficiency=round(efficiency, 2),
        shards=[len(found) for found in shards_of.values()],
    )
    assert final_state(family) == state
    assert all(shards_of.values())
    assert efficiency > 1 / number


def test_one_of_three_hosts_is_killed_and_one_is_cut_off(alone, families, hosts, record):
    """Both evaluate a shard then, at about half of the time. The killed host does not come back."""
    family = families["disturbed"]
    alone_s, state = alone
    with hosts(3) as (killed, cut, _):
        upgrade = Upgrade(family).begin()
        wait_until(lambda: upgrade.promoted, PATIENCE_S)
        time.sleep(alone_s / 3 / 2)
        wait_until(lambda: all(shards_on(one, family) for one in (killed, cut)), PATIENCE_S)
        outage = Thread(target=cut.cut_off, args=(CUT_S,))
        outage.start()
        killed.kill()
        at_s = time.monotonic() - upgrade.promoted
        scheduled = wait_for_end(upgrade)
        end_s = time.monotonic() - upgrade.promoted
        outage.join()
    record(
        fault="one of three hosts is killed, one is cut off",
        at_s=round(at_s, 1),
        end_s=round(end_s, 1),
        scheduled=scheduled,
    )
    assert final_state(family) == state


def seconds_to_serve(upgrade):
    """Wait for the end of an upgrade, and return the seconds from its promotion to serving."""
    return upgrade.wait() - (upgrade.promoted - upgrade.began)


def shards_on(host, family):
    """Return the ids of the flow runs of shards of the family that run on this host."""
    runs = unfinished_runs(family.stack)
    return {
        run_id
        for run_id in host.flow_runs() & runs.keys()
        if runs[run_id]["state_type"] == "RUNNING"
        and any(
            task["base"]["family"] == family.name
            for task in runs[run_id]["parameters"].get("shard", ())
        )
    }
