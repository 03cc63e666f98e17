"""Measures the fleet page: one page of the matrix of a family with 10,000 adapters.

    python -m benchmarks.ui [--adapters 10000] [--requests 40] [--dry]

`ui.matrix_10000_ms`: time from a request to the whole page of 50 adapters and 3 base versions,
through the ASGI application, over all filters and orders of `QUERIES`, after the family was read.
`low` and `high` are the quartiles. `shape` has the slowest query's median, the time of the first
read (which no later request waits for) and the share of it that is the building of the rows. The
registry is the one in memory.
"""

import argparse
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from starlette.testclient import TestClient

from benchmarks.ratios import record
from tests.ui.fleets import FAMILY, large
from trans_peft.lifecycle.reconcile import observe
from trans_peft.ui.app import create_app
from trans_peft.ui.index import build_index
from trans_peft.ui.progress import progress_of
from trans_peft.ui.settings import UiSettings

QUERIES = (
    "",
    "page=137",
    "q=77",
    "verdict=needs-retuning",
    "verdict=missing&sort=name&descending=true",
    "method=LOHA&suite=signatures&sort=difference",
    "sort=verdict&page=100",
    "sort=difference&descending=true&base=v2",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--adapters", type=int, default=10_000)
    options.add_argument("--requests", type=int, default=40, help="of each query")
    options.add_argument("--dry", action="store_true", help="print, and leave results.json alone")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tp-bench-") as folder:
        platform = large(Path(folder), chosen.adapters)
        began = time.perf_counter()
        fleet = observe(FAMILY, platform)
        observed = time.perf_counter()
        progress_of(build_index(fleet))
        built = time.perf_counter()
        app = create_app(platform, UiSettings(refresh_s=86_400))
        with TestClient(app, base_url="http://localhost") as client:
            times = {query: timed(client, query, chosen.requests) for query in QUERIES}
    for query, taken in times.items():
        print(f"{statistics.median(taken):7.1f} ms  {query}")
    low, median, high = statistics.quantiles([t for taken in times.values() for t in taken], n=4)
    slowest = max(statistics.median(taken) for taken in times.values())
    values = {"median": round(median, 1), "low": round(low, 1), "high": round(high, 1)}
    values["runs"] = len(QUERIES) * chosen.requests
    shape = (
        f"{chosen.adapters} adapters, 3 base versions, {len(QUERIES)} queries; slowest query "
        f"{slowest:.0f} ms; first read {built - began:.1f} s, of that rows {built - observed:.1f} s"
    )
    facts = {
        "machine": f"{os.cpu_count()} cores",
        "fastapi": version("fastapi"),
        "shape": shape,
    }
    print(values, facts)
    if not chosen.dry:
        record(f"ui.matrix_{chosen.adapters}_ms", values, facts)


def timed(client: TestClient, query: str, requests: int) -> list[float]:
    """Return the milliseconds of each request, after one that is not counted."""
    taken = []
    for _ in range(requests + 1):
        began = time.perf_counter()
        response = client.get(f"/families/{FAMILY}?{query}")
        taken.append(1000 * (time.perf_counter() - began))
        assert response.status_code == 200
    return taken[1:]


if __name__ == "__main__":
    main()
