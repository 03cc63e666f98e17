"""Settings that a worker reads from its environment."""

from pathlib import Path

import pytest

from tasks.composition import platform
from tasks.settings import Settings, settings
from trans_peft.domain.places import Places
from trans_peft.errors import InvalidSpecError


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("TRANS_PEFT_STATE", "/tmp/state")
    monkeypatch.delenv("TRANS_PEFT_CACHE_GIB", raising=False)
    return monkeypatch


def test_a_variable_with_the_name_of_a_field_is_ignored(environment):
    """METRICS_PORT belongs to `make up`, and GPUS may be set for another program."""
    expected = Settings()
    assert expected.state_dir == Path("/tmp/state")
    for name, field in Settings.model_fields.items():
        if field.validation_alias != name.upper():
            environment.setenv(name, "7")
            environment.setenv(name.upper(), "7")
    assert Settings() == expected


@pytest.mark.parametrize(("gib", "expected"), [("20", 20 << 30), ("0.5", 1 << 29)])
def test_the_bound_of_the_copies_is_given_in_gib(environment, gib, expected):
    environment.setenv("TRANS_PEFT_CACHE_GIB", gib)
    assert Settings().cache_bytes == expected


def test_without_a_bound_the_disk_is_the_bound(environment):
    assert Settings().cache_bytes is None


@pytest.mark.parametrize("gib", ["0", "-1", "much"])
def test_a_bound_that_is_none_is_refused(environment, gib):
    environment.setenv("TRANS_PEFT_CACHE_GIB", gib)
    with pytest.raises(InvalidSpecError, match="TRANS_PEFT_CACHE_GIB"):
        Settings()


def test_a_worker_reads_no_local_folder_and_lacks_no_guard_unless_it_is_set(environment):
    for name in ("TRANS_PEFT_READABLE", "TRANS_PEFT_SANDBOX_MAY_LACK", "TRANS_PEFT_BASES_URI"):
        environment.delenv(name, raising=False)
    assert Settings().places == Places((), ())
    assert Settings().may_lack == ()
    environment.setenv("TRANS_PEFT_READABLE", "/data, hub:openai/*")
    environment.setenv("TRANS_PEFT_BASES_URI", "/bases")
    environment.setenv("TRANS_PEFT_SANDBOX_MAY_LACK", "user, files")
    assert Settings().places == Places((Path("/bases"), Path("/data")), ("openai/*",))
    assert Settings().may_lack == ("user", "files")


def test_a_worker_s_platform_has_the_limits_of_its_settings(environment, tmp_path):
    environment.setenv("TRANS_PEFT_STATE", str(tmp_path))
    environment.setenv("TRANS_PEFT_READABLE", "")
    environment.setenv("TRANS_PEFT_SANDBOX_MAY_LACK", "network")
    for cached in (settings, platform):
        cached.cache_clear()
    try:
        assert platform().store.places == Places((), ())
        assert platform().may_lack == {"network"}
    finally:
        for cached in (settings, platform):
            cached.cache_clear()
