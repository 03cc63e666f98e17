"""Measures ratios in interleaved pairs, and stores them in results.json.

Each pair measures two functions directly after one another, in random order, so that a busy machine
slows both. A ratio is the median over pairs of first / second; `low` and `high` are the middle
half. `--clock process` measures the processor time of one thread instead of the elapsed time, for a
machine that other programs use.
"""

import argparse
import ctypes
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Clock = Callable[[], float]
RESULTS = Path(__file__).with_name("results.json")
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "process": time.process_time}


def parser(description: str | None, pairs: int) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has."""
    ours = argparse.ArgumentParser(description=description)
    ours.add_argument("--pairs", type=int, default=pairs)
    ours.add_argument("--clock", choices=CLOCKS, default="wall")
    ours.add_argument("--threads", type=int, default=2)
    return ours


def prepare(options: argparse.Namespace) -> Clock:
    """Set threads as the options say; return the clock."""
    torch.set_num_threads(1 if options.clock == "process" else options.threads)
    return CLOCKS[options.clock]


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, as CUDA's allocator does. Without glibc: do nothing.

    Without this, the kernel spends a sixth of all processor time on zeroing pages. That time varies
    between training steps by more than a perturbation saves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # <malloc.h>
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def machine(options: argparse.Namespace, shape: str) -> dict[str, str]:
    """Return the machine, torch version, clock and shape of a measurement."""
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "clock": options.clock,
        "shape": shape,
    }


def paired(a: Callable[[], float], b: Callable[[], float], pairs: int) -> list[float]:
    """Return a() / b() of each pair, after one call of each to warm up."""
    order = random.Random(0)  # trainers seed the global one
    a(), b()
    ratios = []
    for _ in range(pairs):
        if order.random() < 0.5:
            value_a, value_b = a(), b()
        else:
            value_b, value_a = b(), a()
        ratios.append(value_a / value_b)
    return ratios


def middle(ratios: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios, their middle half, and how many there are."""
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    rounded = {"ratio": round(median, 4), "low": round(low, 4), "high": round(high, 4)}
    return {**rounded, "pairs": len(ratios)}


def record(name: str, entry: dict[str, float], facts: dict[str, str]) -> None:
    """Print one ratio and put it beside those of other benchmarks in `results.json`."""
    print(f"{name}: {entry}", flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {**entry, **facts}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
