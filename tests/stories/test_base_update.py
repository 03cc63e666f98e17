"""A base update as a platform team lives it: real servers, a real worker, a tiny model.

Everything is started through deployments and read from MLflow with its own client, as a stranger
would; only the model is small.
"""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import boto3
import httpx
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from infra.stack.machine import free_ports
from infra.stack.settings import StackSettings
from tests.tiny import tiny_model, tiny_tokenizer, write_tiny_base
from trans_peft.edges.mlflow_registry import MlflowRegistry

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
LENIENT = {"margin_points": 60.0, "must_beat_bare": False}
RECIPE = {
    "adapter": "parity",
    "family": "tiny",
    "data": {"uri": "s3://data/train.jsonl"},
    "suites": [{"name": "parity", "data": {"uri": "s3://data/eval.jsonl"}, "max_new_tokens": 5}],
    "spec": {"peft_type": "LORA", "options": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    "perturbation": {"masking_p": 0.1, "dropping_p": 0.1},
    "optimizer": {"learning_rate": 0.01, "steps": 6, "batch_size": 8},
}


@dataclass
class Stack:
    settings: StackSettings

    def __post_init__(self):
        client = self.settings.client_environment
        self.s3 = boto3.client(
            "s3",
            endpoint_url=client["AWS_ENDPOINT_URL"],
            aws_access_key_id=client["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=client["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )
        self.mlflow = MlflowClient(self.settings.urls["mlflow"])
        self.environment = {**os.environ, **client}

    def run(self, deployment, **parameters):
        """Start a deployment, wait for its end, return its state."""
        return self.end_of(self.start(deployment, **parameters))

    def start(self, deployment, **parameters):
        found = self.prefect("GET", f"deployments/name/{deployment}/default")
        body = {"parameters": parameters, "idempotency_key": str(uuid4())}
        return self.prefect("POST", f"deployments/{found['id']}/create_flow_run", json=body)

    def end_of(self, run):
        deadline = time.monotonic() + 240
        while (state := run["state"])["type"] not in FINAL:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
            run = self.prefect("GET", f"flow_runs/{run['id']}")
        if state["type"] in {"FAILED", "CRASHED"}:
            sys.stdout.write((self.settings.logs / "worker.log").read_text()[-6000:])
        return state

    def prefect(self, method, path, **body):
        """Ask Prefect's API; on a busy machine its SQLite answers 503 now and then."""
        url = f"{self.settings.urls['prefect']}/api/{path}"
        for _ in range(10):
            answer = httpx.request(method, url, timeout=60, **body)
            if answer.status_code != 503:
                break
            time.sleep(1)
        return answer.raise_for_status().json()

    def publish(self, folder, version):
        """Upload a base with this project's command."""
        subprocess.run(
            [
                *(sys.executable, "-m", "trans_peft.cli", "publish", folder),
                *(f"s3://bases/tiny/{version}", "--family", "tiny", "--version", version),
            ],
            env=self.environment,
            cwd=ROOT,
            check=True,
        )

    def champion(self, number):
        """What a person does in MLflow's page."""
        self.mlflow.set_registered_model_alias("tiny", "champion", number)

    def alias(self, model, alias):
        return self.mlflow.get_registered_model(model).aliases.get(alias)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    s3, mlflow, prefect = free_ports(3)
    settings = StackSettings(
        tmp_path_factory.mktemp("story") / "state",
        s3_port=s3,
        mlflow_port=mlflow,
        prefect_port=prefect,
    )

    def make(verb):
        environment = {**os.environ, **settings.to_environment()}
        command = [sys.executable, "-m", "infra.stack", verb]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True)

    make("up")
    try:
        yield Stack(settings)
    finally:
        make("down")


def wait_until(holds, patience_s=120):
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.25)


def rows(first, count):
    return "".join(
        json.dumps({"prompt": f"{i} is", "completion": " odd" if i % 2 else " even"}) + "\n"
        for i in range(first, first + count)
    )


def write_update(folder):
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_from_an_upload_to_a_fleet_that_serves_on_the_new_base(stack, tmp_path):
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
    planned = stack.run("reconcile", family="tiny", policy=LENIENT, dry_run=True)
    assert planned["type"] == "COMPLETED"
    assert len(stack.mlflow.search_model_versions("name='tiny'")) == 1  # a plan changes nothing
    assert stack.run("reconcile", policy=LENIENT)["type"] == "COMPLETED"
    v2 = stack.mlflow.get_model_version("tiny", "2")
    assert v2.tags["trans_peft.ready"] == "true"
    transferred = stack.mlflow.get_model_version("parity", "2")
    assert transferred.tags["trans_peft.verdict"] == "passed"
    assert stack.alias("parity", f"on-{v2.tags['trans_peft.fingerprint'][:12]}") == "2"
    assert stack.alias("tiny", "serving") == "1"  # nobody promoted v2 yet

    # a person promotes it, and a second run of everything changes nothing
    stack.champion("2")
    for _ in range(2):
        assert stack.run("reconcile", policy=LENIENT)["type"] == "COMPLETED"
    assert stack.alias("tiny", "serving") == "2"
    assert len(stack.mlflow.search_model_versions("name='parity'")) == 2


def test_an_upload_that_is_refused_fails_loudly_and_registers_nothing(stack, tmp_path):
    stack.publish(write_tiny_base(tmp_path / "v3", seed=3), "v3")
    stack.s3.put_object(Bucket="bases", Key="tiny/v3/config.json", Body=b"{}")
    refused = stack.run("ingest-base", uri="s3://bases/tiny/v3")
    assert refused["type"] == "FAILED"
    assert "config.json" in refused["message"]
    assert len(stack.mlflow.search_model_versions("name='tiny'")) == 2


def test_a_version_registered_straight_in_mlflow_is_verified_and_made_ready(stack, tmp_path):
    for file in write_tiny_base(tmp_path / "v4", seed=4).iterdir():
        stack.s3.upload_file(str(file), "bases", f"elsewhere/v4/{file.name}")  # and no manifest
    registered = stack.mlflow.create_model_version("tiny", source="s3://bases/elsewhere/v4")
    stack.run("reconcile", family="tiny", policy=LENIENT)
    version = stack.mlflow.get_model_version("tiny", registered.version)
    assert version.tags["trans_peft.ready"] == "true"
    # unrelated weights of the same shape: no adapter is carried over, and the reason says why
    verdict = stack.mlflow.get_model_version("parity", "1").tags
    assert "incompatible" in str(verdict)


def test_an_adapter_that_exists_is_adopted_from_a_bucket(stack, tmp_path):
    registry = MlflowRegistry(stack.settings.urls["mlflow"])
    folder = registry.download(registry.versions("parity")[0], tmp_path)
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
