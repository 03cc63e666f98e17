"""What is not started in tests is at least whole: placeholders have values, files are there."""

import json
import re
from pathlib import Path

import pytest
import yaml

from infra.stack.job_template import PROCESS_JOB_TEMPLATE
from infra.stack.programs import PROGRAMS
from infra.stack.settings import StackSettings

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = yaml.safe_load((INFRA / "containers" / "compose.yaml").read_text())
TEMPLATE = json.loads((INFRA / "kubernetes" / "base-job-template.json").read_text())
DOCKERFILE = (INFRA / "containers" / "Dockerfile").read_text()


def test_every_variable_of_compose_is_in_the_example():
    example = (INFRA / "containers" / "env.example").read_text()
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "containers" / "compose.yaml").read_text()))
    assert used == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_compose_builds_stages_that_exist_and_waits_for_services_that_exist():
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))
    for service in COMPOSE["services"].values():
        assert service.get("build", {}).get("target", "worker") in stages
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])


@pytest.mark.parametrize("service", ["mlflow", "prefect", "postgres", "bridge"])
def test_no_server_of_compose_is_open_to_the_network(service):
    for port in COMPOSE["services"][service].get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_prefect_of_compose_asks_for_a_password_and_answers_no_other_page():
    server = COMPOSE["services"]["prefect"]["environment"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == "${PREFECT_AUTH:?}"
    assert "*" not in server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    clients = {"deploy", "bridge", "webhooks", "worker"}
    told = {
        name
        for name, service in COMPOSE["services"].items()
        if service.get("environment", {}).get("PREFECT_API_AUTH_STRING") == "${PREFECT_AUTH:?}"
    }
    assert told == clients


@pytest.mark.parametrize(
    "template", [TEMPLATE, PROCESS_JOB_TEMPLATE], ids=["kubernetes", "process"]
)
def test_no_template_lets_a_run_choose_what_is_executed_with_which_rights(template):
    chosen = template["variables"]["properties"]
    assert template["variables"]["additionalProperties"] is False
    assert not chosen.keys() & {
        "command", "env", "working_dir", "image", "namespace", "service_account_name", "secret",
        "annotations", "image_pull_policy", "job_manifest",
    }  # fmt: skip
    placeholders = re.findall(r"\{\{ (\w+)", json.dumps(template["job_configuration"]))
    assert {*placeholders} <= chosen.keys()


def test_the_image_carries_what_the_worker_imports():
    copied = set(re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    assert {"trans_peft", "tasks", "flows", "infra", "prefect.yaml"} <= names
    ignored = (INFRA / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in names} <= set(ignored)


def test_a_worker_in_a_container_is_told_what_a_worker_here_is_told(tmp_path):
    here = set(PROGRAMS["worker"].environment(StackSettings(tmp_path)))
    image = set(re.findall(r"(TRANS_PEFT_\w+)=", DOCKERFILE))
    there = set(COMPOSE["services"]["worker"]["environment"]) | image
    assert {name for name in here if name.startswith("TRANS_PEFT_")} <= there
    assert {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"} <= there


def test_every_placeholder_of_the_kubernetes_template_is_a_variable_and_every_variable_is_used():
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == set(TEMPLATE["variables"]["properties"])


def test_a_pod_has_no_gpu_unless_a_deployment_asks_for_it():
    assert TEMPLATE["variables"]["properties"]["gpus"]["default"] == 0
    prefect = yaml.safe_load((INFRA.parent / "prefect.yaml").read_text())
    for deployment in prefect["deployments"]:
        pool = deployment["work_pool"]
        gpus = pool.get("job_variables", {}).get("gpus", 0)
        assert gpus == (pool["work_queue_name"] == "gpu")
