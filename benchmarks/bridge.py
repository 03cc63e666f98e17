"""Measures the bridge: a burst of notifications, alias to reconcile, upload to first verdict.

    python -m benchmarks.bridge [--bursts 5] [--promotions 20] [--uploads 7]
                                [--notifications 1000] [--dry]

It starts a separate stack (`make up`, in a temporary folder, on free ports) with default settings,
and pauses its schedule. `low` and `high` are the quartiles. A count of 0 skips a part.

`bridge.p99_ms`: 99th percentile of the answer times of a burst, over bursts. The notifications
concern ten families. Each delivery is sent twice, on one connection per notification. A sender that
receives 503 retries after 15 s, and the time of its first attempt counts.

`trigger.alias_to_reconcile_s`: time from setting `champion` with MLflow's client until the run is
Running, split by the times that Prefect and the bridge record.

`trigger.upload_to_first_verdict_s`: time from writing the manifest of a tiny base with boto3, after
its files, until MLflow has the verdict of the first of two adapters. `to_reconcile` and `to_shard`
consist of a poll of the worker, the start of a process and its imports. `ingest` includes the plan.
"""

import argparse
import asyncio
import io
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.ratios import record
from infra.bridge.authentication import sign
from infra.stack.machine import free_ports
from infra.stack.settings import StackSettings
from infra.stack.stack import down, up
from tests.end_to_end.running_stack import RECIPE, Stack, rows, wait_until, write_update
from tests.tiny import write_tiny_base
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.bases.publish import publish
from trans_peft.domain.base import BaseVersion, Manifest
from trans_peft.domain.conventions import CHAMPION_ALIAS, Deployment
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.mlflow_catalog import MlflowCatalog
from trans_peft.edges.mlflow_client import tag

FAMILIES = [f"bench-{n}" for n in range(10)]
ADAPTERS = ("parity", "parity-again")
PROMOTION = ("webhook", "run_creation", "poll", "process_and_imports")
UPLOAD = ("notification", "to_reconcile", "ingest", "to_shard", "verdict")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--bursts", type=int, default=5)
    options.add_argument("--promotions", type=int, default=20)
    options.add_argument("--uploads", type=int, default=7)
    options.add_argument("--notifications", type=int, default=1000)
    options.add_argument("--dry", action="store_true", help="print, and leave results.json alone")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stack ends with us
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    names = ("prefect", "mlflow")
    facts = {"machine": f"{os.cpu_count()} cores", **{name: version(name) for name in names}}

    def keep(name: str, values: Sequence[float], **more: str) -> None:
        if chosen.dry:
            print(name, middle(values), more, flush=True)
        else:
            record(name, middle(values), {**facts, **more})

    def keep_split(name: str, parts: Sequence[str], taken: Sequence[Mapping[str, float]]) -> None:
        for part in ("all", *parts) if taken else ():
            keep(name if part == "all" else f"{name}.{part}", [one[part] for one in taken])

    with tempfile.TemporaryDirectory(prefix="tp-bench-") as folder, running(Path(folder)) as stack:
        benchmark = BridgeBenchmark(stack, Path(folder))
        if chosen.uploads:
            benchmark.make_fleet()
        uploads = [benchmark.upload(n) for n in range(2, 2 + chosen.uploads)]
        keep_split("trigger.upload_to_first_verdict_s", UPLOAD, uploads)
        if chosen.bursts or chosen.promotions:
            benchmark.make_families()
        bursts = [benchmark.burst(chosen.notifications, n) for n in range(chosen.bursts)]
        again = sum(times for _, times in bursts)
        count = f"{chosen.notifications} notifications at once, {len(FAMILIES)} families"
        shape = f"{count}; {again} answers were 503"
        for name, at in (("p50", 50), ("p99", 99)) if bursts else ():
            values = [statistics.quantiles(burst, n=100)[at - 1] * 1000 for burst, _ in bursts]
            keep(f"bridge.{name}_ms", values, shape=shape)
        promotions = [benchmark.promotion(n) for n in range(chosen.promotions)]
        keep_split("trigger.alias_to_reconcile_s", PROMOTION, promotions)


@contextmanager
def running(folder: Path, **more: str) -> Iterator[Stack]:
    """Run a stack with its state in the folder. `more` are further settings."""
    s3, mlflow, prefect, bridge, ui, metrics = free_ports(6)
    settings = StackSettings(
        state=folder / "state",
        s3_port=s3,
        mlflow_port=mlflow,
        prefect_port=prefect,
        bridge_port=bridge,
        ui_port=ui,
        metrics_port=metrics,
    ).model_copy(update=more)
    up(settings, print)
    try:
        yield Stack(settings)
    finally:
        down(settings, print)


class BridgeBenchmark:
    """Measurements on a running stack, through the interfaces of its clients."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._log = stack.settings.logs / "bridge.log"
        self._read = 0  # bytes of the bridge's log
        # The schedule's own run, which may answer a notification, was made long before it.
        found = stack.prefect("GET", f"deployments/name/{Deployment.RECONCILE}")
        stack.prefect("POST", f"deployments/{found['id']}/pause_deployment")

    def make_families(self) -> None:
        """Make base families with two ready versions each, and no adapter."""
        content = fingerprint(str(write_tiny_base(self._folder / "content")), FileStore())
        catalog = MlflowCatalog(self._stack.settings.urls["mlflow"])
        for family in FAMILIES:
            for name in ("v1", "v2"):
                uri = f"s3://data/{family}/{name}"
                catalog.make_ready(
                    BaseVersion(family, name, uri, 0), fingerprint=content, source="benchmark"
                )
        self._settle()

    def make_fleet(self) -> None:
        """Make a tiny base that serves, and two adapters that were trained on it."""
        stack = self._stack
        for name, text in (("train", rows(0, 64)), ("eval", rows(100, 24))):
            stack.s3.upload_fileobj(io.BytesIO(text.encode()), "data", f"{name}.jsonl")
        put_base(stack, write_tiny_base(self._folder / "v1"), "v1")
        wait_until(lambda: stack.mlflow.search_model_versions("name='tiny'"), patience_s=300)
        self._settle()
        stack.champion("1")
        wait_until(lambda: stack.alias("tiny", "serving") == "1", patience_s=300)
        for adapter in ADAPTERS:
            state = stack.run("train-adapter", recipe=RECIPE | {"adapter": adapter})
            if state["type"] != "COMPLETED":
                raise RuntimeError(f"{adapter} was not trained: {state}")
        self._settle()

    def burst(self, notifications: int, number: int) -> tuple[list[float], int]:
        """Send notifications at once; return the seconds of each, and the number of 503 answers."""
        port = self._stack.settings.bridge_port
        secret = self._stack.settings.secrets.bridge_mlflow_secret
        requests = [_request(secret, number, n // 2) for n in range(notifications)]
        again = 0

        async def send(request: bytes) -> float:
            nonlocal again
            began = time.perf_counter()
            while True:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                status = (await reader.read()).split(b" ", 2)[1]
                writer.close()
                if status == b"200":
                    return time.perf_counter() - began
                if status != b"503":
                    raise RuntimeError(f"a notification was answered {status!r}")
                again += 1
                await asyncio.sleep(15)

        async def all_at_once() -> list[float]:
            return await asyncio.gather(*(send(request) for request in requests))

        taken = asyncio.run(all_at_once())
        self._settle()
        return taken, again

    def promotion(self, number: int) -> dict[str, float]:
        """Set `champion` and return the seconds until its run's first line, and what they were."""
        set_at = time.time()
        self._stack.champion(str(1 + number % 2), FAMILIES[0])
        notification = self._logged("champion")
        run = self._began(notification["run"])
        states = self._stack.prefect("GET", f"flow_run_states/?flow_run_id={notification['run']}")
        at = {state["type"]: seconds(state["timestamp"]) for state in states}
        heard, created = (
            seconds(notification["time"]) - notification["seconds"],
            seconds(run["created"]),
        )
        self._settle()
        return _split(PROMOTION, (set_at, heard, created, at["PENDING"], at["RUNNING"]))

    def upload(self, number: int) -> dict[str, float]:
        """Upload a base; return the seconds from its manifest to its first verdict, and a split."""
        name = f"v{number}"
        put_at = put_base(self._stack, write_update(self._folder / name, seed=number), name)
        notification = self._logged("upload")
        stack, judged = self._stack, []

        def verdict() -> bool:
            found = [
                version.tags
                for adapter in ADAPTERS
                for version in stack.mlflow.search_model_versions(f"name='{adapter}'")
            ]
            judged[:] = [
                tags
                for tags in found
                if tags.get(tag("base_version")) == name and tag("verdict") in tags
            ]
            return bool(judged)

        wait_until(verdict, patience_s=600)
        judged_at = time.time()
        run = self._began(notification["run"])
        shards = runs(stack, tags={"all_": ["family:tiny"]})
        created = {seconds(shard["created"]): shard for shard in shards}
        shard = created[min(at for at in created if at > put_at)]
        self._settle()
        moments = (shard["created"], shard["start_time"])
        moments = (run["created"], run["start_time"], *moments)
        return _split(UPLOAD, (put_at, *map(seconds, moments), judged_at))

    def _settle(self) -> None:
        """Wait until no run is due or unfinished, and skip the log of the bridge up to here."""
        settle(self._stack)
        self._read = self._log.stat().st_size

    def _logged(self, kind: str) -> dict[str, Any]:
        """Return what the bridge logs next of a notification of this kind."""
        found: list[dict[str, Any]] = []

        def logged() -> bool:
            text = self._log.read_bytes()[self._read :].decode()
            lines = (json.loads(line) for line in text.splitlines() if line.endswith("}"))
            found[:] = [line for line in lines if line.get("kind") == kind and line.get("run")]
            return bool(found)

        wait_until(logged)
        return found[0]

    def _began(self, run_id: str) -> dict[str, Any]:
        """Return the run once it has started."""
        while True:
            run = self._stack.prefect("GET", f"flow_runs/{run_id}")
            if run["start_time"]:
                return run
            time.sleep(0.1)


def runs(stack: Stack, **wanted: Any) -> list[dict[str, Any]]:
    """Return at most 200 flow runs, as Prefect's filter selects them."""
    return stack.prefect("POST", "flow_runs/filter", json={"flow_runs": wanted, "limit": 200})


def settle(stack: Stack, poll_s: float = 0.5) -> None:
    """Wait until no flow run is due or unfinished."""
    at_work = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    due = {"state": {"type": {"any_": ["SCHEDULED"]}}}
    while True:
        soon = datetime.fromtimestamp(time.time() + 20).astimezone().isoformat()
        if not runs(stack, **at_work) + runs(stack, **due, expected_start_time={"before_": soon}):
            break
        time.sleep(poll_s)


def put_base(stack: Stack, folder: Path, name: str) -> float:
    """Upload a tiny base as a plain client does, the manifest last; return when that began."""
    local = f"{folder}-published"
    publish(folder, local, family="tiny", version=name, store=FileStore())
    began = 0.0
    files = sorted(Path(local).iterdir(), key=lambda file: file.name == Manifest.FILE_NAME)
    for file in files:
        began = time.time()
        stack.s3.upload_file(str(file), "bases", f"tiny/{name}/{file.name}")
    return began


def _request(secret: str, burst: int, delivery: int) -> bytes:
    """Return the HTTP request of MLflow's webhook for a removed alias `champion`, as bytes."""
    data = {"name": FAMILIES[delivery % len(FAMILIES)], "alias": CHAMPION_ALIAS}
    event = {"entity": "model_version_alias", "action": "deleted", "data": data}
    body, at = json.dumps(event).encode(), str(int(time.time()))
    name = f"burst-{burst}-{delivery}"
    head = {
        "Host": "bridge",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "X-MLflow-Delivery-Id": name,
        "X-MLflow-Timestamp": at,
        "X-MLflow-Signature": sign(secret, name, at, body),
    }
    lines = ["POST /notifications/mlflow HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def _split(parts: Sequence[str], moments: Sequence[float]) -> dict[str, float]:
    """Return the seconds between neighboring moments by name, and all of them."""
    steps = [later - earlier for earlier, later in pairwise(moments)]
    return {"all": moments[-1] - moments[0], **dict(zip(parts, steps, strict=True))}


def middle(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the middle half, and how many there are."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    rounded = {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
    return {**rounded, "runs": len(values)}


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    main()
