"""How long a hint takes: 1,000 at once, and one from MLflow to the first line of reconcile.

    python benchmarks/bridge.py [--runs 20] [--hints 1000] [--bursts 5]

On a stack of its own (`make up`, in a temporary folder, on free ports), with the settings of every
stack. `bridge.p99_ms`: the slowest hundredth of a burst, over bursts; half of the hints are copies
of others, of ten families. `trigger.alias_to_reconcile_s`: `champion` is set by MLflow's client
until the run's state is Running, over runs that are over before the next, split by what Prefect and
the bridge wrote down. `low` and `high` are the middle half.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from ratios import record

from infra.bridge.senders import sign
from infra.stack.machine import free_ports
from infra.stack.settings import StackSettings
from infra.stack.stack import down, up

FAMILIES = [f"bench-{n}" for n in range(10)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", type=int, default=20)
    options.add_argument("--hints", type=int, default=1000)
    options.add_argument("--bursts", type=int, default=5)
    options.add_argument("--dry", action="store_true", help="print, and leave results.json alone")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stack ends with us
    keep = (lambda name, entry, facts: print(name, entry, facts)) if chosen.dry else record
    facts = {
        "machine": f"{os.cpu_count()} cores",
        "prefect": version("prefect"),
        "mlflow": version("mlflow"),
    }
    with tempfile.TemporaryDirectory(prefix="tp-bench-") as folder:
        s3, mlflow, prefect, bridge = free_ports(4)
        settings = StackSettings(
            Path(folder) / "state",
            s3_port=s3,
            mlflow_port=mlflow,
            prefect_port=prefect,
            bridge_port=bridge,
        )
        up(settings, print)
        try:
            stack = Stack(settings)
            stack.register()
            stack.settle()
            taken = [stack.promotion(n) for n in range(chosen.runs)]
            for part in ("all", *PARTS):
                name = "trigger.alias_to_reconcile_s"
                name += "" if part == "all" else f".{part}"
                keep(name, middle([one[part] for one in taken]), facts)
            bursts = [asyncio.run(stack.burst(chosen.hints, n)) for n in range(chosen.bursts)]
            shape = {"shape": f"{chosen.hints} hints at once, {len(FAMILIES)} families"}
            for name, at in (("p50", 50), ("p99", 99)):
                values = [statistics.quantiles(burst, n=100)[at - 1] * 1000 for burst in bursts]
                keep(f"bridge.{name}_ms", middle(values), {**facts, **shape})
        finally:
            down(settings, print)


PARTS = ("webhook", "run_creation", "poll", "process_and_imports")


class Stack:
    """A running stack, asked as its clients ask it."""

    def __init__(self, settings: StackSettings) -> None:
        self._settings = settings
        self._mlflow = httpx.Client(base_url=f"{settings.urls['mlflow']}/api/2.0/mlflow/")
        self._prefect = httpx.Client(base_url=f"{settings.urls['prefect']}/api/", timeout=60)

    def register(self) -> None:
        """Make base families with two versions each; what they point at is not there."""
        tags = [{"key": "trans_peft.kind", "value": "base"}]
        for name in FAMILIES:
            self._post("registered-models/create", {"name": name, "tags": tags})
            for number in (1, 2):
                source = f"s3://bases/{name}/v{number}"
                ours = [{"key": "trans_peft.family", "value": name}]
                self._post("model-versions/create", {"name": name, "source": source, "tags": ours})

    def settle(self) -> None:
        """Wait until no run is due or at work."""
        states = {"type": {"any_": ["PENDING", "RUNNING"]}}
        due = {"type": {"any_": ["SCHEDULED"]}}
        while True:
            soon = {"before_": datetime.fromtimestamp(time.time() + 20).astimezone().isoformat()}
            work = self._runs(state=states) + self._runs(state=due, expected_start_time=soon)
            if not work:
                return
            time.sleep(0.5)

    def promotion(self, number: int) -> dict[str, float]:
        """Set `champion` and return the seconds until its run's first line, and what they were."""
        family = FAMILIES[0]
        wish = {"name": family, "alias": "champion", "version": str(1 + number % 2)}
        set_at = time.time()
        self._post("registered-models/alias", wish)
        line = self._log_line(set_at)
        run = self._begun(line["run"])
        history = self._history(line["run"])
        answered = _seconds(line["time"])
        created, pending, running = _seconds(run["created"]), history["PENDING"], history["RUNNING"]
        self.settle()
        return {
            "all": running - set_at,
            "webhook": answered - line["seconds"] - set_at,
            "run_creation": created - (answered - line["seconds"]),
            "poll": pending - created,
            "process_and_imports": running - pending,
        }

    async def burst(self, hints: int, number: int) -> list[float]:
        """Send so many hints at once and return the seconds until each was answered 200."""
        secret = self._settings.secrets.bridge_mlflow_secret
        limits = httpx.Limits(max_connections=hints)
        url = self._settings.urls["bridge"]
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as bridge:

            async def send(n: int) -> float:
                delivery_id = f"burst-{number}-{n // 2}"  # every delivery twice
                data = {"name": FAMILIES[n // 2 % len(FAMILIES)], "alias": "champion"}
                body = {"entity": "model_version_alias", "action": "deleted", "data": data}
                content, at = json.dumps(body).encode(), str(int(time.time()))
                headers = {
                    "Content-Type": "application/json",
                    "X-MLflow-Delivery-Id": delivery_id,
                    "X-MLflow-Timestamp": at,
                    "X-MLflow-Signature": sign(secret, delivery_id, at, content),
                }
                began = time.perf_counter()
                while True:
                    answer = await bridge.post("/hints/mlflow", content=content, headers=headers)
                    if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                        break
                    await asyncio.sleep(1)  # as a sender comes again
                answer.raise_for_status()
                return time.perf_counter() - began

            taken = await asyncio.gather(*(send(n) for n in range(hints)))
        self.settle()
        return list(taken)

    def _log_line(self, since: float) -> dict[str, Any]:
        """Return what the bridge logged of the champion set at this time."""
        log = self._settings.logs / "bridge.log"
        while True:
            for text in reversed(log.read_text().splitlines()):
                line = json.loads(text)
                if line.get("kind") == "champion" and _seconds(line["time"]) > since:
                    return line
            time.sleep(0.02)

    def _begun(self, run_id: str) -> dict[str, Any]:
        while True:
            (run,) = self._runs(id={"any_": [run_id]})
            if run["start_time"]:
                return run
            time.sleep(0.1)

    def _history(self, run_id: str) -> dict[str, float]:
        found = self._prefect.get("flow_run_states/", params={"flow_run_id": run_id})
        return {
            state["type"]: _seconds(state["timestamp"]) for state in found.raise_for_status().json()
        }

    def _runs(self, **wanted: Any) -> list[dict[str, Any]]:
        found = self._prefect.post("flow_runs/filter", json={"flow_runs": wanted, "limit": 200})
        return found.raise_for_status().json()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        self._mlflow.post(path, json=body, timeout=60).raise_for_status()


def middle(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the middle half, and how many there are."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    rounded = {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
    return {**rounded, "runs": len(values)}


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
