"""Job templates of the work pool, without variables for command, environment and folder.

Prefect's own templates have the variables `command`, `env` and `working_dir`, so every client that
can create a flow run can run any program as the worker. These templates omit them. The server
rejects unknown variables with 422 (`additionalProperties`), and the worker ignores them.
"""

import json
from pathlib import Path
from typing import Any

from jsonpatch import JsonPatch

__all__ = ["PROCESS_JOB_TEMPLATE", "kubernetes_job_template"]

_VARIABLES: dict[str, dict[str, Any]] = {
    "name": {
        "title": "Name",
        "description": "Name of the process in the worker's log.",
        "anyOf": [{"type": "string"}, {"type": "null"}],
        "default": None,
    },
    "labels": {
        "title": "Labels",
        "description": "Labels of the run's process.",
        "type": "object",
        "additionalProperties": {"type": "string"},
    },
    "stream_output": {
        "title": "Stream Output",
        "description": "Whether the worker logs the output of the run.",
        "type": "boolean",
        "default": True,
    },
    "gpus": {
        "title": "GPUs",
        "description": "For Kubernetes pools. A process uses the GPUs of its worker.",
        "type": "integer",
        "default": 0,
        "minimum": 0,
    },
}

PROCESS_JOB_TEMPLATE: dict[str, Any] = {
    "job_configuration": {
        "name": "{{ name }}",
        "labels": "{{ labels }}",
        "stream_output": "{{ stream_output }}",
    },
    "variables": {
        "type": "object",
        "properties": _VARIABLES,
        "additionalProperties": False,
    },
}


def kubernetes_job_template(folder: Path, image: str) -> dict[str, Any]:
    """Return the template of a Kubernetes pool whose flow runs use `image`.

    The folder contains base-job-template.json (infra/kubernetes/base) and any number of patches,
    `*.patch.json` (RFC 6902), which are applied in the order of their names. Raises OSError,
    ValueError and JsonPatchException for files that are missing, are not JSON or do not apply.
    """
    template = json.loads((folder / "base-job-template.json").read_text())
    for path in sorted(folder.glob("*.patch.json")):
        template = JsonPatch.from_string(path.read_text()).apply(template)
    manifest = template["job_configuration"]["job_manifest"]
    manifest["spec"]["template"]["spec"]["containers"][0]["image"] = image
    return template
