"""Flow runs whose worker is gone: told to Prefect before the next worker starts.

The stack has one worker, so when it starts, no run of its pool can be at work. One that Prefect
still takes for running was cut off by `down`, by a kill or by a power cut. It would hold its place
in the queue, and with one GPU slot no other run would ever start: the automation that waits for
heartbeats misses it where the server was stopped at the same moment.
"""

import time

import httpx

from infra.stack.settings import StackSettings
from trans_peft.domain.conventions import WORK_POOL

__all__ = ["crash_interrupted_runs"]

_AT_WORK = {
    "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
    "work_pools": {"name": {"any_": [WORK_POOL]}},
}
_CRASHED = {
    "type": "CRASHED",
    "name": "Crashed",
    "message": "The worker was stopped or killed while this run was at work.",
}
_PATIENCE_S = 120.0


def crash_interrupted_runs(settings: StackSettings) -> None:
    """Mark the runs that were at work as crashed. Waits 120 s for the server; httpx.HTTPError.

    Prefect's REST API: `POST /flow_runs/filter`, `POST /flow_runs/{id}/set_state`.
    """
    deadline = time.monotonic() + _PATIENCE_S
    url, auth = settings.urls["prefect"], settings.prefect_auth
    with httpx.Client(base_url=url, auth=auth, timeout=30, trust_env=False) as prefect:
        while True:
            try:
                found = prefect.post("/api/flow_runs/filter", json=_AT_WORK)
                for run in found.raise_for_status().json():
                    path = f"/api/flow_runs/{run['id']}/set_state"
                    crashed = prefect.post(path, json={"state": _CRASHED, "force": True})
                    crashed.raise_for_status()
                return
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
