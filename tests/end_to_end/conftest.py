import os
import subprocess
import sys

import pytest

from tests.end_to_end.running_stack import ROOT, Stack, settings_below


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """One stack for all tests, which use different families and adapters."""
    settings = settings_below(tmp_path_factory.mktemp("story") / "state")

    def make(verb):
        environment = {**os.environ, **settings.to_environment()}
        command = [sys.executable, "-m", "infra.stack", verb]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True)

    make("up")
    try:
        yield Stack(settings)
    finally:
        make("down")
