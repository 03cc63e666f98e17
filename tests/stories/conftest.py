import os
import subprocess
import sys

import pytest

from infra.stack.machine import free_ports
from infra.stack.settings import StackSettings
from tests.stories.place import ROOT, Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """One stack for all stories: each has families and adapters of its own."""
    s3, mlflow, prefect, bridge = free_ports(4)
    settings = StackSettings(
        tmp_path_factory.mktemp("story") / "state",
        s3_port=s3,
        mlflow_port=mlflow,
        prefect_port=prefect,
        bridge_port=bridge,
    )

    def make(verb):
        environment = {**os.environ, **settings.to_environment()}
        command = [sys.executable, "-m", "infra.stack", verb]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True)

    make("up")
    try:
        yield Stack(settings)
    finally:
        make("down")
