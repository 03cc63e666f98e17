import json
import os
from pathlib import Path

import pytest

from infra.stack.settings import StackSettings
from tests.faults.upgrade import Upgrade, final_state, insist, keep_history, make_family
from tests.stories.conftest import stack as fresh
from tests.stories.place import LENIENT, Stack

__all__ = ["fresh"]


def pytest_addoption(parser):
    parser.addoption(
        "--moments", type=int, default=4, help="how often each victim is killed (tests/faults)"
    )
    parser.addoption(
        "--running", action="store_true", help="on the stack that `make up` started, here and now"
    )
    parser.addoption(
        "--faults-log", help="a file to which each fault is added, a JSON object a line"
    )


@pytest.fixture(scope="session")
def stack(request):
    """A whole stack, as strict as tiny models bear, with a history of its aliases."""
    if request.config.getoption("--running"):
        started = Stack(StackSettings.from_environment(os.environ))
    else:
        started = request.getfixturevalue("fresh")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in started.settings.client_environment.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # `insist` asks again
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        patch.setenv("NO_PROXY", os.environ.get("NO_PROXY", "") + ",127.0.0.1")
        insist(lambda: started.decide_by(policy=LENIENT))
        keep_history(started)
        yield started


@pytest.fixture(scope="session")
def undisturbed(stack, tmp_path_factory):
    """Return how many seconds an upgrade takes that nobody disturbs, and how it ends."""
    family = make_family(stack, "undisturbed", tmp_path_factory.mktemp("faults"))
    took_s = Upgrade(family).begin().wait()
    return took_s, final_state(family)


@pytest.fixture(scope="session")
def moments(request):
    """How often each victim is killed."""
    return request.config.getoption("--moments")


@pytest.fixture(scope="session")
def told(request):
    """Return a function that adds a JSON line to the file of `--faults-log`, if there is one."""
    path = request.config.getoption("--faults-log")

    def tell(**facts):
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps(facts) + "\n")

    return tell
