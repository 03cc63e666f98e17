"""Measures mixed batches: 16 adapters with a suite of 32 items each, together and one by one.

The adapters are of the kinds of `study.fleet` that can share batches (LoRA of four shapes, DoRA and
IA3), with random weights, on SmolLM2-135M in fp32. Each has 32 other items of the suite of classes.
Both sides start with the base in memory and an empty store, and end with 16 stored evaluations:

    serial   `lifecycle.evaluation.evaluate_on` for each adapter
    mixed    `lifecycle.mixed_evaluation.evaluate_together`, then `evaluate_on` for each adapter,
             which evaluates what could not share a batch

`judge.mixed_16_vs_serial_cpu` is the time of mixed relative to serial. Answers that differ and near
ties are counted. `--all-kinds` adds the Houlsby adapter, which is evaluated alone; its result is
`judge.mixed_16_vs_serial_cpu_all_kinds`.

    python -m benchmarks.judge [--study .study] [--pairs 3] [--clock wall|process] [--threads 2]
        [--adapters 16] [--items 32] [--all-kinds]

Base and rows are made first, unless they exist (a minute). Other numbers of adapters or items are
shown and not recorded.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from peft import get_peft_model

from benchmarks.ratios import Clock, machine, middle, parser, prepare, record
from demo.base import write_base_v1
from study.fleet import FAMILY, KINDS, class_suite, classes
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.data import parse_examples, pin, write_examples
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Evaluation, Suite
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import EvaluationSubject, evaluate_on
from trans_peft.lifecycle.mixed_evaluation import evaluate_together
from trans_peft.methods.specs import to_config
from trans_peft.models import adapter_weights_sha256, load_base
from trans_peft.ports import Platform

ADAPTERS, ITEMS = 16, 32
ALONE = ("bottleneck-64", "bottleneck-16")


@dataclass(frozen=True)
class Workload:
    """The base, and each adapter with its suite."""

    platform: Platform
    base: BaseVersion
    asked: Sequence[tuple[EvaluationSubject, tuple[Suite, ...]]]

    @classmethod
    def make(cls, options: argparse.Namespace, work: Path) -> "Workload":
        platform = replace(memory_platform(work / "platform"), store=FileStore())
        (options.study / "bases").mkdir(parents=True, exist_ok=True)
        uri = str(write_base_v1(options.study / "bases" / "v1").resolve())
        base = platform.catalog.make_ready(
            BaseVersion(FAMILY, "v1", uri, 0),
            fingerprint=fingerprint(uri, platform.store),
            source="benchmark",
        )
        rows = list(parse_examples(classes(options.study).read_bytes(), "classes.jsonl"))
        random.Random(0).shuffle(rows)
        model = load_base(base_folder(base, platform), "float32").model
        kinds = [kind for kind in KINDS if options.all_kinds or kind not in ALONE]
        asked = []
        for number, kind in enumerate(islice(cycle(kinds), options.adapters)):
            folder = work / f"{kind}-{number}"
            save_random_adapter(model, kind, number, folder)
            own = rows[number * options.items :][: options.items]
            suite = class_suite(write_examples(own, work / f"{number}.jsonl"))
            suite = replace(suite, name=f"class-{number}", data=pin(suite.data, platform.store))
            subject = EvaluationSubject(
                folder.name, adapter_weights_sha256(folder), partial(Path, folder)
            )
            asked.append((subject, (suite,)))
        return cls(platform, base, asked)

    def seconds(self, *, together: bool, clock: Clock) -> tuple[float, list[Evaluation]]:
        """Evaluate all adapters from an empty store; return the time and the evaluations."""
        empty = memory_platform(self.platform.work_dir).evaluations
        platform = replace(self.platform, evaluations=empty)
        started = clock()
        if together:
            evaluate_together(self.base, self.asked, platform)
        found = [
            one
            for subject, suites in self.asked
            for one in evaluate_on(self.base, suites, platform, subject).values()
        ]
        return clock() - started, found


def save_random_adapter(model: torch.nn.Module, kind: str, seed: int, folder: Path) -> None:
    """Save an adapter that changes some answers of the base; the base is restored."""
    from trans_peft.snapshot import ModelSnapshot

    snapshot = ModelSnapshot(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, to_config(KINDS[kind].spec))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.01 * torch.randn_like(weight)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    snapshot.restore()


def main() -> None:
    ours = parser(__doc__, pairs=3)
    ours.add_argument("--study", type=Path, default=Path(".study"))
    ours.add_argument("--adapters", type=int, default=ADAPTERS)
    ours.add_argument("--items", type=int, default=ITEMS)
    ours.add_argument("--all-kinds", action="store_true")
    options = ours.parse_args()
    clock = prepare(options)
    with tempfile.TemporaryDirectory() as work:
        workload = Workload.make(options, Path(work))
        order, took, found = random.Random(0), [], {}
        for _ in range(options.pairs):
            pair = {}
            for together in order.sample([True, False], k=2):
                pair[together], found[together] = workload.seconds(together=together, clock=clock)
            took.append((pair[True], pair[False]))
            print(f"seconds: mixed {pair[True]:.1f}, one by one {pair[False]:.1f}", flush=True)
    items = [
        (a, b)
        for mixed, serial in zip(found[True], found[False], strict=True)
        for a, b in zip(mixed.items, serial.items, strict=True)
    ]
    shape = (
        f"SmolLM2-135M, fp32, {options.adapters} adapters x {options.items} items of up to 8 "
        f"tokens; mixed {sum(a for a, _ in took) / len(took):.1f} s, one by one "
        f"{sum(b for _, b in took) / len(took):.1f} s; "
        f"{sum(a.answer == b.answer for a, b in items)} of {len(items)} answers equal, "
        f"{sum(one.near_ties for one in found[True])} near ties"
    )
    print(shape, flush=True)
    entry = middle([mixed / serial for mixed, serial in took])
    name = "judge.mixed_16_vs_serial_cpu" + ("_all_kinds" if options.all_kinds else "")
    if (options.adapters, options.items) == (ADAPTERS, ITEMS):
        record(name, entry, machine(options, shape))
    else:
        print(f"{name}: {entry}, not recorded", flush=True)


if __name__ == "__main__":
    main()
