"""The stack as `make up` starts it, and requests to it as its users make them."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from uuid import uuid4

import boto3
import httpx
import torch
from mlflow import MlflowClient

from infra.stack.machine import port_is_free
from infra.stack.settings import StackSettings
from tests.tiny import tiny_model, tiny_tokenizer

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


def _ports():
    """Yield free ports below the kernel's ephemeral range, different for each xdist worker.

    A port of the ephemeral range could be taken before the stack listens on it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = range(lowest - 1_000 * (worker + 1), lowest - 1_000 * worker)
    yield from filter(port_is_free, cycle(own))


_PORTS = _ports()


def settings_below(state):
    """Return the settings of a separate stack, with unused ports."""
    s3, mlflow, prefect, bridge, ui, metrics = islice(_PORTS, 6)
    return StackSettings(
        state=state,
        s3_port=s3,
        mlflow_port=mlflow,
        prefect_port=prefect,
        bridge_port=bridge,
        ui_port=ui,
        metrics_port=metrics,
    )


def request_prefect(settings, method, path, **body):
    """Request Prefect's API. On a busy machine, its SQLite is slow or answers 503.

    A request that times out is repeated, so a request that creates something needs an idempotency
    key.
    """
    url = f"{settings.urls['prefect']}/api/{path}"
    for last in (*[False] * 9, True):
        try:
            answer = httpx.request(method, url, auth=settings.prefect_auth, timeout=60, **body)
        except httpx.TimeoutException:
            if last:
                raise
            continue
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(1)
    answer.raise_for_status()
    return answer.json() if answer.content else None


@dataclass
class Stack:
    settings: StackSettings

    def __post_init__(self):
        client = self.settings.client_environment
        self.s3 = boto3.Session().client(
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
        return request_prefect(self.settings, method, path, **body)

    def emit(self, event, **payload):
        """Send an event to Prefect, as another program does."""
        body = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": event,
            "resource": {"prefect.resource.id": "another-program"},
            "payload": payload,
        }
        url = f"{self.settings.urls['prefect']}/api/events"
        auth = self.settings.prefect_auth
        httpx.post(url, json=[body], auth=auth, timeout=60).raise_for_status()

    def set_parameters_of_reconcile(self, **parameters):
        """Change the parameters of the reconcile deployment, which all its runs use."""
        found = self.prefect("GET", "deployments/name/reconcile/default")
        given = {"parameters": {**found["parameters"], **parameters}}
        self.prefect("PATCH", f"deployments/{found['id']}", json=given)

    def publish(self, folder, version, family="tiny", bucket="bases"):
        """Upload a base with this project's command.

        The command refuses a place outside of `bases` if it knows the rules of the workers. Another
        sender does not know them.
        """
        environment = dict(self.environment)
        if bucket != "bases":
            environment.pop("TRANS_PEFT_BASES_URI", None)
        subprocess.run(
            [
                *(sys.executable, "-m", "trans_peft.cli", "publish", folder),
                *(f"s3://{bucket}/{family}/{version}", "--family", family, "--version", version),
            ],
            env=environment,
            cwd=ROOT,
            check=True,
        )

    def champion(self, number, family="tiny"):
        """Set `champion`, as a user does in MLflow's page."""
        self.mlflow.set_registered_model_alias(family, "champion", number)

    def alias(self, model, alias):
        return self.mlflow.get_registered_model(model).aliases.get(alias)


@contextmanager
def running(settings):
    """Start a stack with these settings, and stop it at the end."""

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


def write_update(folder, seed=1):
    model = tiny_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
