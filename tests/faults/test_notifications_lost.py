"""Duplicated, shuffled and lost notifications do not change the result of an upgrade."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from infra.bridge.authentication import sign
from tests.end_to_end.running_stack import ROOT, wait_until
from tests.faults.disturb import assert_ends_as, schedule, stopped, wait_for_end
from tests.faults.upgrade import PATIENCE_S, Upgrade, make_family, unfinished_runs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * 3600)]

PAYLOADS = ROOT / "tests" / "bridge" / "payloads"
COPIES = 100


def test_notifications_duplicated_a_hundred_times_and_shuffled(
    stack, undisturbed, record_fault, tmp_path
):
    """They are sent before, during and after the changes that they report."""
    family = make_family(stack, "doubled", tmp_path)
    copies = [notification for notification in notifications_of(family) for _ in range(COPIES)]
    random.Random(7).shuffle(copies)
    upgrade = Upgrade(family).begin()
    with (
        httpx.Client(base_url=stack.settings.urls["bridge"], timeout=60) as bridge,
        ThreadPoolExecutor(4) as pool,
    ):
        outcomes = list(pool.map(lambda notification: send(stack, bridge, *notification), copies))
    scheduled = wait_for_end(upgrade)
    assert len(outcomes) == len(copies)
    runs = stack.prefect(
        "POST", "flow_runs/filter", json={"flows": {"name": {"any_": ["reconcile"]}}, "limit": 200}
    )
    ours = [run for run in runs if run["parameters"].get("family") in (family.name, None)]
    record_fault(
        fault="notifications duplicated",
        notifications=len(copies),
        runs=len(ours),
        seconds=upgrade.seconds,
    )
    assert scheduled == 0
    assert_ends_as(undisturbed, family)


def test_the_schedule_completes_an_upgrade_without_any_notification(
    stack, undisturbed, record_fault, tmp_path
):
    family = make_family(stack, "unheard", tmp_path)
    with stopped(stack, "bridge"):
        upgrade = Upgrade(family).begin()
        runs = 0
        while not upgrade.over():  # the schedule repeats after each of its runs
            schedule(stack)
            runs += 1
            assert runs <= 5
            wait_until(lambda: not unfinished_runs(stack), PATIENCE_S)
            time.sleep(5)  # the test promotes the base once it is ready
        record_fault(fault="notifications lost", scheduled=runs, seconds=upgrade.seconds)
        assert_ends_as(undisturbed, family)


def notifications_of(family):
    """Return the notifications of an upgrade, captured from the servers, for this family."""
    notifications = []
    for name in ("mlflow_version_created", "mlflow_champion_created", "mlflow_champion_deleted"):
        body = json.loads((PAYLOADS / f"{name}.json").read_text())
        body["data"]["name"] = family.name
        notifications.append(("mlflow", f"{name}-{family.name}", body))
    body = json.loads((PAYLOADS / "seaweedfs_manifest_created.json").read_text())
    body["key"] = f"/buckets/bases/{family.name}/v2/trans_peft_manifest.json"
    return [*notifications, ("s3", "upload", body)]


def send(stack, bridge, sender, delivery_id, body):
    """Send a notification and retry while the response is 503."""
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
        answer = bridge.post(f"/notifications/{sender}", content=content, headers=headers)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            return answer.raise_for_status().json()["outcome"]
        time.sleep(1)
