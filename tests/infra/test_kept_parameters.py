"""Parameters that were changed in Prefect stay while prefect.yaml is the same."""

import json
from types import SimpleNamespace

import httpx
import pytest

from infra.stack.kept_parameters import KeptParameters

FILE, CHANGED = {"policy": {}, "wait": False}, {"policy": {"label": "june"}, "wait": False}


@pytest.fixture
def prefect(tmp_path):
    """A Prefect server with one deployment, and `make up` without its other steps."""
    server = SimpleNamespace(parameters=None)

    def answer(request):
        if server.parameters is None:
            return httpx.Response(404)
        if request.method == "PATCH":
            assert request.url.path == "/api/deployments/7"
            server.parameters = json.loads(request.content)["parameters"]
        return httpx.Response(200, json={"id": "7", "parameters": server.parameters})

    def client(timeout_s):
        return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://p")

    settings = SimpleNamespace(state=tmp_path, checkout=tmp_path, prefect_client=client)
    (tmp_path / "prefect.yaml").write_text("one")

    def up(parameters=FILE):
        kept = KeptParameters.read(settings)
        server.parameters = parameters
        return kept.restore()

    server.up = up
    return server


def test_a_first_deployment_has_the_parameters_of_the_file(prefect):
    assert prefect.up() == ""
    assert prefect.parameters == FILE


def test_changed_parameters_stay(prefect):
    prefect.up()
    prefect.parameters = CHANGED
    assert prefect.up() == "kept policy of reconcile/default, which differ from prefect.yaml"
    assert prefect.parameters == CHANGED


def test_a_changed_file_replaces_them_and_says_so(prefect, tmp_path):
    prefect.up()
    prefect.parameters = CHANGED
    (tmp_path / "prefect.yaml").write_text("two")
    assert prefect.up() == "prefect.yaml changed and replaced policy of reconcile/default"
    assert prefect.parameters == FILE
    assert prefect.up() == ""
