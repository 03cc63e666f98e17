"""The files at the root say the same things as the code."""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.stack.prefect_objects import QUEUES
from infra.stack.settings import WORK_POOL

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
    if not line.startswith("trans-peft[")  # an extra that bundles other extras
]
PINS = {
    canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for pin in [Requirement(line)]
}
TARGETS = ["setup", "demo", "demo-full", "up", "status", "login", "logs", "down", "clean-state"]
TARGETS += ["test", "check", "format", "lock"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d["entrypoint"])
def test_a_deployment_runs_a_flow_that_exists_where_somebody_works(deployment):
    path, function = deployment["entrypoint"].split(":")
    flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), function)
    assert flow.name == function.replace("_", "-")
    assert deployment["name"] == "default"
    assert deployment["work_pool"]["name"] == WORK_POOL
    assert deployment["work_pool"]["work_queue_name"] in QUEUES


def test_whoever_waits_for_gpu_work_holds_no_place_in_its_queue():
    queues = {d["entrypoint"].split(":")[1]: d["work_pool"]["work_queue_name"] for d in DEPLOYMENTS}
    assert queues["reconcile"] == "control"
    assert queues["transfer_shard"] == queues["train_adapter"] == "gpu"
    assert QUEUES["control"].limited is False
    assert QUEUES["control"].priority < QUEUES["gpu"].priority


def test_no_path_of_one_machine_is_deployed():
    assert str(Path.home()) not in (ROOT / "prefect.yaml").read_text()
    assert "{{ $TRANS_PEFT_CHECKOUT }}" in (ROOT / "prefect.yaml").read_text()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_every_dependency_is_locked_within_its_range(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target_and_teaches_it(target):
    dry = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert dry.returncode == 0, dry.stderr
    taught = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target} " in taught


@pytest.mark.parametrize("part", ["errors.py", "ports.py", "domain"])
def test_nouns_ports_and_errors_stand_on_the_standard_library(part):
    path = ROOT / "trans_peft" / part
    for file in [path] if path.is_file() else path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top == "trans_peft" or top in sys.stdlib_module_names, f"{file}: {name}"
