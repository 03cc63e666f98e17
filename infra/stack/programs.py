"""Command and environment of each of the seven programs of the stack.

The process manager starts each program as `python -m infra.stack run NAME`, which replaces itself
by the program. Configuration files and command lines therefore contain no secrets, and each start
can choose free ports.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.bridge.settings import S3_PATH
from infra.stack import seaweed
from infra.stack.interrupted import INTERRUPTED_S, WORKER, crash_interrupted_runs
from infra.stack.machine import PROGRAM_MARK, end, free_ports, marked, port_is_free
from infra.stack.settings import (
    BASES_URI,
    HOST,
    LOCAL_NAMES,
    StackSettings,
    without_services,
)
from tasks.settings import METRICS_FOLDER
from trans_peft.domain.conventions import WORK_POOL

__all__ = ["PROGRAMS", "Program", "exec_program", "leftover_sockets"]


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: name in supervisor and of the log.
        command: returns the command line.
        environment: returns the variables to add.
        stop_s: seconds that it may take to end.
        before: called before each start.
    """

    name: str
    command: Callable[[StackSettings], list[str]]
    environment: Callable[[StackSettings], Mapping[str, str]]
    stop_s: int
    before: Callable[[StackSettings], None] = lambda settings: None


def _s3_command(settings: StackSettings) -> list[str]:
    folder = _folder(settings, "s3")
    _write_notification_config(settings, folder / "notification.toml")
    return seaweed.command(
        folder,
        port=settings.s3_port,
        inner_ports=_inner_ports(folder),
        credentials=(settings.secrets.s3_access_key, settings.secrets.s3_secret_key),
    )


def _write_notification_config(settings: StackSettings, path: Path) -> None:
    """Configure the filer, which reads this file from its directory, to post writes to the bridge.

    SeaweedFS has no notifications per bucket. Its retries end after about two minutes.
    """
    bucket = BASES_URI.removeprefix("s3:/")
    path.touch(mode=0o600)
    path.write_text(
        f"""[notification.webhook]
enabled = true
endpoint = "{settings.urls["bridge"]}{S3_PATH}"
bearer_token = "{settings.secrets.bridge_s3_token}"
timeout_seconds = 30
max_retries = 8
event_types = ["create", "update", "rename"]
path_prefixes = ["/buckets{bucket}"]
"""
    )


def leftover_sockets(settings: StackSettings) -> list[Path]:
    """Return the sockets that SeaweedFS creates in /tmp and leaves there when it is killed."""
    path = settings.state / "s3" / "ports.json"
    ports = json.loads(path.read_text()).values() if path.exists() else ()
    parts = ("master", "volume", "filer", "s3")
    sockets = (Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock") for port in ports for part in parts)  # noqa: S108
    return [socket for socket in sockets if socket.exists()]


def _inner_ports(folder: Path) -> dict[str, int]:
    """Return the ports for internal use by SeaweedFS. Replaces those that are taken.

    They are stored, because the master names its data folder after its port.
    """
    path = folder / "ports.json"
    ports = json.loads(path.read_text()) if path.exists() else {}
    taken = [
        name for name in seaweed.INNER_PORTS if name not in ports or not port_is_free(ports[name])
    ]
    ports.update(zip(taken, free_ports(len(taken)), strict=True))
    path.write_text(json.dumps(ports, indent=2))
    return ports


def _mlflow_command(settings: StackSettings) -> list[str]:
    hosts = [f"{host}:{settings.mlflow_port}" for host in LOCAL_NAMES]
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", HOST,
        "--port", str(settings.mlflow_port),
        "--workers", "1",  # an upload runs in a thread; each further worker needs 300 MB
        "--allowed-hosts", ",".join(hosts),
        "--artifacts-destination", "s3://mlflow/",
    ]  # fmt: skip


def _mlflow_environment(settings: StackSettings) -> dict[str, str]:
    sqlite = f"sqlite:///{_folder(settings, 'mlflow')}/mlflow.db"
    client = settings.client_environment
    return {
        **{name: value for name, value in client.items() if name.startswith("AWS_")},
        "MLFLOW_BACKEND_STORE_URI": settings.mlflow_database or sqlite,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # scorers of traces: eight processes
        # Webhooks go to this machine, and their secrets must be readable after a restart.
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": settings.secrets.webhook_key,
        "MLFLOW_WEBHOOK_CACHE_TTL": "2",  # s; a new webhook would miss events for 60 s otherwise
    }


def _prefect_command(settings: StackSettings) -> list[str]:
    port = str(settings.prefect_port)
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", port]


def _prefect_environment(settings: StackSettings) -> dict[str, str]:
    folder = _folder(settings, "prefect")
    client = settings.client_environment
    return {
        **{name: value for name, value in client.items() if name.startswith("PREFECT_")},
        "PREFECT_API_DATABASE_CONNECTION_URL": settings.prefect_database
        or f"sqlite+aiosqlite:///{folder}/prefect.db",
        "PREFECT_SERVER_API_AUTH_STRING": client["PREFECT_API_AUTH_STRING"],
        # The page requests the API at 127.0.0.1, and may have been opened at localhost.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(
            f"http://{name}:{settings.prefect_port}" for name in LOCAL_NAMES
        ),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui"),
        # A slot whose holder was killed is released even if the server restarts meanwhile.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        "DO_NOT_TRACK": "1",
    }


def _worker_command(settings: StackSettings) -> list[str]:
    return [
        sys.executable, "-m", "prefect", "worker", "start",
        "--pool", WORK_POOL, "--type", "process", "--name", WORKER, "--install-policy", "never",
    ]  # fmt: skip


def _worker_environment(settings: StackSettings) -> dict[str, str]:
    return {
        **settings.client_environment,
        **settings.worker_choices,
        "TRANS_PEFT_STATE": str(_folder(settings, "work")),
        METRICS_FOLDER: str(_metrics_folder(settings)),
        "TRANS_PEFT_CHECKOUT": str(settings.checkout),
        "TRANS_PEFT_BASES_URI": BASES_URI,
        "TRANS_PEFT_CHECKPOINTS_URI": "s3://data/checkpoints",
        "TRANS_PEFT_SUITES_URI": "s3://data/suites",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the task retries too, and logs it
        # Waiting threads that spin would take the cores from other processes.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "10",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # A run repeats its requests safely, so one 500 does not have to end it.
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",
    }


def _exporter_command(settings: StackSettings) -> list[str]:
    return [sys.executable, "-m", "infra.exporter"]


def _exporter_environment(settings: StackSettings) -> dict[str, str]:
    return {
        METRICS_FOLDER: str(_metrics_folder(settings)),
        "TRANS_PEFT_METRICS_HOST": HOST,
        "TRANS_PEFT_METRICS_PORT": str(settings.metrics_port),
    }


def _bridge_command(settings: StackSettings) -> list[str]:
    return [sys.executable, "-m", "infra.bridge", "serve"]


def _ui_command(settings: StackSettings) -> list[str]:
    return [sys.executable, "-m", "trans_peft.cli", "ui"]


def _ui_environment(settings: StackSettings) -> dict[str, str]:
    """Return the servers' URLs alone: the fleet page needs no credentials."""
    urls = settings.urls
    return {
        "MLFLOW_TRACKING_URI": urls["mlflow"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # A person waits for the page.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "TRANS_PEFT_UI_HOST": HOST,
        "TRANS_PEFT_UI_PORT": str(settings.ui_port),
        "TRANS_PEFT_UI_MLFLOW_URL": urls["mlflow"],
        "TRANS_PEFT_UI_PREFECT_URL": urls["prefect"],
    }


PROGRAMS = {
    program.name: program
    for program in (
        Program("s3", _s3_command, lambda settings: {}, stop_s=4),
        Program("mlflow", _mlflow_command, _mlflow_environment, stop_s=10),
        Program("prefect", _prefect_command, _prefect_environment, stop_s=10),
        Program("worker", _worker_command, _worker_environment, 30, crash_interrupted_runs),
        Program("bridge", _bridge_command, lambda s: s.bridge_environment, stop_s=10),
        Program("ui", _ui_command, _ui_environment, stop_s=4),
        Program("exporter", _exporter_command, _exporter_environment, stop_s=4),
    )
}


def exec_program(name: str, settings: StackSettings) -> None:
    """Replace this process by the program of this name. Does not return.

    First ends the processes that an earlier, killed instance left: a child that holds the port, or
    flow runs without a worker.
    """
    end(marked(settings.state, name), grace_s=INTERRUPTED_S)
    program = PROGRAMS[name]
    program.before(settings)
    command = program.command(settings)
    environment = {
        **without_services(os.environ),
        **program.environment(settings),
        PROGRAM_MARK: name,
    }
    os.chdir(_folder(settings, name))
    os.execve(command[0], command, environment)  # noqa: S606  our own command, without a shell


def _metrics_folder(settings: StackSettings) -> Path:
    return _folder(settings, "work/metrics")


def _folder(settings: StackSettings, name: str) -> Path:
    folder = settings.state / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
