"""A real S3 server (SeaweedFS) and a real MLflow server for one test session.

`tests/conftest.py` provides the fixtures. Each server listens on free ports of this machine and
keeps its state in a temporary folder. Both end with the session. Tests share the servers and use
unique names (`unique`) for their objects.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.stack import seaweed

HOST = "127.0.0.1"
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Servers:
    """Addresses and credentials. `environment` has all variables that a client needs."""

    mlflow_url: str
    s3_url: str
    access_key: str
    secret_key: str
    bucket: str = "bases"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.s3_url,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        }


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Start both servers concurrently, and configure this process as their client."""
    folder = tmp_path_factory.mktemp("servers")
    s3_port, mlflow_port, *inner = _free_ports(9)
    found = Servers(
        f"http://{HOST}:{mlflow_port}", f"http://{HOST}:{s3_port}", "test-access", "test-secret"
    )
    with ExitStack() as stack:
        stack.enter_context(_interrupt_on_sigterm())
        s3 = stack.enter_context(_running(_s3_command(folder / "s3", found, inner), folder / "s3"))
        mlflow = stack.enter_context(
            _running(_mlflow_command(mlflow_port), folder / "mlflow", found.environment)
        )
        stack.enter_context(_environment(found.environment))
        _wait(s3, f"{found.s3_url}/healthz")
        _make_buckets(s3)
        _wait(mlflow, f"{found.mlflow_url}/health")
        yield found
    for port in inner:  # SeaweedFS always creates these, and leaves them when it is killed
        for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
            path.unlink(missing_ok=True)


@pytest.fixture
def unique() -> str:
    """A name that is unique in the session."""
    return f"t{uuid.uuid4().hex[:10]}"


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen
    log: Path


@contextmanager
def _running(
    command: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[_Server]:
    folder.mkdir(exist_ok=True)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group, so that its children end with it
        )
        try:
            yield _Server(process, log)
            if process.poll() is not None:
                pytest.fail(f"{command[:4]} exited during the session:\n{log.read_text()[-3000:]}")
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Kill the whole group. A clean shutdown is not needed, because the folder is temporary."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _s3_command(folder: Path, found: Servers, inner: list[int]) -> list[str]:
    return seaweed.command(
        folder,
        port=int(found.s3_url.rpartition(":")[2]),
        inner_ports=dict(zip(seaweed.INNER_PORTS, inner, strict=True)),
        credentials=(found.access_key, found.secret_key),
        volume_mb=64,
    )


def _mlflow_command(port: int) -> list[str]:
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", HOST, "--port", str(port), "--workers", "1",
        "--allowed-hosts", f"{HOST}:{port}",
        "--backend-store-uri", "sqlite:///mlflow.db",
        "--serve-artifacts", "--artifacts-destination", "s3://mlflow/",
    ]  # fmt: skip


def _wait(server: _Server, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    pytest.fail(f"{url} did not answer; end of its log:\n{server.log.read_text()[-3000:]}")


def _make_buckets(server: _Server) -> None:
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.Session().client("s3")
    deadline = time.monotonic() + START_TIMEOUT_S
    for bucket in ("bases", "mlflow"):
        while True:  # the gateway is healthy shortly before it can store
            try:
                client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=bucket, Key="ready", Body=b"1")
                client.delete_object(Bucket=bucket, Key="ready")
                break
            except ClientError:
                if time.monotonic() > deadline or server.process.poll() is not None:
                    raise
                time.sleep(0.2)


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the session as Ctrl-C does, so that the servers end too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
