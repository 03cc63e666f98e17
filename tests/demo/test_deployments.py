from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from botocore.exceptions import EndpointConnectionError
from mlflow.exceptions import MlflowException
from prefect.client.schemas.objects import State, StateType
from rich.console import Console

from demo import __main__ as demo
from demo import deployments
from demo.deployments import _follow, _Logs, run
from demo.screen import DemoError, Screen


def _state(kind: StateType) -> State:
    return State(type=kind, name=kind.value.title(), message=f"it {kind.value.lower()}")


@dataclass
class Server:
    """Answers each idempotency key with one run, as Prefect does; `ends` is how new ones end."""

    ends: list[StateType]
    runs: dict[str, SimpleNamespace] = field(default_factory=dict)

    def run_deployment(self, name: str, *, idempotency_key: str, **_: object) -> SimpleNamespace:
        made = SimpleNamespace(
            id=uuid4(), name="busy-bee", state=_state(StateType.SCHEDULED), state_name="Scheduled"
        )
        return self.runs.setdefault(idempotency_key, made)

    def follow(self, run_id: object, *_: object) -> SimpleNamespace:
        run = next(run for run in self.runs.values() if run.id == run_id)
        run.state = _state(self.ends.pop(0))
        run.state_name = run.state.name
        return run


@pytest.fixture
def run_demo(monkeypatch: pytest.MonkeyPatch):
    def start(*ends: StateType, server: Server | None = None) -> Server:
        server = server or Server([])
        server.ends = list(ends)
        monkeypatch.setattr(deployments, "run_deployment", server.run_deployment)
        monkeypatch.setattr(deployments, "_follow", server.follow)
        run("train/default", {}, key="k", screen=Screen(Console(quiet=True)))
        return server

    return start


def test_a_run_that_completes_is_started_once(run_demo):
    assert list(run_demo(StateType.COMPLETED).runs) == ["demo/k/0"]


def test_a_crashed_run_is_started_again_under_another_key(run_demo):
    server = run_demo(StateType.CRASHED, StateType.CRASHED, StateType.COMPLETED)
    assert list(server.runs) == ["demo/k/0", "demo/k/1", "demo/k/2"]


def test_a_run_that_always_crashes_ends_the_demo(run_demo):
    with pytest.raises(DemoError, match="it crashed"):
        run_demo(*[StateType.CRASHED] * 9)


@pytest.mark.parametrize("end", [StateType.FAILED, StateType.CANCELLED])
def test_a_failed_run_is_not_retried(run_demo, end: StateType):
    with pytest.raises(DemoError, match="resumes"):
        run_demo(end, StateType.COMPLETED)


def test_a_second_demo_follows_an_active_run_and_skips_ended_ones(run_demo):
    server = run_demo(StateType.CRASHED, StateType.COMPLETED)
    run_demo(StateType.COMPLETED, server=server)
    assert list(server.runs) == ["demo/k/0", "demo/k/1", "demo/k/2"]
    server.runs["demo/k/2"].state = _state(StateType.RUNNING)  # left under way
    run_demo(StateType.COMPLETED, server=server)
    assert list(server.runs) == ["demo/k/0", "demo/k/1", "demo/k/2"]


class Client:
    """A client of a server that stops after its first response, for `outages` requests."""

    def __init__(self, outages: int) -> None:
        self.left, self.requests = outages, 0

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_flow_run(self, run_id: object) -> SimpleNamespace:
        self.requests += 1
        if self.requests == 1:
            return SimpleNamespace(state=_state(StateType.RUNNING), state_name="Running")
        if self.left:
            self.left -= 1
            raise httpx.ConnectError("Connection refused")
        return SimpleNamespace(state=_state(StateType.COMPLETED), state_name="Completed")

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(id=uuid4())

    def read_flow_runs(self, **_: object) -> list[object]:
        return []

    def read_logs(self, *_: object, **__: object) -> list[object]:
        return []


class ClientWithShard(Client):
    """A shard of another reconcile run is running; its first lines arrive after a later one."""

    def __init__(self) -> None:
        super().__init__(0)
        self.own, self.shard, self.shards = uuid4(), uuid4(), uuid4()
        self.logs = [self._log(self.own, 5, "shard judge v2: Running")]

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        assert name == "transfer-shard/default"
        return SimpleNamespace(id=self.shards)

    def read_flow_runs(self, *, flow_run_filter, deployment_filter=None) -> list[SimpleNamespace]:
        if deployment_filter is None:
            assert flow_run_filter.parent_flow_run_id.any_ == [self.own]
            return []
        assert deployment_filter.id.any_ == [self.shards]
        return [SimpleNamespace(id=self.shard)]

    def read_logs(self, log_filter, **_: object) -> list[SimpleNamespace]:
        after = log_filter.timestamp.after_
        return sorted(
            (
                log
                for log in self.logs
                if log.flow_run_id in log_filter.flow_run_id.any_
                and (after is None or log.timestamp > after)
            ),
            key=lambda log: log.timestamp,
        )

    def late_lines(self) -> None:
        self.logs += [self._log(self.shard, 3, "72 of 363"), self._log(self.shard, 6, "132 of 363")]

    def _log(self, run, second, message) -> SimpleNamespace:
        at = datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC)
        return SimpleNamespace(
            id=uuid4(), flow_run_id=run, timestamp=at, message=message, name="prefect.task_runs"
        )


def test_lines_of_running_shards_are_shown_once_also_if_they_arrive_late():
    client = ClientWithShard()
    logs = _Logs(client, client.own)
    assert [log.message for log in logs.new()] == ["shard judge v2: Running"]
    client.late_lines()
    assert [log.message for log in logs.new()] == ["72 of 363", "132 of 363"]
    assert logs.new() == []


@pytest.mark.parametrize("outages", [3, 10**9])
def test_a_server_that_stops_ends_the_demo_and_one_that_restarts_does_not(monkeypatch, outages):
    monkeypatch.setattr(deployments, "get_client", lambda **_: Client(outages))
    monkeypatch.setattr(deployments, "_POLL_S", 0.01)
    monkeypatch.setattr(deployments, "_MAX_SILENCE_S", 1.0)
    screen = Screen(Console(quiet=True))
    if outages == 3:
        assert _follow(uuid4(), "train/default", screen).state.is_completed()
    else:
        with pytest.raises(DemoError, match=r"(?s)does not respond.*Connection refused.*make demo"):
            _follow(uuid4(), "train/default", screen)


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("Connection refused"),
        EndpointConnectionError(endpoint_url="http://127.0.0.1:8333"),
        MlflowException("API request failed"),
    ],
)
def test_any_client_of_a_stopped_server_ends_the_demo_with_the_advice(monkeypatch, capsys, error):
    def stopped(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(demo, "_run", stopped)
    assert demo.main([]) == 1
    assert "`make demo` starts them and resumes" in capsys.readouterr().out
