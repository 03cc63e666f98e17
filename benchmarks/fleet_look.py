"""One process that reads a fleet: `python -m benchmarks.fleet_look URL`. See `benchmarks.fleet`.

A module of its own, because it imports what a reconcile run imports: its memory is measured.
"""

import json
import sys
import tempfile
import time
from typing import Any

import requests

from benchmarks.peak_memory import peak_memory_mib
from trans_peft.client import connect
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle.reconcile import observe, plan, revision, with_cost_estimates
from trans_peft.ports import Platform

FAMILY = "bench"
SAMPLE = 100


def read(url: str) -> dict[str, float]:
    """Return the figures of one process: a look, an idle look, and reads of single adapters."""
    platform, sent = connect(url, work_dir=tempfile.gettempdir()), 0
    send = requests.Session.send

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        return send(*arguments, **options)

    requests.Session.send = counted  # type: ignore[method-assign]
    plan_s, requests_of_a_look = look(platform), sent
    began = time.perf_counter()
    revision(FAMILY, GatePolicy(), PromotionPolicy(), platform)
    idle_s = time.perf_counter() - began
    idle_requests = sent - requests_of_a_look
    memory_mib = peak_memory_mib()
    names = platform.registry.adapters(FAMILY)
    names = names[:: max(1, len(names) // SAMPLE)]
    began = time.perf_counter()
    for name in names:
        platform.registry.adapter(name)
    return {
        "plan_s": plan_s,
        "idle_s": idle_s,
        "requests": requests_of_a_look,
        "idle_requests": idle_requests,
        "memory_mib": memory_mib,
        "adapter_s": (time.perf_counter() - began) / len(names),
    }


def look(platform: Platform) -> float:
    """Return the seconds of reading and planning the fleet."""
    began = time.perf_counter()
    fleet = observe(FAMILY, platform)
    found = with_cost_estimates(plan(fleet, GatePolicy()), fleet, platform)
    taken = time.perf_counter() - began
    if not len(found.tasks) == len(fleet.adapters) > 0 or found.unreadable:
        raise RuntimeError(f"unexpected plan: {len(found.tasks)} tasks, {found.unreadable[:3]}")
    return taken


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1])))
