"""A real MLflow server behind a faulty proxy: failed requests, and requests without a response.

Calls are retried as the tasks retry them, and the registry ends in the same state as without
faults. Each run has faults for ten seconds, and for longer with STORMS=20.
"""

import errno
import os
from dataclasses import replace

import pytest

from tests.edges.examples import evaluation
from tests.faults.proxy import Faults, RandomFaults, proxied
from tests.lifecycle.fleet import MemoryFleet
from tests.lifecycle.test_memory_and_mlflow import Upgrade
from trans_peft.edges.mlflow_catalog import MlflowCatalog
from trans_peft.edges.mlflow_evaluations import MlflowEvaluations
from trans_peft.errors import AccessError, StoreError

pytestmark = pytest.mark.servers

STORMS = int(os.environ.get("STORMS", "1"))


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    """Remove the pause between the attempts of MLflow's client; their number stays the same."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


class Again:
    """A port that repeats each call, up to 30 times, while it raises StoreError."""

    def __init__(self, port):
        self.port = port

    def __getattr__(self, name):
        method = getattr(self.port, name)

        def call(*arguments, **options):
            for _ in range(30):
                try:
                    return method(*arguments, **options)
                except StoreError:
                    pass
            raise AssertionError(f"{name} failed 30 times")

        return call


def promote_approve_roll_back(fleet):
    """A person promotes, approves manually and rolls back; the verdicts are applied after each."""
    upgrade = Upgrade(fleet)
    fleet.promote(upgrade.v2)
    upgrade.apply_verdicts()
    upgrade.click(upgrade.bad, 2)
    upgrade.apply_verdicts()
    fleet.promote(upgrade.v1)
    upgrade.apply_verdicts()
    return upgrade.state


@pytest.mark.slow
@pytest.mark.timeout(300 * STORMS)
def test_failed_requests_do_not_change_the_final_registry(servers, unique, tmp_path, monkeypatch):
    expected = promote_approve_roll_back(
        MemoryFleet.on_mlflow(tmp_path, f"{unique}-calm", servers.mlflow_url)
    )
    for seed in range(1, STORMS + 1):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(seed % 2))
        faults = RandomFaults(seed, share=0.08)
        with proxied(servers.mlflow_url, faults, keeps_host=False) as url:
            fleet = MemoryFleet.on_mlflow(tmp_path, f"{unique}-{seed}", url)
            person = MemoryFleet.on_mlflow(tmp_path, "", servers.mlflow_url).person
            ports = fleet.platform
            fleet.person = person
            fleet.platform = replace(
                ports, catalog=Again(ports.catalog), registry=Again(ports.registry)
            )
            assert promote_approve_roll_back(fleet) == expected, seed
        assert faults.met > 5


@pytest.fixture
def place(servers):
    """A server behind a proxy, and what the proxy is to do wrong."""
    faults = Faults()
    with proxied(servers.mlflow_url, faults, keeps_host=False) as url:
        yield url, faults


KINDS = {
    "500": (StoreError, "failed or cannot be reached"),
    "reset": (StoreError, "failed or cannot be reached"),
    "truncate": (StoreError, "failed or cannot be reached"),
    "403": (AccessError, "denies access"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lasting_fault_is_reported_by_every_method(place, servers, unique, kind):
    url, faults = place
    known = evaluation(unique)
    MlflowEvaluations(servers.mlflow_url).put(known)
    error, words = KINDS[kind]
    asked = {
        "": lambda: MlflowCatalog(url).families(),
        "evaluation.json": lambda: MlflowEvaluations(url).get(known.key),
        "/evaluation.json": lambda: MlflowEvaluations(url).put(evaluation(f"{unique}-more")),
    }
    if kind == "truncate":
        del asked["/evaluation.json"]  # it was kept, whatever is missing of the answer
    for path, ask in asked.items():
        faults.kind, faults.left, faults.of = kind, 1000, path
        with pytest.raises(StoreError, match=words) as caught:
            ask()
        assert type(caught.value) is error
        assert "do:" in str(caught.value)
        faults.left = 0
        ask()


def test_a_full_disk_is_not_blamed_on_the_server(servers, unique, monkeypatch):
    store, known = MlflowEvaluations(servers.mlflow_url), evaluation(unique)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(StoreError, match=r"the disk of .* is full"):
            store.put(known)
    store.put(known)
    with monkeypatch.context() as patch:
        repository = "mlflow.store.artifact.mlflow_artifacts_repo.MlflowArtifactsRepository"
        patch.setattr(f"{repository}._download_file", full)
        with pytest.raises(StoreError, match=r"the disk of .* is full"):
            store.get(known.key)
    assert store.get(known.key) == known
