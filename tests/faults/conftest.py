import json
from pathlib import Path

import pytest

from infra.stack.settings import StackSettings
from tests.end_to_end.conftest import stack as fresh
from tests.end_to_end.running_stack import Stack
from tests.faults.upgrade import Upgrade, final_state, make_family, prepared

__all__ = ["fresh"]


def pytest_addoption(parser):
    parser.addoption(
        "--moments", type=int, default=4, help="number of kills of each program (tests/faults)"
    )
    parser.addoption("--running", action="store_true", help="use the stack that `make up` started")
    parser.addoption(
        "--faults-log", help="file to which each fault is appended, one JSON object per line"
    )


@pytest.fixture(scope="session")
def stack(request):
    """A stack with a policy that tiny models can pass, and with a history of its aliases."""
    if request.config.getoption("--running"):
        started = Stack(StackSettings())
    else:
        started = request.getfixturevalue("fresh")
    with prepared(started):
        yield started


class Undisturbed:
    """A family that is upgraded without faults, as often as the disturbed one."""

    def __init__(self, family):
        self.family = family
        self.ends = {}
        self.took_s = self._upgrade("v2")

    def after(self, number):
        """Return the final state after the upgrade to v2, v3, ..., by number."""
        while number not in self.ends:
            self._upgrade(f"v{len(self.ends) + 2}")
        return self.ends[number]

    def _upgrade(self, label):
        took_s = Upgrade(self.family, label).begin().wait()
        self.ends[int(label.removeprefix("v"))] = final_state(self.family)
        return took_s


@pytest.fixture(scope="session")
def undisturbed(stack, tmp_path_factory):
    """The duration and the final states of upgrades without faults."""
    return Undisturbed(make_family(stack, "undisturbed", tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="session")
def moments(request):
    """Number of kills of each program."""
    return request.config.getoption("--moments")


@pytest.fixture(scope="session")
def record_fault(request):
    """Return a function that appends a JSON line to the file of `--faults-log`, if one is set."""
    path = request.config.getoption("--faults-log")

    def record(**facts):
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps(facts) + "\n")

    return record
