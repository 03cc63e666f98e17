"""The record of the last look at a family, in a Prefect server in this process."""

from datetime import UTC, datetime, timedelta

import pytest
from prefect.testing.utilities import prefect_test_harness
from prefect.variables import Variable

from tasks.looks import is_unchanged, record_look

pytestmark = [pytest.mark.servers, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def server():
    with prefect_test_harness(server_startup_timeout=240):
        yield


def test_a_family_is_unchanged_at_the_recorded_revision_for_some_minutes():
    family, r1, r2 = "My.Base", "1" * 64, "2" * 64
    assert not is_unchanged.fn(family, r1, 60)
    record_look.fn(family, r1)
    record_look.fn("my-base", r2)  # the names of both variables differ
    assert is_unchanged.fn(family, r1, 60)
    assert not is_unchanged.fn(family, r2, 60)
    record_look.fn(family, r2)
    assert is_unchanged.fn(family, r2, 60)
    assert not is_unchanged.fn(family, r1, 60)


@pytest.mark.parametrize(("age", "unchanged"), [(59, True), (61, False), (-5, False)])
def test_a_look_that_is_too_old_or_in_the_future_does_not_count(age, unchanged):
    record_look.fn("small", "3" * 64)
    at = (datetime.now(UTC) - timedelta(minutes=age)).isoformat()
    Variable.set("trans-peft-look-small", {"revision": "3" * 64, "at": at}, overwrite=True)
    assert is_unchanged.fn("small", "3" * 64, 60) is unchanged


@pytest.mark.parametrize(
    "value",
    [
        "yes",
        {"revision": "3" * 64},
        {"revision": "3" * 64, "at": "yesterday"},
        {"revision": "3" * 64, "at": "2026-11-30T12:00:00"},
    ],
)
def test_a_variable_that_someone_else_wrote_does_not_count(value):
    Variable.set("trans-peft-look-small", value, overwrite=True)
    assert not is_unchanged.fn("small", "3" * 64, 60)
