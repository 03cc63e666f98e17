"""Measures training and evaluation on one GPU against TRL, lm-evaluation-harness and vLLM.

    python -m benchmarks.gpu [--shape 7b|smollm2|tiny] [--only train judge harness vllm]
        [--pairs 5] [--rounds 1] [--harness FOLDER] [--vllm PYTHON]

`make gpu` runs it for `smollm2` and `7b`. `--shape tiny` runs the same code in seconds on a CPU;
its figures are not results and are not written. The other shapes need CUDA.

    train     packed rows: time per token of this trainer / a stock SFTTrainer; with masking and
              dropping 0.2 / without; share of the matrix products' measured peak
    judge     seconds for a fleet in mixed batches / one by one, `--rounds` pairs
    harness   the same / lm-evaluation-harness with `peft=`, which `--harness` has (a folder of
              packages). It evaluates a few adapters, and the time is scaled to all
    vllm      the same / vLLM with all adapters at once, in the environment of `--vllm`

Mixed batches, one by one and vLLM start with the base in memory. The harness cannot.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_judging import JudgedFleet, equal_scores
from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.gpu_training import PERTURBATION, matmul_peak, mfu, ours, stock_trl
from benchmarks.ratios import middle, paired, record
from trans_peft.models import release_base

PARTS = ("train", "judge", "harness", "vllm")
GOALS = {
    "gpu.train_7b_vs_trl": "at most 1.0",
    "gpu.train_7b_perturbed_vs_plain": "at most 0.90",
    "gpu.train_7b_mfu": "at least 0.45",
    "gpu.judge_64_mixed_vs_serial": "at most 0.33",
    "gpu.judge_64_vs_harness": "at most 0.25",
    "gpu.judge_64_vs_vllm": "at most 1.0",
}


class Measured(NamedTuple):
    """A ratio or share of each pair, and what was measured."""

    name: str
    values: list[float]
    about: str


def train(shape: Shape, base: Path, work: Path, pairs: int) -> Iterator[Measured]:
    """Yield the figures of training."""
    us = ours(shape, base, work / "ours")
    about = (
        f"{shape.about}, {shape.dtype}, LoRA r 16 on q,k,v,o, {shape.steps} steps of "
        f"{shape.batch} x {shape.sequence} packed tokens"
    )
    plain_and_perturbed = paired(lambda: us.run(PERTURBATION), us.run, pairs)
    yield Measured(f"gpu.train_{shape.name}_perturbed_vs_plain", plain_and_perturbed, about)
    peak = matmul_peak(getattr(torch, shape.dtype), 8192 if torch.cuda.is_available() else 256)
    share = mfu(us, peak)
    shares = [share() for _ in range(pairs)]
    speed = f"{about}; peak of matrix products {peak / 1e12:.3g} TFLOP/s"
    yield Measured(f"gpu.train_{shape.name}_mfu", shares, speed)
    them = stock_trl(shape, base, work / "trl")
    assert us.tokens == them.tokens
    yield Measured(f"gpu.train_{shape.name}_vs_trl", paired(us.run, them.run, pairs), about)


def judge(
    fleet: JudgedFleet, options: argparse.Namespace, parts: frozenset[str]
) -> Iterator[Measured]:
    """Yield the figures of evaluating a fleet."""
    shape = fleet.shape
    name = f"gpu.judge_{shape.adapters}{{}}" + ("" if shape.name == "7b" else f"_{shape.name}")
    about = f"{shape.about}, {shape.dtype}, {shape.adapters} LoRA x {shape.items} items"
    order, mixed_s, ratios = random.Random(0), [], []
    for _ in range(options.rounds):
        seconds: dict[bool, float] = {}
        scores: dict[bool, dict[str, float]] = {}
        sides = [True, False] if "judge" in parts else [True]
        for together in order.sample(sides, k=len(sides)):
            seconds[together], scores[together] = fleet.evaluated(together=together)
        mixed_s.append(seconds[True])
        if "judge" in parts:
            ratios.append(seconds[True] / seconds[False])
    if "judge" in parts:
        equal = equal_scores(scores[True], scores[False])
        detail = f"{about}; {seconds[True]:.1f} s and {seconds[False]:.1f} s; {equal}"
        yield Measured(name.format("_mixed_vs_serial"), ratios, detail)
    release_base()
    peers = {"harness": (sys.executable, options.harness), "vllm": (options.vllm, "")}
    for peer, (python, path) in peers.items():
        if peer not in parts:
            continue
        try:
            peer_s, their_scores = fleet.by_peer(peer, python, path=path)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name.format(f'_vs_{peer}')}: not measured: {error}", flush=True)
            continue
        equal = equal_scores(scores[True], their_scores)
        detail = f"{about}; {statistics.median(mixed_s):.1f} s and {peer_s:.1f} s; {equal}"
        yield Measured(name.format(f"_vs_{peer}"), [s / peer_s for s in mixed_s], detail)


def show(measured: Measured, *, is_result: bool) -> None:
    """Print a figure with its goal, and write it to `results.json` if it is a result."""
    entry = middle(measured.values)
    if is_result:
        facts = {
            "machine": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "clock": "wall",
            "shape": measured.about,
        }
        record(measured.name, entry, facts)
        print(f"    goal: {GOALS.get(measured.name, 'none')}; {measured.about}", flush=True)
    else:
        print(f"{measured.name}: {entry}, not a result; {measured.about}", flush=True)


def main() -> None:
    ours_of = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ours_of.add_argument("--shape", choices=SHAPES, default="7b")
    ours_of.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    ours_of.add_argument("--pairs", type=int, default=5)
    ours_of.add_argument("--rounds", type=int, default=1)
    ours_of.add_argument("--harness", default="", help="folder of the packages")
    ours_of.add_argument("--vllm", default="build/gpu/vllm/bin/python", help="its Python")
    options = ours_of.parse_args()
    shape, parts = SHAPES[options.shape], frozenset(options.only)
    is_result = shape.name != "tiny"
    if is_result and not torch.cuda.is_available():
        ours_of.error(f"--shape {shape.name} needs a GPU with CUDA. Without one: --shape tiny")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = shape.write(work / "base")
        if "train" in parts:
            for measured in train(shape, base, work, options.pairs):
                show(measured, is_result=is_result)
            release_base()
        if parts - {"train"}:
            fleet = JudgedFleet.make(shape, base, work / "fleet")
            for measured in judge(fleet, options, parts):
                show(measured, is_result=is_result)


if __name__ == "__main__":
    main()
