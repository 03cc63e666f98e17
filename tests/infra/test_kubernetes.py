"""Kubernetes manifests as Kustomize renders them. No cluster is needed."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import yaml

from infra.kubernetes.make_secrets import generated, main
from infra.stack.prefect_objects import PoolSettings
from tests.infra.rendered import (
    COMPONENTS,
    HAS_KUBECTL,
    KUBERNETES,
    containers,
    environment,
    job_template,
    of_kind,
    pods,
    rendered,
    replicas,
)
from trans_peft.errors import InvalidSpecError

COMPOSE = yaml.safe_load((KUBERNETES.parent / "containers" / "compose.yaml").read_text())
CHOICES = [(), *((name,) for name in COMPONENTS), COMPONENTS]

needs_kubectl = pytest.mark.skipif(not HAS_KUBECTL, reason="kubectl is not installed")
for_each_choice = pytest.mark.parametrize("components", CHOICES, ids="+".join)


def settings_of(pod):
    """Security settings of each container: those of its pod, then its own."""
    outer = pod["spec"]["securityContext"]
    for container in containers(pod):
        yield container["name"], {**outer, **container["securityContext"]}


@needs_kubectl
@for_each_choice
def test_every_container_is_restricted(components):
    for name, pod in pods(rendered(*components)).items():
        assert pod["spec"]["enableServiceLinks"] is False, name
        assert pod["spec"].get("automountServiceAccountToken", True) is (name == "worker")
        for container, found in settings_of(pod):
            assert found["runAsNonRoot"] is True, (name, container)
            assert found["runAsUser"] >= 999
            assert found["seccompProfile"] == {"type": "RuntimeDefault"}
            assert found["allowPrivilegeEscalation"] is False
            assert found["readOnlyRootFilesystem"] is True
            assert found["capabilities"] == {"drop": ["ALL"]}


def test_every_container_of_the_files_is_restricted():
    """The same without Kustomize: no file has a container without these fields."""
    found = 0
    for path in KUBERNETES.glob("**/*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            if document.get("kind") in ("Deployment", "StatefulSet", "Job"):
                if path.parent.name == "high-availability" and path.name == "prefect.yaml":
                    continue  # a patch of base/prefect.yaml
                for _, fields in settings_of(document["spec"]["template"]):
                    found += 1
                    assert fields["runAsNonRoot"] is True, path
                    assert fields["capabilities"] == {"drop": ["ALL"]}
    assert found == 11


@needs_kubectl
@for_each_choice
def test_every_reference_names_an_object_that_exists(components):
    documents = rendered(*components)
    keys = {
        (one["kind"], one["metadata"]["name"]): {*one.get("data", {}), *one.get("stringData", {})}
        for one in documents
    }
    assert len(keys) == len(documents)
    templates = {
        claim["metadata"]["name"]
        for one in of_kind(documents, "StatefulSet").values()
        for claim in one["spec"]["volumeClaimTemplates"]
    }
    for pod in pods(documents).values():
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in keys
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in keys
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in keys
        for container in containers(pod):
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= volumes.keys() | templates
            for variable in environment(container).values():
                for kind, source in variable.get("valueFrom", {}).items():
                    if kind != "fieldRef":
                        target = {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}[kind]
                        assert source["key"] in keys[target, source["name"]], variable
            for source in container.get("envFrom", []):
                assert source["secretRef"]["optional"] is True
            used = set(re.findall(r"\$\((\w+)\)", json.dumps(container)))
            assert used <= environment(container).keys()


@needs_kubectl
@for_each_choice
def test_every_port_of_a_service_and_every_probe_names_a_port_of_its_pod(components):
    documents = rendered(*components)
    templates = pods(documents)
    for name, service in of_kind(documents, "Service").items():
        pod = templates[service["spec"]["selector"]["trans-peft/program"]]
        ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name
    for name, pod in templates.items():
        container = pod["spec"]["containers"][0]
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name in ("flow-run", "webhooks", "prefect-services"):
                assert probe not in container
                continue
            found = container[probe]
            request = found.get("httpGet") or found.get("tcpSocket")
            assert "exec" in found or request["port"] in ports


KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}  # there is workload identity instead
ADDED = {
    "postgres": {"PGDATA", "MLFLOW_PASSWORD", "PREFECT_PASSWORD"},
    "mlflow": {"ARTIFACTS_URI", "MLFLOW_HOST"},  # for its command
    "prefect": {
        "PREFECT_PAGE_URL",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY",
    },  # a root that is read-only
    "bridge": set(),
    "webhooks": set(),
    "ui": set(),
}


@needs_kubectl
@pytest.mark.parametrize("program", ADDED)
def test_a_program_has_the_variables_that_compose_gives_it(program):
    pod = pods(rendered())[program]
    there = {*COMPOSE["services"][program]["environment"]} - KEYS
    assert environment(pod["spec"]["containers"][0]).keys() == there | ADDED[program]


@needs_kubectl
def test_worker_and_flow_run_together_have_the_variables_of_the_worker_of_compose():
    templates = pods(rendered())
    deploy, worker = containers(templates["worker"])
    (flow_run,) = containers(templates["flow-run"])
    here = environment(worker).keys() | environment(flow_run).keys()
    there = {*COMPOSE["services"]["worker"]["environment"]} - KEYS - {"PROMETHEUS_MULTIPROC_DIR"}
    assert there <= here
    assert here - there <= {
        "POD_NAME", "TRANS_PEFT_METRICS_PORT", "TRANS_PEFT_METRICS_HOST",
        "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
        "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
        "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",
    }  # fmt: skip
    assert environment(deploy).keys() == {
        "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "GPU_SLOTS", "KUBERNETES_JOB_TEMPLATE",
        "WORKER_IMAGE",
    }  # fmt: skip
    assert deploy["command"][2] == COMPOSE["services"]["deploy"]["command"].split('"')[1].strip()


SECRETS = {
    "postgres": {"postgres"},
    "mlflow": {"mlflow"},
    "prefect": {"prefect"},
    "bridge": {"bridge"},
    "webhooks": {"bridge"},
    "ui": set(),
    "worker": {"worker"},
    "flow-run": {"flow-run"},
    "redis": {"redis"},
    "prefect-services": {"prefect", "redis"},
}


@needs_kubectl
@for_each_choice
def test_a_program_sees_its_own_secret_only(components):
    for name, pod in pods(rendered(*components)).items():
        found = {
            re.sub(r"-[a-z0-9]{10}$", "", variable["valueFrom"]["secretKeyRef"]["name"])
            for container in containers(pod)
            for variable in environment(container).values()
            if "secretKeyRef" in variable.get("valueFrom", {})
        }
        more = {"redis"} if name == "prefect" and "high-availability" in components else set()
        assert found == SECRETS[name] | more, name
        given = {s["secretRef"]["name"] for c in containers(pod) for s in c.get("envFrom", [])}
        assert given <= {f"{name}-s3"}


CONNECTIONS = {
    ("mlflow", "postgres", 5432),
    ("prefect", "postgres", 5432),
    ("bridge", "mlflow", 5000),
    ("webhooks", "mlflow", 5000),
    ("ui", "mlflow", 5000),
    ("flow-run", "mlflow", 5000),
    ("bridge", "prefect", 4200),
    ("worker", "prefect", 4200),
    ("flow-run", "prefect", 4200),
    ("mlflow", "bridge", 4260),
    ("gateway", "mlflow", 5000),
    ("gateway", "prefect", 4200),
    ("gateway", "bridge", 4260),
    ("gateway", "ui", 4270),
    ("mlflow", "outside", 443),
    ("bridge", "outside", 443),
    ("flow-run", "outside", 443),
    ("worker", "outside", 443),
    ("worker", "outside", 6443),
}
MORE_CONNECTIONS = {
    "high-availability": {
        ("prefect", "redis", 6379),
        ("prefect-services", "redis", 6379),
        ("prefect-services", "postgres", 5432),
    },
    "monitoring": {("monitoring", "bridge", 4260), ("monitoring", "flow-run", 9464)},
    "external": {
        ("webhooks", "outside", 443),
        ("ui", "outside", 443),
        ("prefect", "outside", 5432),
        ("prefect-services", "outside", 5432),
    },
}


def selects(selector, labels):
    """Whether a label selector selects these labels."""
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


def admitted(policies, direction, here, there):
    """Ports on which the policies of pod `here` admit a peer; all of them if none selects it."""
    kind, peers = {"ingress": ("Ingress", "from"), "egress": ("Egress", "to")}[direction]
    ports = set()
    for spec in policies:
        if kind in spec["policyTypes"] and selects(spec["podSelector"], here["labels"]):
            for rule in spec.get(direction, []):
                matching = any(
                    selects(peer[selector], there[field])
                    for peer in rule.get(peers, [])
                    for selector, field in (
                        ("podSelector", "labels"), ("namespaceSelector", "namespace"),
                    )
                    if selector in peer
                )  # fmt: skip
                if matching or peers not in rule:
                    ports |= {port["port"] for port in rule["ports"] if port["protocol"] == "TCP"}
    return ports


@needs_kubectl
@for_each_choice
def test_the_policies_admit_exactly_the_connections_of_the_table(components):
    documents = rendered(*components)
    policies = [one["spec"] for one in of_kind(documents, "NetworkPolicy").values()]
    everything = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert everything in policies
    inside = {
        name: {"labels": pod["metadata"]["labels"], "namespace": {}}
        for name, pod in pods(documents).items()
    }
    outside = {
        "gateway": {"labels": {}, "namespace": {"trans-peft/gateway": "true"}},
        "monitoring": {"labels": {}, "namespace": {"kubernetes.io/metadata.name": "monitoring"}},
        "outside": {"labels": {}, "namespace": {}},
    }
    found = set()
    for (a, sender), (b, receiver) in product({**inside, **outside}.items(), repeat=2):
        if a in outside and b in outside:
            continue
        sent = admitted(policies, "egress", sender, receiver) if a in inside else None
        received = admitted(policies, "ingress", receiver, sender) if b in inside else None
        if a in inside and b in ("gateway", "monitoring"):
            continue
        if a == "outside":
            assert not received
            continue
        ports = received if sent is None else sent if received is None else sent & received
        found |= {(a, b, port) for port in ports if port != 53}
    expected = CONNECTIONS.union(*(MORE_CONNECTIONS.get(name, set()) for name in components))
    assert found == {(a, b, port) for a, b, port in expected if {a, b} <= {*inside, *outside}}


@needs_kubectl
@for_each_choice
def test_every_budget_leaves_a_pod_to_evict(components):
    documents = rendered(*components)
    workloads = of_kind(documents, "Deployment")
    for budget in of_kind(documents, "PodDisruptionBudget").values():
        name = budget["spec"]["selector"]["matchLabels"]["trans-peft/program"]
        if name in workloads:  # MLflow may be outside
            assert replicas(workloads[name]) > budget["spec"]["minAvailable"]


@needs_kubectl
@for_each_choice
def test_images_are_those_that_are_built_here_or_come_by_digest(components):
    documents = rendered(*components)
    built = {
        f"registry.example.com/trans-peft-{name}:0.1.0" for name in ("servers", "bridge", "worker")
    }
    found = {c["image"] for pod in pods(documents).values() for c in containers(pod)}
    assert {image for image in found if "@sha256:" not in image} == built
    (run,) = containers(pods(documents)["flow-run"])
    _, worker = containers(pods(documents)["worker"])
    assert run["image"] == worker["image"]
    dockerfile = (KUBERNETES.parent / "containers" / "Dockerfile").read_text()
    for name in ("servers", "bridge", "worker"):
        assert re.search(rf"^FROM \w+ AS {name}$", dockerfile, re.MULTILINE)


@needs_kubectl
def test_the_worker_may_do_what_prefect_kubernetes_does_and_nothing_else():
    documents = rendered()
    role = of_kind(documents, "Role")["worker"]
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group, resource, verb in product(rule["apiGroups"], rule["resources"], rule["verbs"])
    }
    assert allowed == {
        *(("batch", "jobs", verb) for verb in ("create", "delete", "get", "list", "watch")),
        ("", "pods", "list"), ("", "pods", "watch"), ("", "pods/log", "get"),
    }  # fmt: skip
    assert not of_kind(documents, "ClusterRole", "ClusterRoleBinding")
    (subject,) = of_kind(documents, "RoleBinding")["worker"]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "worker", "namespace": "trans-peft"}


@needs_kubectl
def test_programs_that_use_s3_have_a_role_and_no_other_program_has_one():
    accounts = of_kind(rendered(), "ServiceAccount")
    annotated = {name for name, one in accounts.items() if "annotations" in one["metadata"]}
    assert annotated == {"mlflow", "bridge", "flow-run"}


@needs_kubectl
@for_each_choice
def test_the_job_template_is_one_of_this_namespace_with_all_its_variables(components):
    template = job_template(rendered(*components))
    configuration = template["job_configuration"]
    namespaces = {
        configuration["namespace"],
        configuration["job_manifest"]["metadata"]["namespace"],
    }
    assert namespaces == {"trans-peft"}
    placeholders = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(configuration)))
    assert placeholders == set(template["variables"]["properties"])
    labels = configuration["job_manifest"]["metadata"].get("labels", {})
    assert ("kueue.x-k8s.io/queue-name" in labels) == ("kueue" in components)


@needs_kubectl
@pytest.mark.parametrize("components", [(), COMPONENTS], ids="+".join)
def test_every_manifest_is_valid(components):
    validate = pytest.importorskip("kubernetes_validate", reason="locks/kubernetes.txt")
    of_others = {"ServiceMonitor", "PodMonitor", "ResourceFlavor", "ClusterQueue", "LocalQueue"}
    for document in rendered(*components):
        if document["kind"] not in of_others:
            validate.validate(document, validate.latest_version(), strict=True)


def test_secrets_are_written_once_for_their_owner_alone(tmp_path, capsys):
    folder = tmp_path / "secrets"
    assert main(folder) == 0
    assert {path.name for path in folder.iterdir()} == {f"{name}.env" for name in generated()}
    before = {path: path.read_text() for path in folder.iterdir()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *before))
    assert main(folder) == 1
    assert "do:       change a secret in its files" in capsys.readouterr().err
    assert {path: path.read_text() for path in folder.iterdir()} == before


def test_secrets_that_two_programs_share_are_equal():
    first, second = generated(), generated()
    auth = first["prefect"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert {
        first[name]["PREFECT_API_AUTH_STRING"] for name in ("bridge", "worker", "flow-run")
    } == {auth}
    for server, variable in (
        ("mlflow", "MLFLOW_BACKEND_STORE_URI"),
        ("prefect", "PREFECT_API_DATABASE_CONNECTION_URL"),
    ):
        password = first["postgres"][f"{server.upper()}_PASSWORD"]
        assert f"//{server}:{password}@postgres/{server}" in first[server][variable]
    values = [
        value for given in (first, second) for one in given.values() for value in one.values()
    ]
    assert len(set(values)) == len(values) - 2 * 3  # Prefect's password: four times each


def test_a_template_needs_the_image_of_its_flow_runs(tmp_path):
    with pytest.raises(InvalidSpecError, match="WORKER_IMAGE is not"):
        PoolSettings(template_folder=Path(tmp_path))
