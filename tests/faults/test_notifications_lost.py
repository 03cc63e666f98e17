"""Hints doubled a hundred times and shuffled, and hints that never arrive: the same upgrade."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from infra.bridge.authentication import sign
from tests.faults.disturb import ends_as, schedule, see_through, stopped
from tests.faults.upgrade import PATIENCE_S, Upgrade, at_work, make_family
from tests.stories.place import ROOT, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * 3600)]

PAYLOADS = ROOT / "tests" / "bridge" / "payloads"
COPIES = 100


def test_every_hint_doubled_a_hundred_times_and_shuffled(stack, undisturbed, told, tmp_path):
    """Before what they tell of, while it happens and long after: they are sent all the time."""
    family = make_family(stack, "doubled", tmp_path)
    copies = [hint for hint in hints_of(family) for _ in range(COPIES)]
    random.Random(7).shuffle(copies)
    upgrade = Upgrade(family).begin()
    with (
        httpx.Client(base_url=stack.settings.urls["bridge"], timeout=60) as bridge,
        ThreadPoolExecutor(4) as pool,
    ):
        outcomes = list(pool.map(lambda hint: send(stack, bridge, *hint), copies))
    scheduled = see_through(upgrade)
    assert len(outcomes) == len(copies)
    runs = stack.prefect(
        "POST", "flow_runs/filter", json={"flows": {"name": {"any_": ["reconcile"]}}, "limit": 200}
    )
    ours = [run for run in runs if run["parameters"].get("family") in (family.name, None)]
    told(fault="hints doubled", hints=len(copies), runs=len(ours), seconds=upgrade.seconds)
    assert scheduled == 0
    ends_as(undisturbed, family)


def test_no_hint_ever_arrives_and_the_schedule_does_it_all(stack, undisturbed, told, tmp_path):
    family = make_family(stack, "unheard", tmp_path)
    with stopped(stack, "bridge"):
        upgrade = Upgrade(family).begin()
        runs = 0
        while not upgrade.over():  # the schedule comes again after each run that was its own
            schedule(stack)
            runs += 1
            assert runs <= 5
            wait_until(lambda: not at_work(stack), PATIENCE_S)
            time.sleep(5)  # the person looks whether the base is ready, and promotes it
        told(fault="hints dropped", scheduled=runs, seconds=upgrade.seconds)
        ends_as(undisturbed, family)


def hints_of(family):
    """Return the hints of an upgrade as they were captured from the servers, for this family."""
    hints = []
    for name in ("mlflow_version_created", "mlflow_champion_created", "mlflow_champion_deleted"):
        body = json.loads((PAYLOADS / f"{name}.json").read_text())
        body["data"]["name"] = family.name
        hints.append(("mlflow", f"{name}-{family.name}", body))
    body = json.loads((PAYLOADS / "seaweedfs_manifest_created.json").read_text())
    body["key"] = f"/buckets/bases/{family.name}/v2/trans_peft_manifest.json"
    return [*hints, ("s3", "upload", body)]


def send(stack, bridge, sender, delivery_id, body):
    """Send a hint as its sender does, again while it is told to."""
    secrets, content = stack.settings.secrets, json.dumps(body).encode()
    at = str(int(time.time()))
    signature = sign(secrets.bridge_mlflow_secret, delivery_id, at, content)
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {secrets.bridge_s3_token}"}
        if sender == "s3"
        else {
            "X-MLflow-Delivery-Id": delivery_id,
            "X-MLflow-Timestamp": at,
            "X-MLflow-Signature": signature,
        }
    )
    while True:
        answer = bridge.post(f"/hints/{sender}", content=content, headers=headers)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            return answer.raise_for_status().json()["outcome"]
        time.sleep(1)
