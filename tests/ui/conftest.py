import pytest
from starlette.testclient import TestClient

from tests.ui.fleets import example
from trans_peft.ui.app import create_app
from trans_peft.ui.settings import UiSettings

SETTINGS = UiSettings(
    mlflow_url="http://mlflow.test:5500",
    prefect_url="http://prefect.test:4250",
    person_header="X-Forwarded-User",
    refresh_s=3600,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet with every state of an adapter. Tests that share it do not change it."""
    return example(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def client(fleet):
    with client_of(fleet.platform) as client:
        yield client


def client_of(platform, settings=SETTINGS):
    app = create_app(platform, settings)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
