"""Measures a real vLLM server with the plugin: first request of an adapter, and cut-over.

    python -m benchmarks.serving [--adapters 8] [--cut-overs 5] [--poll 5]

It needs the environment of `make test-vllm`, and starts MLflow with a local store and one server on
the CPU. `low` and `high` are the quartiles, times are elapsed seconds.

`serve.first_request_s`: the first request of an adapter of 10 MB that the server has never seen,
beyond the same request when its folder is there and vLLM has to load it again. The difference is
what this project adds: the look-up, the download, hashing and checks.

`serve.cutover_s`: from setting an alias in MLflow until the first answer of the new version.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import httpx

from benchmarks.ratios import record
from infra.stack.machine import free_ports
from tests.serving.fleet import ServingFleet
from tests.serving.vllm_server import Vllm, vllm_server
from tests.tiny import write_tiny_base
from trans_peft.client import connect

HIDDEN, RANK = 1024, 256  # 10 MB for q_proj and down_proj of two layers


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--adapters", type=int, default=8)
    options.add_argument("--cut-overs", type=int, default=5)
    options.add_argument("--poll", type=float, default=5.0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch, mlflow_server(Path(scratch, "mlflow")) as url:
        folder = Path(scratch)
        os.environ["MLFLOW_TRACKING_URI"] = url
        base = write_tiny_base(folder / "v1", hidden=HIDDEN)
        fleet = ServingFleet(folder, connect(url), "bench")
        v1 = fleet.add_base("v1", base)
        names = [f"a{i}" for i in range(chosen.adapters + 1)]
        for seed, name in enumerate(names):
            fleet.train(name, v1, seed, hidden=HIDDEN, rank=RANK)
        variables = {
            "MLFLOW_TRACKING_URI": url,
            "TRANS_PEFT_SERVE_FAMILY": "bench",
            "TRANS_PEFT_SERVE_POLL_S": str(chosen.poll),
        }
        with vllm_server(folder / "server", base, variables, "--max-lora-rank", str(RANK)) as vllm:
            seconds(vllm, names.pop())  # the first adapter of all warms vLLM up
            first = [seconds(vllm, name) for name in names]
            again = [seconds(vllm, name) for name in names]  # evicted, and loaded again
            shape = f"10 MB, local store, {statistics.median(again):.3f} s of vLLM alone"
            added = [new - old for new, old in zip(first, again, strict=True)]
            store("serve.first_request_s", added, shape)
            moves = [cut_over(fleet, vllm, names[0], i) for i in range(chosen.cut_overs)]
            store("serve.cutover_s", moves, f"10 MB, local store, poll every {chosen.poll:g} s")


def seconds(vllm: Vllm, name: str) -> float:
    began = time.perf_counter()
    response = vllm.complete(name, "17 is", tokens=1)
    assert response.status_code == 200, response.text
    return time.perf_counter() - began


def cut_over(fleet: ServingFleet, vllm: Vllm, name: str, run: int) -> float:
    """Train a new version, which moves the alias, and wait for its first answer."""
    base = fleet.base("v1")
    newer = fleet.train(name, base, 100 + run, hidden=HIDDEN, rank=RANK, serves=False)
    time.sleep(run * 1.3)  # at another time of the server's poll
    began = time.perf_counter()
    fleet.registry.set_alias(name, base.alias, newer.number)
    while True:
        answered = vllm.complete(name, "17 is", tokens=1)
        if f".v{newer.number}." in answered.headers["trans-peft-version"]:
            return time.perf_counter() - began
        time.sleep(0.02)


def store(name: str, values: Sequence[float], shape: str) -> None:
    low, median, high = statistics.quantiles(values, n=4)
    entry = {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
    facts = {
        "machine": f"{os.cpu_count()} cores", "mlflow": version("mlflow"), "vllm": "0.32.0",
        "shape": shape,
    }  # fmt: skip
    record(name, {**entry, "runs": len(values)}, facts)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run MLflow with a local store until the end of the block, and yield its URL."""
    folder.mkdir()
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db", "--serve-artifacts",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not is_up(url):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_up(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    return False


if __name__ == "__main__":
    main()
