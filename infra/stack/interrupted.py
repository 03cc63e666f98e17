"""Marks flow runs that a stopped worker left as crashed, before the next worker starts.

Without workers on other hosts, no run of the pool can be running when the stack's worker starts. A
run that Prefect still reports as running was interrupted by `down`, a kill or a power cut. It would
occupy its place in the queue, and with one GPU slot no other run would ever start. The automation
that checks heartbeats misses such a run if the server was stopped at the same time.

Prefect does not record on which host a run is. While another worker of the pool is online, only the
automations mark lost runs.
"""

import time

import httpx

from infra.stack.settings import StackSettings
from trans_peft.domain.conventions import WORK_POOL, WORKER_STOPPED

__all__ = ["INTERRUPTED_S", "WORKER", "crash_interrupted_runs"]

WORKER = "local"
"""Name of the stack's own worker."""

INTERRUPTED_S = 30.0
"""Time that a flow run has to end after SIGTERM. A training saves a checkpoint in it."""

_UNFINISHED = {
    "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
    "work_pools": {"name": {"any_": [WORK_POOL]}},
}
_CRASHED = {
    "type": "CRASHED",
    "name": "Crashed",
    "message": WORKER_STOPPED,
}
_TIMEOUT_S = 120.0


def crash_interrupted_runs(settings: StackSettings) -> None:
    """Mark unfinished runs as crashed, unless a worker of another host is online.

    Raises httpx.HTTPError if the server does not answer for 120 s. Prefect's REST API:
    `POST /work_pools/{name}/workers/filter`, `POST /flow_runs/filter`,
    `POST /flow_runs/{id}/set_state`.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    with settings.prefect_client(timeout_s=30) as prefect:
        while True:
            try:
                workers = prefect.post(f"/api/work_pools/{WORK_POOL}/workers/filter", json={})
                online = {
                    worker["name"]
                    for worker in workers.raise_for_status().json()
                    if worker["status"] == "ONLINE"
                }
                if online - {WORKER}:
                    return
                found = prefect.post("/api/flow_runs/filter", json=_UNFINISHED)
                for run in found.raise_for_status().json():
                    path = f"/api/flow_runs/{run['id']}/set_state"
                    crashed = prefect.post(path, json={"state": _CRASHED, "force": True})
                    crashed.raise_for_status()
                return
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
