"""Compares the evaluation of a fleet with usual code: 16 adapters of eight kinds on one new base.

Every arm judges the same adapters on the same items by the same gate, from the same answers on the
old base. Each arm runs in a separate process. Its time is measured from the first load to the last
verdict. With `--clock process`, as many arms run at once as there are cores.

    reload   for each adapter `from_pretrained` of base and adapter, `generate` in batches
    set      one base, `load_adapter` and `set_adapter`, `generate` in batches sorted by length
    plain    one base, this project's decoding without drafts
    whole    `trans_peft.lifecycle.transfer`, with checks, probe and verdict
    early    the same with a sequential policy

`validate.fleet16_vs_reload` is early / reload, `..._whole` whole / reload; the same holds for
`set`. Names with `--answers statement` end in `_statement`. The suite has 1,000 messages that are
answered with the class of an exception (one or two words), or 240 that are answered with the whole
statement (about 15 tokens), which are too few for a margin of 5 points. `low` and `high` are the
middle half of draws that resample rounds and adapters, because adapters of eight kinds differ more
than rounds. Verdicts and answers that differ from the first arm's are printed. `memory_64_vs_1` is
the peak memory of 64 rounds of attaching, answering and detaching, relative to one round.
`vs_lm_eval` is the time for one multiple-choice task relative to lm-evaluation-harness with `peft=`
(extra `harness`).

    python -m benchmarks.validate [--study .study] [--update all] [--adapters 16]
        [--answers class|statement] [--items 1000|240] [--batch 32] [--margin 5] [--pairs 3]
        [--clock wall|process] [--only fleet memory lm_eval] [--arms reload set plain whole early]

Missing bases, rows and adapters are made first (some minutes per adapter). Results of other numbers
of adapters or items are shown and not recorded.
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

from benchmarks.arms import ARMS, HARNESS, attach_and_detach, references
from benchmarks.ratios import CLOCKS, machine, middle, parser, prepare, record
from benchmarks.workload import ANSWERS, Task, Workload
from study.fleet import bases_and_rows, fleet, statements
from trans_peft.methods.registration import register_methods

ADAPTERS, MANY, DRAWS = 16, 64, 1000


def in_child(arm: str, task: Task) -> dict[str, Any]:
    """Run an arm in a separate process, and return its result with its seconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(vars(task), file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.validate", "--arm", arm, "--task", file.name]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def run_as_child(arm: str, path: Path) -> None:
    """Run one arm, and print its result as the last line of stdout."""
    task = Task(**json.loads(path.read_text()))
    torch.set_num_threads(task.threads)
    register_methods()
    workload, clock = Workload(task), CLOCKS[task.clock]
    name, _, count = arm.partition(" ")
    started = clock()
    if name == "turns":
        result = attach_and_detach(workload, int(count))
    else:
        result = {**ARMS, **HARNESS, "references": references}[name](workload)
    print(json.dumps({"seconds": clock() - started, **result}))


def compare_fleets(task: Task, options: argparse.Namespace, full: bool) -> None:
    """Run the arms round by round, in random order, and record the ratios."""
    in_child("references", task)
    # `early` is last: it does not evaluate all items.
    arms = [arm for arm in ARMS if arm in options.arms]
    order, rounds = random.Random(0), list[dict[str, dict[str, Any]]]()
    at_once = (os.cpu_count() or 1) if task.clock == "process" else 1
    for _ in range(options.pairs):
        drawn = order.sample(arms, k=len(arms))
        with ThreadPoolExecutor(at_once) as pool:  # of processes, each with one thread then
            result = dict(zip(drawn, pool.map(lambda arm: in_child(arm, task), drawn), strict=True))
        rounds.append({arm: result[arm] for arm in arms})
        print(f"seconds: { {arm: round(result[arm]['seconds'], 1) for arm in arms} }", flush=True)
    took = {arm: median(r[arm]["seconds"] for r in rounds) for arm in arms}
    summary = f"{verdict_summary(rounds[0])}; " + ", ".join(
        f"{a} {s:.0f} s" for a, s in took.items()
    )
    if set(took) == set(ARMS):
        summary += f"; {share_summary(took, median(r['reload']['loading_s'] for r in rounds))}"
    print(summary, flush=True)
    for peer, name in (("reload", "reload"), ("set", "set_adapter")):
        for arm, suffix in (("early", ""), ("whole", "_whole"), ("plain", "_plain")):
            if {peer, arm} <= set(took):
                entry = ratio([(r[arm], r[peer]) for r in rounds])
                suffix += "" if task.answers == "class" else f"_{task.answers}"
                keep(f"validate.fleet16_vs_{name}{suffix}", entry, options, summary, full)


def ratio(rounds: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, float]:
    """Return the ratio of the total times of two arms, and its spread over resampled adapters."""

    def seconds(result: Mapping[str, Any], drawn: Sequence[str]) -> float:
        shared = result["seconds"] - sum(result["laps"].values())
        return shared + sum(result["laps"][name] for name in drawn)

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


def verdict_summary(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the verdicts of the first arm, and the differences of the others, as text."""
    found = {
        arm: {name: one["verdict"] for name, one in result["adapters"].items()}
        for arm, result in arms.items()
    }
    answers = {
        arm: [answer for one in result["adapters"].values() for answer in one["answers"]]
        for arm, result in arms.items()
    }
    first, *rest = arms
    counts = Counter(found[first].values())
    summary = f"{first}: " + ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(counts.items())
    )
    for arm in rest:
        others = [f"{name} {v}" for name, v in found[arm].items() if v != found[first][name]]
        summary += f"; {arm}: {len(found[arm]) - len(others)} of {len(found[arm])} verdicts equal"
        summary += f" (not: {', '.join(others)})" if others else ""
        if arm == "early":  # another order, and not all items
            summary += f", {len(answers[arm])} of {len(answers[first])} items evaluated"
        else:
            equal = sum(a == b for a, b in zip(answers[arm], answers[first], strict=True))
            summary += f", {equal} of {len(answers[first])} answers equal"
    return summary


def share_summary(took: Mapping[str, float], loading_s: float) -> str:
    """Return the sources of the time that `early` saves compared with `reload`, as text."""
    saved = took["reload"] - took["early"]
    parts = {
        "loading once": loading_s,
        "decoding": took["reload"] - loading_s - took["plain"],
        "drafts, less checks and probe": took["plain"] - took["whole"],
        "early stop": took["whole"] - took["early"],
    }
    return "shares of the saving: " + ", ".join(
        f"{n} {part / saved:.0%}" for n, part in parts.items()
    )


def compare_memory(task: Task, options: argparse.Namespace, full: bool) -> None:
    """Record the ratio of the peak memories."""
    few = replace(task, items=min(task.items, 16))
    peaks = [
        (in_child(f"turns {MANY}", few)["peak_bytes"], in_child("turns 1", few)["peak_bytes"])
        for _ in range(options.pairs)
    ]
    summary = (
        f"{MANY} turns of 16 items {peaks[0][0] / 2**20:.0f} MiB, one {peaks[0][1] / 2**20:.0f}"
    )
    entry = middle([many / one for many, one in peaks])
    keep(f"validate.memory_{MANY}_vs_1", entry, options, summary, full)


def compare_harness(task: Task, options: argparse.Namespace, full: bool) -> None:
    """Record the ratio of the times for one task, and both scores."""
    if find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed: pip install '.[harness]'")
        return
    rounds = [{name: in_child(name, task) for name in HARNESS} for _ in range(options.pairs)]
    ours, theirs = rounds[0]["choose"], rounds[0]["harness"]
    equal = sum(a == b for a, b in zip(ours["right"], theirs["right"], strict=True))
    summary = (
        f"{len(ours['right'])} items of one task, from loading to score: ours {ours['score']:.2f} "
        f"in {ours['seconds']:.1f} s, lm-evaluation-harness {theirs['score']:.2f} in "
        f"{theirs['seconds']:.1f} s; {equal} items with equal results"
    )
    print(summary, flush=True)
    entry = middle([r["choose"]["seconds"] / r["harness"]["seconds"] for r in rounds])
    keep("validate.vs_lm_eval", entry, options, summary, full)


def keep(
    name: str, entry: dict[str, float], options: argparse.Namespace, summary: str, full: bool
) -> None:
    if full:
        record(name, entry, machine(options, f"SmolLM2-135M, fp32, {summary}"))
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
        run_as_child(options.arm, options.task)
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
