"""Promotions by a user in MLflow's page: refused with a reason, approved manually, rolled back.

The gate has its default policy, and 24 questions are too few to pass it. An adapter on the new base
therefore serves only after a manual approval.
"""

import io
import json
import re
from contextlib import suppress

import psutil
import pytest
import yaml

from tests.end_to_end.running_stack import RECIPE, ROOT, rows, wait_until, write_update
from tests.tiny import write_tiny_base

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

FAMILY, ADAPTER = "people", "approved"


@pytest.fixture(scope="module")
def fleet(stack, tmp_path_factory):
    """v1 serves one adapter; v2 is ready."""
    stack.set_parameters_of_reconcile(policy={})  # the default policy
    folder = tmp_path_factory.mktemp("people")
    stack.publish(write_tiny_base(folder / "v1"), "v1", FAMILY)
    assert stack.run("ingest-base", uri=f"s3://bases/{FAMILY}/v1")["type"] == "COMPLETED"
    stack.champion("1", FAMILY)
    assert stack.run("reconcile", family=FAMILY, wait=True)["type"] == "COMPLETED"
    for name, text in (("train", rows(0, 64)), ("eval", rows(100, 24))):
        stack.s3.upload_fileobj(io.BytesIO(text.encode()), "data", f"{FAMILY}-{name}.jsonl")
    suite = RECIPE["suites"][0] | {"data": {"uri": f"s3://data/{FAMILY}-eval.jsonl"}}
    recipe = RECIPE | {
        "adapter": ADAPTER,
        "family": FAMILY,
        "data": {"uri": f"s3://data/{FAMILY}-train.jsonl"},
        "suites": [suite],
    }
    assert stack.run("train-adapter", recipe=recipe)["type"] == "COMPLETED"
    stack.publish(write_update(folder / "v2"), "v2", FAMILY)
    assert stack.run("ingest-base", uri=f"s3://bases/{FAMILY}/v2")["type"] == "COMPLETED"
    return stack


def serving(stack):
    return stack.alias(FAMILY, "serving")


def alias_on(stack, number):
    fingerprint = stack.mlflow.get_model_version(FAMILY, number).tags["trans_peft.fingerprint"]
    return f"on-{fingerprint[:12]}"


def note_on(stack, number):
    return stack.mlflow.get_model_version(FAMILY, number).tags.get("trans_peft.promotion", "")


def events(stack, name, resource):
    """Return the payloads of these events, the oldest first."""
    wanted = {"event": {"name": [name]}, "resource": {"id": [resource]}, "order": "ASC"}
    found = stack.prefect("POST", "events/filter", json={"filter": wanted, "limit": 50})
    return [event["payload"] for event in found["events"]]


def runs_of(stack, **parameters):
    """Return the reconcile runs with these parameters."""
    found = stack.prefect(
        "POST", "flow_runs/filter", json={"flows": {"name": {"any_": ["reconcile"]}}, "limit": 200}
    )
    return [run for run in found if parameters.items() <= run["parameters"].items()]


def test_a_promotion_is_refused_while_too_few_adapters_pass_and_the_reason_is_shown(fleet):
    fleet.champion("2", FAMILY)
    refused = fleet.run("reconcile", family=FAMILY, wait=True)
    assert refused["type"] == "FAILED"
    assert f"the fleet may not move to {FAMILY}/v2" in refused["message"]
    assert f"0 of 1 live adapters serve there, not {ADAPTER} (" in refused["message"]
    assert serving(fleet) == "1"
    assert note_on(fleet, "2").startswith(f"refused: the fleet may not move to {FAMILY}/v2")
    family = f"trans-peft.family.{FAMILY}"
    wait_until(lambda: events(fleet, "trans-peft.promotion.refused", family))
    (judged,) = events(fleet, "trans-peft.adapter.judged", f"trans-peft.adapter.{ADAPTER}")
    assert judged["base"] == "v2"


def test_a_manual_approval_counts_and_is_recorded(fleet):
    fleet.mlflow.set_registered_model_alias(ADAPTER, alias_on(fleet, "2"), "2")
    assert fleet.run("reconcile", family=FAMILY, wait=True)["type"] == "COMPLETED"
    assert serving(fleet) == "2"
    assert note_on(fleet, "2") == ""
    tags = fleet.mlflow.get_registered_model(ADAPTER).tags
    record = json.loads(tags[f"trans_peft.manual-override.{alias_on(fleet, '2')}"])
    assert (record["number"], record["wanted"], record["by"]) == (2, None, "unknown")
    promoted = events(fleet, "trans-peft.fleet.promoted", f"trans-peft.family.{FAMILY}")
    assert {event["base"] for event in promoted} == {f"{FAMILY}/v1", f"{FAMILY}/v2"}


def test_an_event_of_another_program_starts_a_rollback(fleet):
    fleet.champion("1", FAMILY)
    before = {run["id"] for run in runs_of(fleet, family=FAMILY)}
    fleet.emit("trans-peft.reconcile.requested", family=FAMILY)
    wait_until(lambda: {run["id"] for run in runs_of(fleet, family=FAMILY)} - before)
    wait_until(lambda: serving(fleet) == "1")
    everyone = len(runs_of(fleet, family=None))
    fleet.emit("trans-peft.reconcile.requested")
    wait_until(lambda: len(runs_of(fleet, family=None)) > everyone)


def test_a_copy_made_with_promote_model_does_not_serve_and_the_reason_is_shown(fleet):
    copy = fleet.mlflow.copy_model_version(f"models:/{FAMILY}/2", FAMILY)
    fleet.mlflow.copy_model_version(f"models:/{ADAPTER}/1", ADAPTER)
    fleet.champion(copy.version, FAMILY)
    refused = fleet.run("reconcile", family=FAMILY, wait=True)
    assert refused["type"] == "FAILED"
    assert "or that is a copy" in note_on(fleet, copy.version)
    assert serving(fleet) == "1"
    fleet.champion("1", FAMILY)
    assert fleet.run("reconcile", family=FAMILY, wait=True)["type"] == "COMPLETED"
    assert note_on(fleet, copy.version) == ""
    assert fleet.alias(ADAPTER, alias_on(fleet, "1")) == "1"


def test_the_automations_of_the_docs_work(fleet):
    page = (ROOT / "docs" / "promotion.md").read_text()
    notify, retune = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.S)[1])["automations"]
    deployment = fleet.prefect("GET", "deployments/name/reconcile/default")["id"]
    retune["actions"][0]["deployment_id"] = deployment  # a placeholder in the docs
    retune["trigger"]["match"] = {"trans-peft.base": "v2"}  # whatever the verdict
    fleet.prefect("POST", "automations/", json=retune)
    slack = fleet.prefect("GET", "block_types/slug/slack-webhook")
    (schema,) = fleet.prefect(
        "POST",
        "block_schemas/filter",
        json={"block_schemas": {"block_type_id": {"any_": [slack["id"]]}}},
    )[:1]
    block = fleet.prefect(
        "POST",
        "block_documents/",
        json={
            "name": "ops",
            "data": {"url": "http://127.0.0.1:9/"},
            "block_schema_id": schema["id"],
            "block_type_id": slack["id"],
        },
    )
    notify["actions"][0]["block_document_id"] = block["id"]
    fleet.prefect("POST", "automations/", json=notify)

    policy = {"margin_points": 4.0}  # judged again from stored results
    fleet.run("reconcile", family=FAMILY, policy=policy, wait=True)
    wait_until(lambda: runs_of(fleet, adapter=ADAPTER, base="v2"))
    wait_until(
        lambda: fleet.prefect(
            "POST",
            "events/filter",
            json={"filter": {"event": {"prefix": ["prefect.automation.action."]}}},
        )["events"]
    )


def test_killed_runs_are_repeated_and_each_adapter_is_judged_once(fleet, tmp_path):
    fleet.run("reconcile", family=FAMILY, wait=True)  # v2 as the deployment's policy has it
    fleet.publish(write_update(tmp_path / "v3", seed=3), "v3", FAMILY)
    fleet.start("reconcile", family=FAMILY, wait=True)  # or the upload's notification starts one
    wait_until(lambda: unfinished_runs(fleet, "transfer-shard", on="v3"))
    shards = unfinished_runs(fleet, "transfer-shard", on="v3")
    for process in processes_of(shards | unfinished_runs(fleet, "reconcile")):
        process.kill()
    for run in shards:
        ended = fleet.end_of(fleet.prefect("GET", f"flow_runs/{run}"))
        assert ended["type"] == "CRASHED"

    (v3,) = [
        found.version
        for found in fleet.mlflow.search_model_versions(f"name='{FAMILY}'")
        if found.tags["trans_peft.version"] == "v3"
    ]
    fleet.champion(v3, FAMILY)
    again = [fleet.start("reconcile", family=FAMILY, wait=True) for _ in range(3)]
    for state in map(fleet.end_of, again):
        assert state["type"] == "FAILED"  # by policy: the verdict is there
        assert "0 of 1 live adapters serve there" in state["message"]
    versions = fleet.mlflow.search_model_versions(f"name='{ADAPTER}'")
    assert [v.tags["trans_peft.base_version"] for v in versions].count("v3") == 1
    experiment = fleet.mlflow.get_experiment_by_name("trans-peft/transfers").experiment_id
    judged = fleet.mlflow.search_runs(
        [experiment],
        f"tags.`trans_peft.adapter` = '{ADAPTER}' AND tags.`trans_peft.base_version` = 'v3'",
    )
    assert [run.data.tags["trans_peft.verdict"] != "failed" for run in judged].count(True) == 1
    assert serving(fleet) == "1"


def unfinished_runs(stack, flow, on=""):
    """Return the ids of the running runs of a flow (on a base version)."""
    running = {"flows": {"name": {"any_": [flow]}}}
    running["flow_runs"] = {"state": {"type": {"any_": ["RUNNING"]}}}
    found = stack.prefect("POST", "flow_runs/filter", json=running)
    return {run["id"] for run in found if on in str(run["parameters"])}


def processes_of(run_ids):
    """Return the processes that work for these flow runs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("PREFECT__FLOW_RUN_ID") in run_ids:
                found.append(process)
    return found
