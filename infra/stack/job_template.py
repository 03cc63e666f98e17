"""Job template of the process pool, without variables for command, environment and folder.

Prefect's own template has the variables `command`, `env` and `working_dir`, so every client that
can create a flow run can run any program as the worker. This template omits them. The server
rejects unknown variables with 422 (`additionalProperties`), and the worker ignores them.
"""

from typing import Any

__all__ = ["PROCESS_JOB_TEMPLATE"]

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
