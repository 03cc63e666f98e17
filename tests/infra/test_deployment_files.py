"""Files of deployments that tests cannot start: placeholders have values, and files exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from infra.stack.job_template import PROCESS_JOB_TEMPLATE
from infra.stack.programs import PROGRAMS
from infra.stack.settings import StackSettings

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = yaml.safe_load((INFRA / "containers" / "compose.yaml").read_text())
TEMPLATE = json.loads((INFRA / "kubernetes" / "base" / "base-job-template.json").read_text())
DOCKERFILE = (INFRA / "containers" / "Dockerfile").read_text()


def test_every_variable_of_compose_is_in_the_example():
    example = (INFRA / "containers" / "env.example").read_text()
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "containers" / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_compose_names_existing_stages_and_services():
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))
    for service in COMPOSE["services"].values():
        assert service.get("build", {}).get("target", "worker") in stages
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])


def test_no_image_comes_from_a_tag():
    """A name that is not built here ends with a digest, and a digest has no default."""
    digest = r"@sha256:\$\{(\w+)(:\?[^}]*)?\}"
    from_outside = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))
    images = [name for name in from_outside if name not in stages]
    services = COMPOSE["services"].values()
    built = {service["image"] for service in services if "build" in service}
    images += [s["image"] for s in services if s["image"] not in built]
    assert len(images) == 2
    for image in images:
        assert re.search(rf"{digest}$", image), image
    example = (INFRA / "containers" / "env.example").read_text()
    assert re.search(r"^ARG PYTHON_SHA256$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^(\w+_SHA256)=(.*)$", example, re.MULTILINE) == [
        ("PYTHON_SHA256", ""),
        ("POSTGRES_SHA256", ""),
    ]
    for service in services:
        if "build" in service:
            assert service["build"]["args"]["PYTHON_SHA256"].startswith("${PYTHON_SHA256:?")


@pytest.mark.parametrize("tool", ["skopeo", "docker"])
@pytest.mark.parametrize("answer", ["sha256:" + "a1" * 32, "", "latest", "sha256:xyz", "sha256:ab"])
def test_pin_writes_digests_and_nothing_else(tool, answer, tmp_path):
    for name in ("pin.sh", "env.example"):
        shutil.copy(INFRA / "containers" / name, tmp_path / name)
    before = "POSTGRES_PASSWORD=word\nPYTHON_SHA256=old\nPOSTGRES_SHA256=\n"
    (tmp_path / ".env").write_text(before)
    programs = tmp_path / "bin"
    programs.mkdir()
    for needed in ("sh", "dirname", "grep", "chmod", "mv"):
        (programs / needed).symlink_to(shutil.which(needed))
    (programs / tool).write_text(f"#!/bin/sh\necho '{answer}'\n")
    (programs / tool).chmod(0o755)
    pinned = subprocess.run(
        [tmp_path / "pin.sh"], env={"PATH": str(programs)}, capture_output=True, check=False
    )
    written = (tmp_path / ".env").read_text().splitlines()
    if answer.endswith("a1"):
        digest = answer.removeprefix("sha256:")
        assert pinned.returncode == 0, pinned.stderr
        assert written == [
            "POSTGRES_PASSWORD=word", f"PYTHON_SHA256={digest}", f"POSTGRES_SHA256={digest}"
        ]  # fmt: skip
        assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    else:
        assert pinned.returncode != 0
        assert written == before.splitlines()


@pytest.mark.parametrize("service", ["mlflow", "prefect", "postgres", "bridge", "ui"])
def test_no_server_of_compose_is_open_to_the_network(service):
    for port in COMPOSE["services"][service].get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_prefect_of_compose_requires_a_password_and_refuses_other_pages():
    server = COMPOSE["services"]["prefect"]["environment"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == "${PREFECT_AUTH:?}"
    assert "*" not in server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    clients = {"deploy", "bridge", "webhooks", "worker"}
    authenticated = {
        name
        for name, service in COMPOSE["services"].items()
        if service.get("environment", {}).get("PREFECT_API_AUTH_STRING") == "${PREFECT_AUTH:?}"
    }
    assert authenticated == clients


@pytest.mark.parametrize(
    "template", [TEMPLATE, PROCESS_JOB_TEMPLATE], ids=["kubernetes", "process"]
)
def test_no_job_template_has_variables_for_command_or_rights(template):
    chosen = template["variables"]["properties"]
    assert template["variables"]["additionalProperties"] is False
    assert not chosen.keys() & {
        "command", "env", "working_dir", "image", "namespace", "service_account_name", "secret",
        "annotations", "image_pull_policy", "job_manifest",
    }  # fmt: skip
    placeholders = re.findall(r"\{\{ (\w+)", json.dumps(template["job_configuration"]))
    assert {*placeholders} <= chosen.keys()


def test_the_image_contains_what_the_worker_imports():
    copied = set(re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    assert {"trans_peft", "tasks", "flows", "infra", "prefect.yaml", "locks"} <= names
    ignored = (INFRA / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in names} <= set(ignored)


def test_no_image_contains_the_passwords_of_a_deployment():
    """The last line that matches counts, and `!infra` comes first."""
    ignored = (INFRA / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    after = ignored[ignored.index("!infra") :]
    assert {"infra/containers/.env*", "infra/kubernetes/secrets"} <= set(after)
    in_git = (INFRA.parent / ".gitignore").read_text().splitlines()
    assert "infra/kubernetes/secrets/" in in_git


def test_a_worker_in_a_container_has_the_variables_of_a_local_worker(tmp_path):
    here = set(PROGRAMS["worker"].environment(StackSettings(state=tmp_path)))
    image = set(re.findall(r"(TRANS_PEFT_\w+)=", DOCKERFILE))
    there = set(COMPOSE["services"]["worker"]["environment"]) | image
    assert {name for name in here if name.startswith("TRANS_PEFT_")} <= there
    assert {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"} <= there


def test_every_placeholder_of_the_kubernetes_template_is_a_variable_and_every_variable_is_used():
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == set(TEMPLATE["variables"]["properties"])


def test_a_pod_has_a_gpu_only_if_its_deployment_requests_one():
    assert TEMPLATE["variables"]["properties"]["gpus"]["default"] == 0
    prefect = yaml.safe_load((INFRA.parent / "prefect.yaml").read_text())
    for deployment in prefect["deployments"]:
        pool = deployment["work_pool"]
        gpus = pool.get("job_variables", {}).get("gpus", 0)
        assert gpus == (pool["work_queue_name"] == "gpu")
