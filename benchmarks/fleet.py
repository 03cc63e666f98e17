"""Measures how long reconcile needs to read and plan a fleet of 10,000 adapters.

    python -m benchmarks.fleet [--adapters 10000] [--runs 3] [--database URI] [--workers 4] [--dry]

It starts an MLflow server of its own on SQLite, or on the empty database at `--database`. Each
adapter has two versions, an outcome, aliases on two bases, and no verdict on a third base, so that
every adapter is in the plan. The registry writes the first adapter. The others are copies of its
rows. Each run is a process of its own. `low` and `high` are the quartiles.

`fleet.plan_10000_s`: the first look of a process: what the task `plan_fleet` does. The database is
in the page cache.
`fleet.plan_10000_vs_per_adapter`: its time / the time of reading each adapter by itself, which is
estimated from 100 adapters in the same process.
`fleet.idle_look_10000_s`: what a scheduled run reads of a fleet that did not change: its revision.
`fleet.plan_growth`: `plan` with 10,000 adapters / with 1,000.
`fleet.memory_10000_mib`: the peak RSS of the process.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import requests
import sqlalchemy

from benchmarks.bridge import middle
from benchmarks.fleet_look import FAMILY
from benchmarks.ratios import record
from infra.stack.machine import free_ports
from tests.edges.examples import draft, outcome, peft_folder, transferred
from trans_peft import connect
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.evaluation import GatePolicy

FIRST = "adapter-00000"
TABLES = (
    "registered_models",
    "model_versions",
    "registered_model_tags",
    "model_version_tags",
    "registered_model_aliases",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--adapters", type=int, default=10_000)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--database", help="URI of an empty database; by default SQLite")
    options.add_argument("--workers", type=int, default=4, help="of MLflow, whose default is 4")
    options.add_argument("--dry", action="store_true", help="print, and leave results.json alone")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with us
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    small, large = chosen.adapters // 10, chosen.adapters
    runs: dict[int, list[dict[str, float]]] = {small: [], large: []}
    with tempfile.TemporaryDirectory(prefix="tp-bench-") as folder:
        database = chosen.database or f"sqlite:///{folder}/mlflow.db"
        with serving(database, Path(folder), chosen.workers) as url:
            make_first(url, Path(folder))
            for count, taken in runs.items():
                add_copies(database, count)
                for _ in range(chosen.runs):
                    command = [sys.executable, "-m", "benchmarks.fleet_look", url]
                    found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                    taken.append(json.loads(found.stdout.splitlines()[-1]))
                    print(count, taken[-1], flush=True)
    facts = {
        "machine": f"{os.cpu_count()} cores",
        "mlflow": version("mlflow"),
        "shape": f"{large} adapters with 2 versions, {database.partition(':')[0]}, "
        f"{chosen.workers} workers of MLflow; requests: {runs[large][0]['requests']:.0f}, "
        f"{runs[large][0]['idle_requests']:.0f} for an idle look",
    }
    results = {
        f"plan_{large}_s": [run["plan_s"] for run in runs[large]],
        f"idle_look_{large}_s": [run["idle_s"] for run in runs[large]],
        f"plan_{large}_vs_per_adapter": [
            run["plan_s"] / (large * run["adapter_s"]) for run in runs[large]
        ],
        "plan_growth": [
            run["plan_s"] / before["plan_s"]
            for before, run in zip(runs[small], runs[large], strict=True)
        ],
        f"memory_{large}_mib": [run["memory_mib"] for run in runs[large]],
    }
    for name, values in results.items():
        if chosen.dry:
            print(f"fleet.{name}", middle(values), facts)
        else:
            record(f"fleet.{name}", middle(values), facts)


@contextmanager
def serving(database: str, folder: Path, workers: int) -> Iterator[str]:
    """Run MLflow on a database and yield its URL."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--port", str(port)),
        *("--workers", str(workers)),
        *("--backend-store-uri", database, "--artifacts-destination", f"{folder}/artifacts"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (
        (folder / "mlflow.log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            for _ in range(240):
                with suppress(OSError):
                    requests.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                time.sleep(0.5)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def make_first(url: str, folder: Path) -> None:
    """Register three bases and the first adapter, with a verdict on the second base."""
    platform = connect(url, work_dir=folder)
    v1, v2, _ = (
        platform.catalog.make_ready(
            BaseVersion(FAMILY, name, f"s3://bases/{FAMILY}/{name}", 0),
            fingerprint=Fingerprint("Llama", 2, name, {}, "v", "t"),
            source="benchmark",
        )
        for name in ("v1", "v2", "v3")
    )
    peft = peft_folder(folder / "peft")
    new = draft(FIRST, FAMILY, peft, v1.fingerprint_sha256)
    first = platform.registry.register(replace(new, trained_on=v1.ref), peft)
    second = platform.registry.register(transferred(first, v2.fingerprint_sha256), peft)
    passed = outcome(
        first,
        new_number=second.number,
        policy=GatePolicy().sha256,
        base=v2.fingerprint_sha256,
    )
    platform.registry.record(replace(passed, training=None))
    for found in (first, second):
        platform.registry.set_alias(FIRST, found.base.alias, found.number)


def add_copies(database: str, count: int) -> None:
    """Copy the rows of the first adapter until there are `count` adapters."""
    engine = sqlalchemy.create_engine(database)
    with engine.begin() as connection:
        known = connection.scalar(
            sqlalchemy.text("SELECT count(*) FROM registered_models WHERE name LIKE 'adapter-%'")
        )
        connection.execute(sqlalchemy.text("CREATE TEMPORARY TABLE copies (copy VARCHAR(64))"))
        connection.execute(
            sqlalchemy.text("INSERT INTO copies VALUES (:copy)"),
            [{"copy": f"adapter-{number:05}"} for number in range(known, count)],
        )
        for table in TABLES:
            columns = [
                column["name"] for column in sqlalchemy.inspect(connection).get_columns(table)
            ]
            values = [
                f"replace({name}, '{FIRST}', copy)" if name in ("name", "value") else name
                for name in columns
            ]
            connection.execute(
                sqlalchemy.text(  # of names in this file and of MLflow's columns
                    f"INSERT INTO {table} ({', '.join(columns)}) "  # noqa: S608
                    f"SELECT {', '.join(values)} FROM {table} CROSS JOIN copies "
                    f"WHERE name = '{FIRST}'"
                )
            )
    if engine.dialect.name == "postgresql":  # which does so by itself, after a while
        with engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(
                sqlalchemy.text("ANALYZE")
            )


if __name__ == "__main__":
    main()
