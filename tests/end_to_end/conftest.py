import pytest

from tests.end_to_end.running_stack import running, settings_below


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """One stack for all tests, which use different families and adapters."""
    with running(settings_below(tmp_path_factory.mktemp("story") / "state")) as started:
        yield started
