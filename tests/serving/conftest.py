import json
import shutil
from pathlib import Path

import pytest

from tests.serving.fleet import ServingFleet


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory) -> tuple[Path, Path]:
    """Two versions of a tiny base: equal shapes, other weights."""
    from tests.tiny import write_tiny_base

    folder = tmp_path_factory.mktemp("bases")
    return write_tiny_base(folder / "v1", 0), write_tiny_base(folder / "v2", 1)


@pytest.fixture
def fleet(tmp_path, tiny_bases) -> ServingFleet:
    """v1 serves chat and code; chat passed on v2, and code is inconclusive there."""
    from trans_peft.domain.evaluation import Verdict

    fleet = ServingFleet(tmp_path)
    v1, v2 = (fleet.add_base(f"v{i}", path) for i, path in enumerate(tiny_bases, 1))
    fleet.train("chat", v1, seed=1)
    fleet.train("code", v1, seed=2)
    fleet.catalog.set_serving(v1)
    fleet.catalog.set_alias_manually(fleet.family, "champion", v1.number)
    fleet.transfer("chat", v2)
    fleet.transfer("code", v2, Verdict.INCONCLUSIVE)
    return fleet


@pytest.fixture
def qwen2_fleet(tmp_path, tiny_bases) -> ServingFleet:
    """On a base whose output layer vLLM does not adapt, plain and adapts-output-layer serve."""
    base = shutil.copytree(tiny_bases[0], tmp_path / "qwen2")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    )
    fleet = ServingFleet(tmp_path)
    v1 = fleet.add_base("v1", base)
    fleet.train("plain", v1, seed=1)
    fleet.train("adapts-output-layer", v1, seed=2, output_layer=True)
    fleet.catalog.set_serving(v1)
    return fleet
