"""The files in the root folder agree with the code and with each other."""

import ast
import re
import shutil
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

from infra.locks import LEFT_OUT, PYTHONS, SETS, merged, pins
from infra.stack.prefect_objects import QUEUES
from trans_peft.cli.unique_keys import parse_yaml
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
    assert QUEUES["control"].is_limited is False
    assert QUEUES["control"].priority < QUEUES["gpu"].priority


def test_no_deployment_contains_a_path_of_one_machine():
    assert str(Path.home()) not in (ROOT / "prefect.yaml").read_text()
    assert "{{ $TRANS_PEFT_CHECKOUT }}" in (ROOT / "prefect.yaml").read_text()


def test_no_yaml_file_repeats_a_key():
    files = [ROOT / "prefect.yaml", *(ROOT / "examples").rglob("*.yaml")]
    files += (ROOT / "infra").rglob("*.yaml")
    assert len(files) > 30
    for path in files:
        for document in re.split(r"^---$", path.read_text(), flags=re.MULTILINE):
            parse_yaml(document)


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
    # Before Python 3.11.3, async-timeout is needed as well.
    assert locked.keys() - {"setuptools", "async-timeout"} <= PINS.keys()


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the Makefile and the files that `make setup` depends on."""
    (tmp_path / "locks").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", *(f"locks/{name}.txt" for name in SETS)):
        (tmp_path / name).touch()
    return tmp_path


def dry_run(checkout, target, programs):
    """Return the commands of a target on a machine with these programs only."""
    folder = checkout / "bin"
    folder.mkdir()
    for name in ("make", "sh", "test"):
        (folder / name).symlink_to(shutil.which(name))
    for name, exit_code in programs.items():
        (folder / name).write_text(f"#!/bin/sh\nexit {exit_code}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["make", "--dry-run", target],
        cwd=checkout,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", " ")


@pytest.mark.parametrize(
    ("programs", "chosen"),
    [
        ({"python3.11": 0, "python3.12": 0, "python3.13": 0}, "python3.13"),
        ({"python3.11": 0, "python3.12": 0, "python3.13": 127}, "python3.12"),
        ({"python3.11": 0, "python3.12": 127, "python3.13": 127}, "python3.11"),
    ],
)
def test_setup_takes_the_newest_python_that_runs(checkout, programs, chosen):
    """A shim of pyenv exists without its version, and fails with 127."""
    assert f"|| {chosen} -m venv .venv" in dry_run(checkout, "setup", programs)


@pytest.mark.parametrize("target", ["setup", "demo"])
def test_make_installs_locks_with_uv_and_with_pip_where_uv_fails(checkout, target):
    commands = dry_run(checkout, target, {"python3.12": 0})
    assert ".venv/bin/python || python3.12 -m venv .venv" in commands
    check_installs(commands)
    installed = [
        (program, lock)
        for line in commands.splitlines()
        for command in line.split("||")
        for program, lock in re.findall(r"(uv|-m) pip install .*--requirement (\S+)", command)
    ]
    locks = ["setup", *(["model"] if target == "demo" else [])]
    both = [(program, f"locks/{lock}.txt") for lock in locks for program in ("uv", "-m")]
    assert installed == [("-m", "locks/uv.txt"), *both]


def test_setup_without_a_python_says_what_to_install(checkout):
    commands = dry_run(checkout, "setup", {})
    assert "No Python 3.11, 3.12 or 3.13 found" in commands


def test_the_locks_are_for_the_python_versions_of_the_project():
    classifiers = {f"Programming Language :: Python :: {python}" for python in PYTHONS}
    assert classifiers <= set(PROJECT["classifiers"])
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    text = (ROOT / "locks" / "setup.txt").read_text()
    assert 'whenever==0.10.5 ; python_version == "3.13"' in text  # Prefect: instead of pendulum


def test_a_package_that_some_pythons_need_has_a_marker():
    blocks = {
        "3.11": {
            "a==1": "a==1 \\\n    --hash=sha256:1\n",
            "b==2": "b==2 \\\n    --hash=sha256:2\n",
        },
        "3.13": {"a==1": "a==1 \\\n    --hash=sha256:1\n"},
    }
    assert "".join(merged(blocks)) == (
        'a==1 \\\n    --hash=sha256:1\nb==2 ; python_version == "3.11" \\\n    --hash=sha256:2\n'
    )


@pytest.mark.parametrize("path", [".ci/run", "infra/containers/Dockerfile"])
def test_only_the_project_and_torch_are_installed_without_hashes(path):
    check_installs((ROOT / path).read_text().replace("\\\n", " "))


def check_installs(text):
    """Assert that each installation is by hash, or of this project and torch."""
    for line in text.splitlines():
        if "pip install" in line and not line.startswith("#"):
            for command in re.split(r"&&|\|\|", line):
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
