"""The fleet engine beside what a competent user writes: 16 adapters of mixed kinds on one new base.

Every arm judges the same adapters on the same items by the same gate, from the same answers on the
old base; each runs in a process of its own, and what it takes is counted from its first load to its
last verdict. Under `--clock process` as many run at once as there are cores.

    reload   for each adapter `from_pretrained` of base and adapter, `generate` in batches
    set      one base, `load_adapter` and `set_adapter`, `generate` in batches sorted by length
    plain    ours without drafts: one base, our own loop
    whole    ours, `trans_peft.lifecycle.transfer`: checks, probe and verdict as in the product
    early    the same under a sequential policy

`validate.fleet16_vs_reload` is early / reload, `..._whole` whole / reload; the other peer likewise;
with `--answers statement` each has `_statement` behind it. What a competent user needs many items
for is the margin of 5 points: 1,000 questions for the class of an exception (a word or two), or 240
for the whole statement (some 15 tokens), which are too few to show that nothing was lost.
`low` and `high` are the middle half of draws that take rounds and adapters anew: adapters of eight
kinds differ more than rounds do. Verdicts and answers that differ from the first arm's are told.
`memory_64_vs_1` is the peak memory of 64 attach-answer-detach turns beside that of one;
`vs_lm_eval` our time for one multiple-choice task beside lm-evaluation-harness' with `peft=` (extra
`harness`), scores side by side.

    python -m benchmarks.validate [--study .study] [--update all] [--adapters 16]
        [--answers class|statement] [--items 1000|240] [--batch 32] [--margin 5] [--pairs 3]
        [--clock wall|process] [--only fleet memory lm_eval] [--arms reload set plain whole early]

What is not there is made first: bases, rows, and 16 adapters of some minutes each. Other numbers of
adapters or items are shown and not recorded.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.arms import ARMS, HARNESS, references, turns
from benchmarks.ratios import CLOCKS, machine, middle, parser, prepare, record
from benchmarks.world import ANSWERS, Task, World
from study.fleet import bases_and_rows, fleet, statements
from trans_peft.methods.registration import register_methods

ADAPTERS, MANY, DRAWS = 16, 64, 1000


def in_child(arm: str, task: Task) -> dict[str, Any]:
    """Run an arm in a process of its own and return what it says, with its seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(vars(task), file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.validate", "--arm", arm, "--task", file.name]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def be_child(arm: str, path: Path) -> None:
    """Do one arm's work and say what came of it as the last line of stdout."""
    task = Task(**json.loads(path.read_text()))
    torch.set_num_threads(task.threads)
    register_methods()
    world, clock = World(task), CLOCKS[task.clock]
    name, _, count = arm.partition(" ")
    started = clock()
    if name == "turns":
        said = turns(world, int(count))
    else:
        said = {**ARMS, **HARNESS, "references": references}[name](world)
    print(json.dumps({"seconds": clock() - started, **said}))


def compare_fleets(task: Task, options: argparse.Namespace, full: bool) -> None:
    """Run the arms round by round, in random order, and keep the ratios."""
    in_child("references", task)
    arms = [arm for arm in ARMS if arm in options.arms]  # early last: it does not ask all
    order, rounds = random.Random(0), list[dict[str, dict[str, Any]]]()
    at_once = (os.cpu_count() or 1) if task.clock == "process" else 1
    for _ in range(options.pairs):
        drawn = order.sample(arms, k=len(arms))
        with ThreadPoolExecutor(at_once) as pool:  # of processes, each with one thread then
            said = dict(zip(drawn, pool.map(lambda arm: in_child(arm, task), drawn), strict=True))
        rounds.append({arm: said[arm] for arm in arms})
        print(f"seconds: { {arm: round(said[arm]['seconds'], 1) for arm in arms} }", flush=True)
    took = {arm: median(r[arm]["seconds"] for r in rounds) for arm in arms}
    told = f"{told_verdicts(rounds[0])}; " + ", ".join(f"{a} {s:.0f} s" for a, s in took.items())
    if set(took) == set(ARMS):
        told += f"; {told_shares(took, median(r['reload']['loading_s'] for r in rounds))}"
    print(told, flush=True)
    for peer, name in (("reload", "reload"), ("set", "set_adapter")):
        for arm, suffix in (("early", ""), ("whole", "_whole"), ("plain", "_plain")):
            if {peer, arm} <= set(took):
                entry = ratio([(r[arm], r[peer]) for r in rounds])
                suffix += "" if task.answers == "class" else f"_{task.answers}"
                keep(f"validate.fleet16_vs_{name}{suffix}", entry, options, told, full)


def ratio(rounds: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, float]:
    """Return the ratio of all time that two arms took, and how far other adapters would move it."""

    def seconds(said: Mapping[str, Any], drawn: Sequence[str]) -> float:
        shared = said["seconds"] - sum(said["laps"].values())
        return shared + sum(said["laps"][name] for name in drawn)

    random_state, names = random.Random(0), list(rounds[0][0]["laps"])
    ratios = []
    for _ in range(DRAWS):
        again = random_state.choices(rounds, k=len(rounds))
        drawn = random_state.choices(names, k=len(names))
        ratios.append(
            sum(seconds(a, drawn) for a, _ in again) / sum(seconds(b, drawn) for _, b in again)
        )
    whole = sum(a["seconds"] for a, _ in rounds) / sum(b["seconds"] for _, b in rounds)
    return {**middle(ratios), "ratio": round(whole, 4), "pairs": len(rounds)}


def told_verdicts(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which verdicts the first arm gives, and where those of another or its answers differ."""
    found = {
        arm: {name: one["verdict"] for name, one in said["adapters"].items()}
        for arm, said in arms.items()
    }
    answers = {
        arm: [answer for one in said["adapters"].values() for answer in one["answers"]]
        for arm, said in arms.items()
    }
    first, *rest = arms
    counts = Counter(found[first].values())
    told = f"{first}: " + ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(counts.items())
    )
    for arm in rest:
        others = [f"{name} {v}" for name, v in found[arm].items() if v != found[first][name]]
        told += f"; {arm}: {len(found[arm]) - len(others)} of {len(found[arm])} verdicts equal"
        told += f" (not: {', '.join(others)})" if others else ""
        if arm == "early":  # it asks in an order of its own, and not all
            told += f", {len(answers[arm])} of {len(answers[first])} items asked"
        else:
            equal = sum(a == b for a, b in zip(answers[arm], answers[first], strict=True))
            told += f", {equal} of {len(answers[first])} answers equal"
    return told


def told_shares(took: Mapping[str, float], loading_s: float) -> str:
    """Say which part of what early saves beside reload comes from what."""
    saved = took["reload"] - took["early"]
    parts = {
        "loading once": loading_s,
        "our loop": took["reload"] - loading_s - took["plain"],
        "drafts, less checks and probe": took["plain"] - took["whole"],
        "early stop": took["whole"] - took["early"],
    }
    return "of what is saved: " + ", ".join(f"{n} {part / saved:.0%}" for n, part in parts.items())


def compare_memory(task: Task, options: argparse.Namespace, full: bool) -> None:
    """Keep the ratio of peak memories."""
    few = replace(task, items=min(task.items, 16))
    peaks = [
        (in_child(f"turns {MANY}", few)["peak_bytes"], in_child("turns 1", few)["peak_bytes"])
        for _ in range(options.pairs)
    ]
    told = f"{MANY} turns of 16 items {peaks[0][0] / 2**20:.0f} MiB, one {peaks[0][1] / 2**20:.0f}"
    entry = middle([many / one for many, one in peaks])
    keep(f"validate.memory_{MANY}_vs_1", entry, options, told, full)


def compare_harness(task: Task, options: argparse.Namespace, full: bool) -> None:
    """Keep the ratio of times for one task, and both scores."""
    if find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed: pip install 'trans-peft[harness]'")
        return
    rounds = [{name: in_child(name, task) for name in HARNESS} for _ in range(options.pairs)]
    ours, theirs = rounds[0]["choose"], rounds[0]["harness"]
    equal = sum(a == b for a, b in zip(ours["right"], theirs["right"], strict=True))
    told = (
        f"{len(ours['right'])} items of one task, from loading to score: ours {ours['score']:.2f} "
        f"in {ours['seconds']:.1f} s, lm-evaluation-harness {theirs['score']:.2f} in "
        f"{theirs['seconds']:.1f} s; {equal} items marked alike"
    )
    print(told, flush=True)
    entry = middle([r["choose"]["seconds"] / r["harness"]["seconds"] for r in rounds])
    keep("validate.vs_lm_eval", entry, options, told, full)


def keep(
    name: str, entry: dict[str, float], options: argparse.Namespace, told: str, full: bool
) -> None:
    if full:
        record(name, entry, machine(options, f"SmolLM2-135M, fp32, {told}"))
    else:
        print(f"{name}: {entry}, not recorded", flush=True)


def main() -> None:
    ours = parser(__doc__, pairs=3)
    ours.add_argument("--study", type=Path, default=Path(".study"))
    ours.add_argument("--update", default="all")
    ours.add_argument("--adapters", type=int, default=ADAPTERS)
    ours.add_argument("--answers", choices=ANSWERS, default="class")
    ours.add_argument("--items", type=int, help="of the suite's 1,037 or 479")
    ours.add_argument("--batch", type=int, default=32)
    ours.add_argument("--margin", type=float, default=5.0)
    ours.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    ours.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    ours.add_argument("--arm", help=argparse.SUPPRESS)
    ours.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = ours.parse_args()
    if options.arm:
        be_child(options.arm, options.task)
        return
    prepare(options)
    bases_and_rows(options.study, options.update)
    trained_on = statements(options.study)
    answers = ANSWERS[options.answers]
    items = options.items or answers.items
    task = Task(
        study=str(options.study),
        update=options.update,
        adapters={n: str(f) for n, f in fleet(options.study, trained_on, options.adapters).items()},
        answers=options.answers,
        rows=str(answers.rows(options.study)),
        items=items,
        batch=options.batch,
        margin=options.margin,
        clock=options.clock,
        threads=1 if options.clock == "process" else options.threads,
        references=str(options.study / "fleet" / "evaluations"),
    )
    full = (options.adapters, items) == (ADAPTERS, answers.items)
    for part in options.only:
        PARTS[part](task, options, full)


PARTS: dict[str, Callable[[Task, argparse.Namespace, bool], None]] = {
    "fleet": compare_fleets,
    "memory": compare_memory,
    "lm_eval": compare_harness,
}

if __name__ == "__main__":
    main()
