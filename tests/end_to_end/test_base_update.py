"""A base update with real servers, a real worker and a tiny model.

The tests start all work through deployments and read results with MLflow's own client.
"""

import io
import re

import psutil
import pytest
from mlflow.exceptions import MlflowException

from tests.end_to_end.running_stack import LENIENT, RECIPE, rows, wait_until, write_update
from tests.tiny import write_tiny_base
from trans_peft.edges.mlflow_registry import MlflowRegistry

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _lenient(stack):
    stack.set_parameters_of_reconcile(policy=LENIENT)


def test_an_upload_ends_with_a_fleet_that_serves_on_the_new_base(stack, tmp_path):
    # v1 is uploaded, ingested, and promoted by a person
    stack.publish(write_tiny_base(tmp_path / "v1"), "v1")
    assert stack.run("ingest-base", uri="s3://bases/tiny/v1")["type"] == "COMPLETED"
    v1 = stack.mlflow.get_model_version("tiny", "1")
    assert v1.tags["trans_peft.ready"] == "true"
    stack.champion("1")
    assert stack.run("reconcile", family="tiny")["type"] == "COMPLETED"
    assert stack.alias("tiny", "serving") == "1"

    # an adapter is trained on it
    for name, text in (("train", rows(0, 64)), ("eval", rows(100, 24))):
        stack.s3.upload_fileobj(io.BytesIO(text.encode()), "data", f"{name}.jsonl")
    assert stack.run("train-adapter", recipe=RECIPE)["type"] == "COMPLETED"
    trained = stack.mlflow.get_model_version("parity", "1")
    fingerprint = v1.tags["trans_peft.fingerprint"]
    assert stack.alias("parity", f"on-{fingerprint[:12]}") == "1"
    history = stack.mlflow.get_metric_history(trained.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, 7))

    # a new version appears in the bucket: the schedule's reconcile finds it and judges the fleet
    stack.publish(write_update(tmp_path / "v2"), "v2")
    planned = stack.run("reconcile", family="tiny", dry_run=True)
    assert planned["type"] == "COMPLETED"
    wait_until(lambda: ready(stack, "2"))
    assert stack.run("reconcile", wait=True)["type"] == "COMPLETED"
    v2 = stack.mlflow.get_model_version("tiny", "2")
    transferred = stack.mlflow.get_model_version("parity", "2")
    assert transferred.tags["trans_peft.verdict"] == "passed"
    assert stack.alias("parity", f"on-{v2.tags['trans_peft.fingerprint'][:12]}") == "2"
    assert stack.alias("tiny", "serving") == "1"  # v2 is not promoted yet

    # a person promotes it, and a second run of everything changes nothing
    stack.champion("2")
    for _ in range(2):
        assert stack.run("reconcile", wait=True)["type"] == "COMPLETED"
    assert stack.alias("tiny", "serving") == "2"
    assert len(stack.mlflow.search_model_versions("name='parity'")) == 2


def test_a_refused_upload_fails_and_registers_nothing(stack, tmp_path):
    stack.publish(write_tiny_base(tmp_path / "v3", seed=3), "v3", bucket="data")  # not its place
    refused = stack.run("ingest-base", uri="s3://data/tiny/v3")
    assert refused["type"] == "FAILED"
    assert "a URI below s3://bases/tiny/" in refused["message"]
    assert len(stack.mlflow.search_model_versions("name='tiny'")) == 2


def test_a_version_registered_in_mlflow_is_verified_and_made_ready(stack, tmp_path):
    for file in write_tiny_base(tmp_path / "v4", seed=4).iterdir():
        stack.s3.upload_file(str(file), "bases", f"tiny/registered/{file.name}")  # and no manifest
    registered = stack.mlflow.create_model_version("tiny", source="s3://bases/tiny/registered")
    stack.run("reconcile", family="tiny", wait=True)
    wait_until(lambda: ready(stack, registered.version))
    stack.run("reconcile", family="tiny", wait=True)
    # unrelated weights of the same shape: no adapter is carried over, and the reason says why
    verdict = stack.mlflow.get_model_version("parity", "1").tags
    assert "incompatible" in str(verdict)


def test_an_existing_adapter_is_adopted_from_a_bucket(stack, tmp_path):
    registry = MlflowRegistry(stack.settings.urls["mlflow"])
    folder = registry.download(registry.versions("parity")[0], tmp_path / "parity")
    for file in folder.iterdir():
        if file.name.startswith("adapter_"):
            stack.s3.upload_file(str(file), "data", f"theirs/{file.name}")
    state = stack.run(
        "adopt-adapter",
        adapter="theirs",
        folder_uri="s3://data/theirs",
        family="tiny",
        suites=RECIPE["suites"],
        base_version="v1",
    )
    assert state["type"] == "COMPLETED"
    assert stack.mlflow.get_model_version("theirs", "1").tags["trans_peft.base_version"] == "v1"


def test_a_run_with_another_policy_than_the_deployment_changes_nothing(stack):
    before = versions(stack, "parity")
    state = stack.run("reconcile", family="tiny", policy=LENIENT | {"label": "june"})
    assert (state["type"], state["name"]) == ("FAILED", "Superseded")
    successor = re.search(r"Run (\S+) continues", state["message"])[1]
    (run,) = stack.prefect(
        "POST", "flow_runs/filter", json={"flow_runs": {"name": {"any_": [successor]}}}
    )
    assert stack.end_of(run)["type"] == "COMPLETED"
    assert run["parameters"]["family"] == "tiny"
    assert versions(stack, "parity") == before


def test_cancelling_a_training_ends_every_process_of_it(stack):
    endless = RECIPE | {"adapter": "endless", "optimizer": {"steps": 1_000_000, "batch_size": 8}}
    run = stack.start("train-adapter", recipe=endless)
    state = str(stack.settings.state)

    def workers():
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return [c for c in commands if "trans_peft.training.worker" in c and state in str(c)]

    wait_until(workers)
    stack.prefect(
        "POST", f"flow_runs/{run['id']}/set_state", json={"state": {"type": "CANCELLING"}}
    )
    wait_until(lambda: not workers())
    assert stack.end_of(run)["type"] == "CANCELLED"
    with pytest.raises(MlflowException, match="not found"):
        stack.mlflow.get_registered_model("endless")


def versions(stack, adapter):
    found = stack.mlflow.search_model_versions(f"name='{adapter}'")
    return [(version.version, version.tags) for version in found]


def ready(stack, number):
    """Whether a version is ready, no matter which run ingested it."""
    found = stack.mlflow.search_model_versions("name='tiny'")
    tags = [version.tags for version in found if version.version == number]
    return bool(tags) and tags[0].get("trans_peft.ready") == "true"
