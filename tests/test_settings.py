"""What a worker is told by its environment."""

import pytest
from pydantic import ValidationError

from tasks.settings import Settings


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("TRANS_PEFT_STATE", "/tmp/state")
    monkeypatch.delenv("TRANS_PEFT_CACHE_GIB", raising=False)
    return monkeypatch


@pytest.mark.parametrize(("gib", "expected"), [("20", 20 << 30), ("0.5", 1 << 29)])
def test_the_bound_of_the_copies_is_given_in_gib(told, gib, expected):
    told.setenv("TRANS_PEFT_CACHE_GIB", gib)
    assert Settings().cache_bytes == expected


def test_without_a_bound_the_disk_is_the_bound(told):
    assert Settings().cache_bytes is None


@pytest.mark.parametrize("gib", ["0", "-1", "much"])
def test_a_bound_that_is_none_is_refused(told, gib):
    told.setenv("TRANS_PEFT_CACHE_GIB", gib)
    with pytest.raises(ValidationError, match="TRANS_PEFT_CACHE_GIB"):
        Settings()
