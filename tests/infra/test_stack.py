"""The stack through its command line, with real servers."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import boto3
import httpx
import psutil
import pytest
from mlflow import MlflowClient

from infra.bridge.authentication import sign
from infra.bridge.webhooks import EVENTS
from infra.stack.health import is_healthy
from infra.stack.job_template import PROCESS_JOB_TEMPLATE
from infra.stack.machine import marked, port_is_free
from infra.stack.programs import leftover_sockets
from infra.stack.settings import BUCKETS, StackSettings
from infra.stack.supervisor import Supervisor
from tests.end_to_end.running_stack import ROOT, request_prefect, settings_below
from tests.infra.unauthenticated import SECRET, answers_without_credentials, ports_of

pytestmark = pytest.mark.stack


def stack(verb, settings, **more):
    environment = {**os.environ, **settings.to_environment(), **more}
    return subprocess.run(
        [sys.executable, "-m", "infra.stack", verb],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_port_in_use_is_reported_with_its_owner_and_nothing_starts(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = {"mlflow_port": other.getsockname()[1]}
        settings = settings_below(tmp_path / "state").model_copy(update=taken)
        refused = stack("up", settings)
    assert refused.returncode == 1
    assert f"port {settings.mlflow_port} is in use by process {os.getpid()}" in refused.stderr
    assert "MLFLOW_PORT=" in refused.stderr
    assert marked(settings.state) == []


def test_down_and_status_without_a_stack(tmp_path):
    settings = settings_below(tmp_path / "state")
    assert stack("down", settings).returncode == 0
    assert not settings.state.exists()
    assert stack("status", settings).returncode == 1


def test_a_server_that_exits_is_reported_with_its_log_and_all_programs_stop(tmp_path):
    settings = settings_below(tmp_path / "state")
    died = stack("up", settings, MLFLOW_BACKEND_STORE_URI="no-such-database://")
    assert died.returncode == 1
    assert "mlflow exited during its start" in died.stderr
    assert "no-such-database" in died.stderr
    assert "stopped" in died.stdout
    assert marked(settings.state) == []
    assert leftover_sockets(settings) == []


@dataclass
class Running:
    settings: StackSettings
    output: str

    def pids(self):
        return {name: p.pid for name, p in Supervisor(self.settings).programs().items()}

    def prefect(self, path, *, method="POST", **body):
        return request_prefect(self.settings, method, path, json=body)

    def s3(self):
        client = self.settings.client_environment
        return boto3.Session().client(
            "s3",
            endpoint_url=client["AWS_ENDPOINT_URL"],
            aws_access_key_id=client["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=client["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def deployments(self):
        return {d["entrypoint"].split(":")[1]: d for d in self.prefect("deployments/filter")}

    def deployment(self, flow):
        return self.deployments()[flow]

    def state(self, run, until, timeout_s=120):
        deadline = time.monotonic() + timeout_s
        while True:
            (found,) = self.prefect("flow_runs/filter", flow_runs={"id": {"any_": [run]}})
            if found["state"]["type"] in until:
                return found["state"]
            assert time.monotonic() < deadline, found["state"]
            time.sleep(0.5)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    settings = settings_below(tmp_path_factory.mktemp("stack") / "state")
    up = stack("up", settings)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Running(settings, up.stdout)
    finally:
        stack("down", settings)


def test_up_shows_the_urls_and_every_program_is_healthy(running):
    for url in running.settings.urls.values():
        assert url in running.output
    assert stack("status", running.settings).returncode == 0


def test_the_ports_of_a_running_stack_are_known_by_its_state_folder(running):
    settings = running.settings
    alone = dict.fromkeys(settings.ports, "")
    assert stack("status", settings, **alone).returncode == 0
    shown = stack("env", settings, **alone).stdout
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL"):
        assert f"export {name}={settings.client_environment[name]}\n" in shown
    assert settings.urls["ui"] in stack("up", settings, **alone).stdout
    refused = stack("env", settings, MLFLOW_PORT=str(settings.mlflow_port + 10_000))
    assert refused.returncode == 1 and refused.stdout == ""
    assert f"MLFLOW_PORT={settings.mlflow_port} " in refused.stderr


def test_every_deployment_of_prefect_yaml_is_there(running):
    found = running.deployments()
    assert set(found) == {
        "adopt_adapter",
        "experiment",
        "experiment_cell",
        "ingest_base",
        "reconcile",
        "train_adapter",
        "transfer_shard",
    }
    for deployment in found.values():
        (step,) = deployment["pull_steps"]
        assert step["prefect.deployments.steps.set_working_directory"] == {
            "directory": "{{ $TRANS_PEFT_CHECKOUT }}"
        }
    reconcile = found["reconcile"]
    assert reconcile["parameters"]["policy"]["margin_points"] == 5.0
    assert reconcile["schedules"][0]["schedule"]["cron"] == "*/10 * * * *"
    assert reconcile["global_concurrency_limit"]["limit"] == 8
    assert reconcile["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (slots,) = [
        limit for limit in running.prefect("v2/concurrency_limits/filter") if limit["name"] == "gpu"
    ]
    assert slots["limit"] == 1
    assert slots["active"]


def test_the_worker_runs_a_flow_from_the_checkout_against_the_servers(running):
    url = f"deployments/{running.deployment('reconcile')['id']}/create_flow_run"
    key = str(uuid4())
    run = running.prefect(url, parameters={"dry_run": True}, idempotency_key=key)["id"]
    state = running.state(run, until=["COMPLETED", "FAILED", "CRASHED"])
    assert state["type"] == "COMPLETED", (running.settings.logs / "worker.log").read_text()[-3000:]


def log_lines(running, deadline_s=30):
    """Yield the lines of the bridge's log, again and again until the deadline."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        for line in (running.settings.logs / "bridge.log").read_text().splitlines():
            yield json.loads(line)
        time.sleep(0.2)


def run_of(running, kind, about):
    """Return the log line of this notification, and the run that it started or found."""
    for line in log_lines(running):
        if (line.get("kind"), line.get("about")) == (kind, about):
            assert line["outcome"] in ("started", "waiting"), line
            asked = running.prefect("flow_runs/filter", flow_runs={"id": {"any_": [line["run"]]}})
            assert asked[0]["deployment_id"] == running.deployment("reconcile")["id"]
            return line, asked[0]
    raise AssertionError((running.settings.logs / "bridge.log").read_text())


def test_the_bridge_starts_one_reconcile_when_it_starts(running):
    line, run = run_of(running, "start-up", "")
    notification, notified_at = sorted(run["tags"])
    assert notification == f"notification:{line['delivery']}"
    at = datetime.fromisoformat(notified_at.removeprefix("notified:start-up:"))
    assert at <= datetime.fromisoformat(run["created"])
    assert run["parameters"]["family"] is None


def test_a_champion_set_in_mlflow_starts_reconcile_and_nothing_else_of_ours_does(running):
    url = f"{running.settings.urls['mlflow']}/api/2.0/mlflow"
    name = {"name": "notified"}
    tags = [{"key": "trans_peft.kind", "value": "base"}]
    httpx.post(f"{url}/registered-models/create", json={**name, "tags": tags}).raise_for_status()
    version = {**name, "source": "s3://bases/notified/v1"}
    httpx.post(f"{url}/model-versions/create", json=version).raise_for_status()
    for alias in ("serving", "champion"):
        request = {**name, "alias": alias, "version": "1"}
        httpx.post(f"{url}/registered-models/alias", json=request).raise_for_status()
    _, run = run_of(running, "champion", "notified")
    assert run["parameters"]["family"] in ("notified", None)
    log = (running.settings.logs / "bridge.log").read_text()
    assert '"serving"' not in log


def test_the_webhook_in_mlflow_is_corrected(running):
    bridge = running.settings.bridge_environment
    client = MlflowClient(running.settings.urls["mlflow"])
    url = f"{running.settings.urls['bridge']}/notifications/mlflow"
    (ours,) = client.list_webhooks()
    client.update_webhook(ours.webhook_id, events=["model_version.created"], status="DISABLED")
    client.create_webhook("another", url, ["model_version_tag.deleted"])
    client.create_webhook("theirs", f"{url}/theirs", ["model_version.created"], secret="s" * 30)
    again = subprocess.run(
        [sys.executable, "-m", "infra.bridge", "webhooks"],
        cwd=ROOT,
        env={**os.environ, **bridge},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (again.returncode, again.stderr) == (0, ""), again.stdout
    kept = {hook.name: hook for hook in client.list_webhooks()}
    assert kept.keys() == {"trans-peft", "theirs"}
    assert kept["trans-peft"].status == "ACTIVE"
    assert {str(event) for event in kept["trans-peft"].events} == {*EVENTS}
    client.delete_webhook(kept["theirs"].webhook_id)


def test_an_upload_s_manifest_starts_reconcile(running):
    s3 = running.s3()
    for name in ("config.json", "trans_peft_manifest.json"):
        s3.put_object(Bucket="bases", Key=f"a b/v1/{name}", Body=b"{}")
    _, run = run_of(running, "upload", "s3://bases/a b/v1")
    assert run["parameters"]["family"] is None
    s3.delete_objects(
        Bucket="bases",
        Delete={
            "Objects": [{"Key": f"a b/v1/{n}"} for n in ("config.json", "trans_peft_manifest.json")]
        },
    )


def test_notifications_duplicated_a_hundred_times_cause_few_runs_and_none_is_lost(running):
    """The run that answers the first copy of a delivery begins after that copy was sent."""
    registry = f"{running.settings.urls['mlflow']}/api/2.0/mlflow/registered-models/create"
    families = ["doubled-a", "doubled-b", "doubled-c"]
    for name in families:
        kind = [{"key": "trans_peft.kind", "value": "base"}]
        httpx.post(registry, json={"name": name, "tags": kind}).raise_for_status()
    sent = [(f"{family}-{n}", family) for family in families for n in range(3)]
    copies = sent * 100
    random.Random(0).shuffle(copies)

    def send(copy):
        delivery_id, family = copy
        data = {"name": family, "alias": "champion", "version": "1"}
        body = {"entity": "model_version_alias", "action": "created", "data": data}
        content, at = json.dumps(body).encode(), str(int(time.time()))
        secret = running.settings.secrets.bridge_mlflow_secret
        headers = {
            "Content-Type": "application/json",
            "X-MLflow-Delivery-Id": delivery_id,
            "X-MLflow-Timestamp": at,
            "X-MLflow-Signature": sign(secret, delivery_id, at, content),
        }
        while True:  # a sender retries
            now = datetime.now(UTC)
            answer = bridge.post("/notifications/mlflow", content=content, headers=headers)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        return delivery_id, now, answer.raise_for_status().json()["run"]

    with (
        httpx.Client(base_url=running.settings.urls["bridge"], timeout=60) as bridge,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(send, copies))
    first = {delivery_id: (at, run) for delivery_id, at, run in reversed(answers)}
    runs = {run for _, _, run in answers}
    assert len(runs) <= len(sent)
    found = running.prefect("flow_runs/filter", flow_runs={"id": {"any_": [*runs]}})
    began = {run["id"]: run["start_time"] for run in found}
    assert began.keys() == runs
    for at, run in first.values():
        assert began[run] is None or datetime.fromisoformat(began[run]) > at


def test_no_log_and_no_command_line_contains_a_secret(running):
    secrets = vars(running.settings.secrets)
    texts = [path.read_text(errors="replace") for path in running.settings.logs.glob("*.log")]
    texts += [" ".join(process.cmdline()) for process in marked(running.settings.state)]
    for name, secret in secrets.items():
        assert not any(secret in text for text in texts), name


def test_mlflow_stores_artifacts_in_its_bucket(running):
    url = f"{running.settings.urls['mlflow']}/api/2.0/mlflow-artifacts/artifacts/a/b.txt"
    httpx.put(url, content=b"bytes", timeout=30).raise_for_status()
    s3 = running.s3()
    assert {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} == set(BUCKETS)
    assert s3.get_object(Bucket="mlflow", Key="a/b.txt")["Body"].read() == b"bytes"


def test_all_servers_listen_on_localhost_only(running):
    ours = {process.pid for process in marked(running.settings.state)}
    listening = [
        c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours
    ]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    strange = httpx.get(
        f"{running.settings.urls['mlflow']}/api/2.0/mlflow/experiments/search",
        headers={"Host": "evil.example"},
    )
    assert strange.status_code == 403


EVIL = {"Origin": "http://evil.example"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "admin/settings"),
        ("POST", "flow_runs/filter"),
        ("POST", "work_pools/filter"),
        ("POST", "events"),
        ("POST", "deployments/"),
        ("GET", "csrf-token?client=x"),
        ("GET", "work_pools/trans-peft"),
        ("GET", "%2e%2e/api/work_pools/trans-peft"),
        ("GET", "health/../work_pools/trans-peft"),
        ("PATCH", "work_pools/trans-peft"),
    ],
)
@pytest.mark.parametrize("auth", [None, ("trans-peft", ""), ("trans-peft", "x"), ("", "x" * 40)])
def test_prefect_requires_its_password(running, method, path, auth):
    url = f"{running.settings.urls['prefect']}/api/{path}"
    body = {} if method != "GET" else None
    answer = httpx.request(method, url, headers=EVIL, json=body, auth=auth, timeout=60)
    assert answer.status_code == 401
    assert "access-control-allow-origin" not in answer.headers


def test_prefect_allows_cross_origin_requests_of_its_own_page_only(running):
    url = f"{running.settings.urls['prefect']}/api/flow_runs/filter"
    port = running.settings.prefect_port
    request = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    own = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
    others = ["http://evil.example", "null", f"http://evil.example:{port}", "http://127.0.0.1:1"]
    for origin in own + others:
        answer = httpx.options(url, headers={"Origin": origin, **request}, timeout=60)
        allowed = answer.headers.get("access-control-allow-origin")
        assert allowed == (origin if origin in own else None)


@pytest.mark.parametrize(
    "path", ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"]
)
def test_prefect_s_sockets_take_nobody_without_its_password(running, path):
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    url = f"ws://127.0.0.1:{running.settings.prefect_port}/api/{path}"
    for subprotocols in (None, ["prefect"]):
        with pytest.raises((WebSocketException, OSError)):  # noqa: SIM117
            with connect(url, subprotocols=subprotocols, open_timeout=30) as socket_:
                socket_.send(json.dumps({"type": "auth", "token": "wrong"}))
                assert json.loads(socket_.recv(timeout=30)).get("type") != "auth_success"
                socket_.send(json.dumps({"type": "filter", "filter": {}}))
                socket_.recv(timeout=30)


def test_login_prints_the_password_of_prefect_s_page(running):
    assert stack("login", running.settings).stdout.strip() == ":".join(
        running.settings.prefect_auth
    )
    assert "infra.stack login" in running.output
    assert running.settings.secrets.prefect_password not in running.output
    settings = httpx.get(f"{running.settings.urls['prefect']}/ui-settings", timeout=60).json()
    assert settings["auth"] == "BASIC"


def test_nobody_chooses_what_a_run_executes(running, tmp_path):
    """Not for a run, not for a deployment, not for a run without one: refused, or ignored."""
    deployment = running.deployment("reconcile")
    evil = tmp_path / "written"
    tomorrow = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
    create = f"deployments/{deployment['id']}/create_flow_run"
    for request in (
        {"command": f"touch {evil}"},
        {"env": {"PYTHONPATH": str(tmp_path)}},
        {"env.PYTHONPATH": str(tmp_path)},
        {"working_dir": str(tmp_path)},
        {"image": "evil"},
    ):
        with pytest.raises(httpx.HTTPStatusError, match="422"):
            running.prefect(create, job_variables=request, state=tomorrow)
    assert running.prefect(create, job_variables={"gpus": 1}, state=tomorrow)["id"]

    of_deployment = f"deployments/{deployment['id']}"
    command = {"command": f"touch {evil}"}
    try:  # Prefect does not check what a deployment is changed to
        running.prefect(of_deployment, method="PATCH", job_variables=command)
        with pytest.raises(httpx.HTTPStatusError, match="422"):
            running.prefect(create, parameters={"dry_run": True})
        made = running.prefect(
            "flow_runs/",
            flow_id=deployment["flow_id"],
            work_pool_name="trans-peft",
            job_variables=command,
            state={"type": "SCHEDULED"},
        )
        ended = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]
        assert running.state(made["id"], until=ended)["type"] != "COMPLETED"
    finally:
        running.prefect(of_deployment, method="PATCH", job_variables={})
    assert not evil.exists()


def test_an_existing_pool_gets_the_template_without_a_command(running):
    pool = "work_pools/trans-peft"
    old = {
        "job_configuration": {"command": "{{ command }}"},
        "variables": {"properties": {"command": {}}},
    }
    running.prefect(pool, method="PATCH", base_job_template=old)
    environment = {**os.environ, **running.settings.to_environment()}
    subprocess.run(
        [sys.executable, "-m", "infra.stack.prefect_objects"],
        cwd=ROOT,
        env={**environment, **running.settings.client_environment},
        check=True,
        timeout=120,
    )
    assert running.prefect(pool, method="GET")["base_job_template"] == PROCESS_JOB_TEMPLATE


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "api/2.0/mlflow/registered-models/create", EVIL),
        ("POST", "api/2.0/mlflow/registered-models/create", {"Origin": "null"}),
        ("POST", "api/2.0/mlflow/registered-models/create", {"Host": "evil.example"}),
        ("POST", "ajax-api/2.0/mlflow/experiments/create", EVIL),
        ("PUT", "api/2.0/mlflow-artifacts/artifacts/x", EVIL),
        ("GET", "api/2.0/mlflow-artifacts/artifacts?path=", {"Host": "evil.example"}),
        ("GET", "api/2.0/mlflow/registered-models/search", {"Host": "evil.example"}),
    ],
)
def test_other_web_pages_cannot_use_mlflow(running, method, path, headers):
    url = f"{running.settings.urls['mlflow']}/{path}"
    body = {"name": "evil"} if method != "GET" else None
    assert httpx.request(method, url, headers=headers, json=body, timeout=60).status_code == 403


def test_no_bucket_is_open_on_any_port_of_the_stack(running):
    """MLflow's own bucket is reached through MLflow: infra/README.md."""
    running.s3().put_object(Bucket="bases", Key="secret/x.txt", Body=SECRET)
    ports = ports_of(marked(running.settings.state))
    assert len(ports) > 8
    assert answers_without_credentials(ports, "bases") == []
    running.s3().delete_object(Bucket="bases", Key="secret/x.txt")


def test_a_second_up_restarts_nothing(running):
    before = running.pids()
    assert stack("up", running.settings).returncode == 0
    assert running.pids() == before


def test_up_with_other_settings_is_refused_while_the_stack_runs(running):
    before = running.pids()
    other = stack("up", running.settings, MLFLOW_PORT="5999")
    assert other.returncode == 1
    assert "MLFLOW_PORT=5999" in other.stderr
    assert running.pids() == before


def test_a_run_of_a_killed_worker_is_marked_crashed_and_starts_reconcile(running):
    before = running.pids()["worker"]
    url = f"deployments/{running.deployment('transfer_shard')['id']}/create_flow_run"
    parameters = {"shard": [], "policy": {}}
    at_work = {"state": {"type": "RUNNING"}, "force": True}
    tomorrow = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
    lost = running.prefect(url, parameters=parameters, state=tomorrow)["id"]
    waits = running.prefect(url, parameters=parameters, state=tomorrow)["id"]
    running.prefect(f"flow_runs/{lost}/set_state", **at_work)
    psutil.Process(before).kill()
    assert running.state(lost, until=["CRASHED"])["message"].startswith("The worker was stopped")
    assert running.state(waits, until=["SCHEDULED"])["type"] == "SCHEDULED"
    assert running.pids()["worker"] not in (0, before)
    deadline = time.monotonic() + 60
    while "AUTOMATION" not in creators_of_runs(running, "reconcile"):
        assert time.monotonic() < deadline
        time.sleep(0.25)


def creators_of_runs(running, name):
    of_it = {"deployment_id": {"any_": [running.deployment(name)["id"]]}}
    runs = running.prefect("flow_runs/filter", flow_runs=of_it)
    return {run["created_by"]["type"] for run in runs if run["created_by"]}


def test_a_killed_server_is_restarted(running):
    before = running.pids()["mlflow"]
    psutil.Process(before).kill()  # its child holds the port and lives on
    deadline = time.monotonic() + 90
    while not is_replaced(running, "mlflow", before):
        assert time.monotonic() < deadline
        time.sleep(0.25)


def is_replaced(running, name, before):
    pid = running.pids()[name]
    if pid in (0, before) or not is_healthy(name, running.settings):
        return False
    process = psutil.Process(pid)
    family = {pid, *(child.pid for child in process.children(recursive=True))}
    port = running.settings.mlflow_port
    return family >= {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }


def test_down_ends_all_programs_after_the_manager_was_killed(running):
    """Nothing reads the output of the programs any more: some exit because of it, others do not."""
    manager = psutil.Process(running.pids()["s3"]).parent()
    manager.kill()
    manager.wait()
    assert marked(running.settings.state)
    ended = stack("down", running.settings)
    assert ended.returncode == 0, ended.stderr
    assert marked(running.settings.state) == []
    assert leftover_sockets(running.settings) == []
    assert all(port_is_free(port) for port in running.settings.ports.values())
    assert stack("down", running.settings).returncode == 0
