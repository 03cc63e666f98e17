import pytest

from tests.lifecycle.fleet import MemoryFleet


@pytest.fixture
def fleet(tmp_path):
    return MemoryFleet(tmp_path)


@pytest.fixture
def two_bases(fleet):
    """v1 serves two adapters that were trained on it; v2 is ready and has no verdicts."""
    v1 = fleet.add_base("v1")
    fleet.add_adapter("chat", v1)
    fleet.add_adapter("code", v1)
    fleet.promote(v1)
    fleet.apply_verdicts()
    return v1, fleet.add_base("v2")
