import json
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import pytest

from infra.stack.machine import free_ports
from infra.stack.supervisor import Supervisor
from tasks.settings import METRICS_FOLDER
from tests.end_to_end.running_stack import running, settings_below, wait_until
from tests.faults.disturb import worker
from tests.faults.upgrade import PATIENCE_S, make_family, prepared
from tests.hosts.network import host, missing
from tests.hosts.postgres import postgres
from trans_peft.domain.conventions import WORK_POOL

SLOTS = 3
"""One GPU on each of three hosts."""

SHARDS = 6
"""Shards of an upgrade, divisible by one, two and three hosts."""

UPGRADES = (1, 2, 3, "disturbed")
"""One family for each run: with one, two and three hosts, and with three hosts and faults.

In the run with faults, one host is killed and one is disconnected.
"""

_numbers = count()


def pytest_addoption(parser):
    parser.addoption("--adapters", type=int, default=64, help="adapters of a fleet (tests/hosts)")
    parser.addoption(
        "--delay-ms", type=int, default=50, help="delay of each direction between hosts and servers"
    )
    parser.addoption(
        "--hosts-log", help="file to which each upgrade is appended, one JSON object per line"
    )


@pytest.fixture(scope="session")
def adapters(request):
    """Number of adapters of each fleet."""
    return request.config.getoption("--adapters")


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """A stack on Postgres, with a GPU slot for each host."""
    if lacks := missing():
        pytest.skip(f"several hosts on one machine need {', '.join(lacks)}")
    (port,) = free_ports(1)
    with postgres(port) as databases:
        settings = settings_below(tmp_path_factory.mktemp("hosts") / "state").model_copy(
            update={"gpu_slots": SLOTS, **databases}
        )
        with running(settings) as started, prepared(started):
            yield started


@pytest.fixture(scope="session")
def families(stack, adapters, tmp_path_factory):
    """A family for each of UPGRADES, made with the stack's own worker, which then stops."""
    folder = tmp_path_factory.mktemp("families")
    made = {one: make_family(stack, f"by-{one}", folder, adapters) for one in UPGRADES}
    manager = Supervisor(stack.settings)
    manager.stop_program("worker")
    wait_until(lambda: not manager.pid("worker"))
    stack.set_parameters_of_reconcile(shard_size=-(-adapters // SHARDS))
    return made


@pytest.fixture(scope="session")
def hosts(request, stack, families, tmp_path_factory):
    """Return a context with this many hosts, whose workers are online. They share URLs alone.

    Each host has a worker for the queue `control`, and one for the queue `gpu` with a limit of one.
    """
    ports = [stack.settings.ports[name] for name in ("S3_PORT", "MLFLOW_PORT", "PREFECT_PORT")]
    delay_s = request.config.getoption("--delay-ms") / 1000

    @contextmanager
    def begin(number):
        with ExitStack() as context:
            made, names = [], set()
            for place in (next(_numbers) for _ in range(number)):
                one = context.enter_context(host(f"host-{place}", place, ports, delay_s))
                folder = tmp_path_factory.mktemp(one.name)
                for name in ("tmp", "metrics"):
                    (folder / name).mkdir()
                own = {
                    "PREFECT_HOME": str(folder / "prefect"),
                    "PREFECT_PROFILES_PATH": str(folder / "prefect" / "profiles.toml"),
                    METRICS_FOLDER: str(folder / "metrics"),
                    "TMPDIR": str(folder / "tmp"),
                }
                for queue, limit in (("control", ()), ("gpu", ("--limit", "1"))):
                    name = f"{one.name}-{queue}"
                    options = ("--work-queue", queue, *limit)
                    context.enter_context(
                        worker(stack, name, folder, command=one.command, options=options, **own)
                    )
                    names.add(name)
                made.append(one)
            wait_until(lambda: names <= online(stack), PATIENCE_S)
            yield made

    return begin


def online(stack):
    """Return the names of the workers that Prefect has heard from."""
    found = stack.prefect("POST", f"work_pools/{WORK_POOL}/workers/filter", json={})
    return {one["name"] for one in found if one["status"] == "ONLINE"}


@pytest.fixture(scope="session")
def record(request, adapters):
    """Return a function that appends a JSON line to the file of `--hosts-log`, if one is set."""
    path = request.config.getoption("--hosts-log")

    def append(**facts):
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps({"adapters": adapters, **facts}) + "\n")

    return append
