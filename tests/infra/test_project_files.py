"""The files in the root folder agree with the code and with each other."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.locks import LEFT_OUT, SETS, pins
from infra.stack.prefect_objects import QUEUES
from trans_peft.domain.conventions import WORK_POOL

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
def test_a_deployment_names_an_existing_flow_pool_and_queue(deployment):
    path, function = deployment["entrypoint"].split(":")
    flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), function)
    assert flow.name == function.replace("_", "-")
    assert deployment["name"] == "default"
    assert deployment["work_pool"]["name"] == WORK_POOL
    assert deployment["work_pool"]["work_queue_name"] in QUEUES


def test_reconcile_does_not_wait_in_the_queue_of_its_shards():
    queues = {d["entrypoint"].split(":")[1]: d["work_pool"]["work_queue_name"] for d in DEPLOYMENTS}
    assert queues["reconcile"] == "control"
    assert queues["transfer_shard"] == queues["train_adapter"] == "gpu"
    assert QUEUES["control"].limited is False
    assert QUEUES["control"].priority < QUEUES["gpu"].priority


def test_no_deployment_contains_a_path_of_one_machine():
    assert str(Path.home()) not in (ROOT / "prefect.yaml").read_text()
    assert "{{ $TRANS_PEFT_CHECKOUT }}" in (ROOT / "prefect.yaml").read_text()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_every_dependency_is_locked_within_its_range(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("name", SETS)
def test_a_lock_has_the_versions_of_the_constraints_and_a_hash_for_each(name):
    text = (ROOT / "locks" / f"{name}.txt").read_text()
    blocks = re.split(r"\n(?=\S)", text.partition("\n")[2].strip())
    locked = pins(text)
    assert len(blocks) == len(locked) > 0
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    assert not [package for package in locked if LEFT_OUT.fullmatch(package)]
    other = {p: v for p, v in locked.items() if PINS.get(p, v) != v}
    assert not other, f"make lock KEEP=--keep: {other}"


def test_setup_locks_all_dependencies_except_torch():
    locked = pins((ROOT / "locks" / "setup.txt").read_text())
    extras = {"platform", "stack", "demo", "dev"}
    needed, seen = {("trans-peft", extra) for extra in extras} | {("trans-peft", "")}, set()
    while needed - seen:
        package, extra = (needed - seen).pop()
        seen.add((package, extra))
        for line in distribution(package).requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                name = canonicalize_name(wanted.name)
                needed |= {(name, part) for part in {"", *wanted.extras}}
    names = {package for package, _ in seen} - {"trans-peft"}
    missing = {name for name in names - locked.keys() if not LEFT_OUT.fullmatch(name)}
    assert not missing, f"make lock KEEP=--keep: {missing}"
    # Before Python 3.11.3 there is async-timeout as well.
    assert locked.keys() - {"setuptools", "async-timeout"} <= PINS.keys()


@pytest.mark.parametrize("path", ["Makefile", ".ci/run", "infra/containers/Dockerfile"])
def test_only_the_project_and_torch_are_installed_without_hashes(path):
    """The exceptions are this project and torch."""
    text = (ROOT / path).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if "pip install" in line and not line.startswith("#"):
            for command in line.split("&&"):
                hashed = "--require-hashes" in command and "--no-deps" in command
                own = "--no-build-isolation" in command and "--constraint" in command
                assert hashed or own, command


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_the_target_and_describes_it(target):
    dry = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert dry.returncode == 0, dry.stderr
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target} " in shown


@pytest.mark.parametrize("part", ["errors.py", "ports.py", "domain"])
def test_domain_ports_and_errors_import_the_standard_library_only(part):
    path = ROOT / "trans_peft" / part
    for file in [path] if path.is_file() else path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top == "trans_peft" or top in sys.stdlib_module_names, f"{file}: {name}"
