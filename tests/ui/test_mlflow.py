"""The JSON over a real MLflow equals that over the platform in memory."""

from dataclasses import replace

import pytest
from mlflow import MlflowClient

from tests.ui.conftest import client_of
from tests.ui.fleets import ExampleFleet
from trans_peft.client import connect
from trans_peft.domain.evaluation import Verdict
from trans_peft.ui.settings import UiSettings


def filled(fleet, prefix):
    """Train two adapters on v1, and judge them on v2 with figures and without."""
    chat, code = f"{prefix}-chat", f"{prefix}-code"
    fleet.add_base("v1")
    fleet.add_base("v2", "v1")
    fleet.train(chat, "v1")
    fleet.train(code, "v1")
    fleet.transfer(chat, "v2", {"exceptions": (12, 9)})
    fleet.refuse(code, "v2", Verdict.INCOMPATIBLE, "lm_head has another shape")
    return fleet


@pytest.mark.servers
def test_the_json_over_mlflow_equals_that_over_memory(servers, unique, tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "mlflow").mkdir()
    memory = filled(ExampleFleet(tmp_path / "memory", unique), unique)
    memory.set_alias("champion", "v2")
    memory.platform.registry.set_owner_manually(f"{unique}-chat", "search")
    real = ExampleFleet(tmp_path / "mlflow", unique)
    real.platform = replace(connect(servers.mlflow_url), store=real.platform.store)
    filled(real, unique)
    MlflowClient(servers.mlflow_url).set_registered_model_alias(unique, "champion", "2")
    MlflowClient(servers.mlflow_url).set_registered_model_tag(f"{unique}-chat", "owner", "search")
    paths = [
        f"/api/families/{unique}/progress",
        f"/api/families/{unique}/adapters?sort=difference",
        f"/api/families/{unique}/adapters/{unique}-chat",
        f"/api/families/{unique}/adapters/{unique}-chat/verdicts/v2",
        f"/api/families/{unique}/adapters/{unique}-code/verdicts/v2",
        f"/api/families/{unique}/bases/v2",
    ]
    with (
        client_of(memory.platform, UiSettings()) as in_memory,
        client_of(real.platform, UiSettings()) as over_mlflow,
    ):
        for path in paths:
            expected, found = in_memory.get(path), over_mlflow.get(path)
            assert (expected.status_code, found.status_code) == (200, 200), found.text
            assert found.json() == expected.json(), path
    assert over_mlflow.get(paths[3]).json()["margin_points"] == 5.0
