"""The Kubernetes manifests as Kustomize renders them, and what they say about pods."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from infra.kubernetes.make_secrets import main as make_secrets
from infra.stack.job_template import kubernetes_job_template

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"
COMPONENTS = tuple(sorted(path.name for path in (KUBERNETES / "components").iterdir()))
HAS_KUBECTL = shutil.which("kubectl") is not None

Document = dict[str, Any]


@cache
def rendered(*components: str) -> tuple[Document, ...]:
    """Return what `kubectl apply -k` would send, with these components and new secrets."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "kubernetes"
        shutil.copytree(KUBERNETES, folder, ignore=shutil.ignore_patterns("secrets"))
        make_secrets(folder / "secrets")
        path = folder / "kustomization.yaml"
        chosen = json.dumps([f"components/{name}" for name in components])
        path.write_text(path.read_text().replace("\ncomponents: []\n", f"\ncomponents: {chosen}\n"))
        found = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
        )
    assert found.returncode == 0, found.stderr
    return tuple(yaml.safe_load_all(found.stdout))


def of_kind(documents: tuple[Document, ...], *kinds: str) -> dict[str, Document]:
    """Return the documents of these kinds by name."""
    return {one["metadata"]["name"]: one for one in documents if one["kind"] in kinds}


def job_template(documents: tuple[Document, ...]) -> Document:
    """Return the pool's job template as the worker's init container would make it."""
    (files,) = (
        one["data"]
        for one in documents
        if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("job-template")
    )
    pod = of_kind(documents, "Deployment")["worker"]["spec"]["template"]["spec"]
    image = environment(pod["initContainers"][0])["WORKER_IMAGE"]["value"]
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        return kubernetes_job_template(Path(folder), image)


def pods(documents: tuple[Document, ...]) -> dict[str, Document]:
    """Return the pod template of each program, and of a flow run."""
    workloads = of_kind(documents, "Deployment", "StatefulSet", "Job")
    found = {name: one["spec"]["template"] for name, one in workloads.items()}
    manifest = job_template(documents)["job_configuration"]["job_manifest"]
    return {**found, "flow-run": manifest["spec"]["template"]}


def containers(pod: Document) -> list[Document]:
    """Return all containers of a pod template, init containers first."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def environment(container: Document) -> dict[str, Document]:
    """Return the variables of a container by name."""
    return {variable["name"]: variable for variable in container.get("env", [])}


def replicas(document: Document) -> int:
    """Return the number of pods of a Deployment or StatefulSet."""
    return document["spec"].get("replicas", 1)
