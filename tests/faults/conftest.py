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


class Undisturbed:
    """A family that nobody disturbs, upgraded as often as another was."""

    def __init__(self, family):
        self.family = family
        self.ends = {}
        self.took_s = self._upgrade("v2")

    def after(self, number):
        """Return the final state of the upgrade to v2, v3 ... by number, of which each was made."""
        while number not in self.ends:
            self._upgrade(f"v{len(self.ends) + 2}")
        return self.ends[number]

    def _upgrade(self, label):
        took_s = Upgrade(self.family, label).begin().wait()
        self.ends[int(label.removeprefix("v"))] = final_state(self.family)
        return took_s


@pytest.fixture(scope="session")
def undisturbed(stack, tmp_path_factory):
    """What upgrades are that nobody disturbs: how long one takes, and how they end."""
    return Undisturbed(make_family(stack, "undisturbed", tmp_path_factory.mktemp("faults")))


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
