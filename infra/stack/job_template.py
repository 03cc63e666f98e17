"""What may be chosen for one flow run of the process pool: nothing that decides what is run where.

Prefect's own template lets whoever creates a flow run choose `command`, `env` and `working_dir`, so
an API call runs any program as the worker. This one has no such variables. The server refuses
others with 422 (`additionalProperties`), and a worker that meets one all the same ignores it.
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
        "description": "Whether the worker's log has the output of the run.",
        "type": "boolean",
        "default": True,
    },
    "gpus": {
        "title": "GPUs",
        "description": "For pools of Kubernetes; a process uses the GPUs of its worker.",
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
