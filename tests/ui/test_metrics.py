"""The metrics agree with the JSON of the pages, and cost no read of the registry."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tests.ui.conftest import SETTINGS, client_of
from tests.ui.fleets import FAMILY
from trans_peft.edges.memory import memory_platform
from trans_peft.ui.app import create_app


def samples(client, **headers):
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    return {
        (sample.name.removeprefix("trans_peft_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def found(client):
    client.get(f"/families/{FAMILY}")  # waits for the first read
    return samples(client)


def test_the_numbers_are_those_of_the_progress(client, found):
    progress = client.get(f"/api/families/{FAMILY}/progress").json()
    wanted = [b for b in progress["bases"] if b["is_desired"] or b["is_serving"]]
    assert wanted
    for base in wanted:
        key = base["base"], FAMILY  # label values in the order of their names
        for state, count in base["states"].items():
            assert found["adapters", *key, state] == count
        assert found["adapters_serving", *key] == base["serving"]
        assert found["adapters_parked", *key] == base["parked"]
    assert found["verdicts_missing", FAMILY] == progress["missing"]
    assert 0 <= found["fleet_age_seconds", FAMILY] < 300


def test_a_champion_that_does_not_serve_is_pending(client, found):
    (family,) = [f for f in client.get("/api/families").json() if f["name"] == FAMILY]
    assert found["promotion_pending", FAMILY] == (family["champion"] != family["serving"])
    assert found["registry_problems", FAMILY] == family["problems"]


def test_a_registry_without_families_has_no_numbers(tmp_path):
    with client_of(memory_platform(tmp_path)) as client:
        assert samples(client) == {}


@pytest.mark.parametrize(
    ("host", "path", "status"),
    [
        ("10.1.2.3:4270", "/metrics", 200),
        ("[fd00::7]:4270", "/metrics", 200),
        ("localhost", "/metrics", 200),
        ("attacker.example", "/metrics", 400),
        ("10.1.2.3:4270", "/", 400),
    ],
)
def test_metrics_are_open_to_requests_by_address_alone(fleet, host, path, status):
    client = TestClient(create_app(fleet.platform, SETTINGS), base_url="http://localhost")
    assert client.get(path, headers={"host": host}).status_code == status


def test_an_old_family_is_read_in_the_background(fleet, monkeypatch):
    with client_of(fleet.platform) as client:
        client.get(f"/families/{FAMILY}")
        asked = []
        monkeypatch.setattr("trans_peft.ui.metrics._MAX_AGE_S", -1.0)
        monkeypatch.setattr(
            "trans_peft.ui.snapshots.Snapshots._wake_if_due", lambda _, cached: asked.append(cached)
        )
        samples(client)
        assert len(asked) == 1
