"""Carry adapters of v1 through a chain of three updates: `python -m study.chain`.

Each update trains the version before it further, on other text: `all` is that of the study,
`all-2` and `all-3` follow it. The adapters are the plain ones of `study.distillation`. On each
version they are used unchanged, and compensated for the change from v1, as reconcile does. An
adapter serves if the lower bound of its change lies above -5 points; the two strategies share the
level. The scores are in study/distilled.jsonl.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from demo.tasks import read_held_out
from study.cells import Prepared, end_with_parent, log, prepare, write_update
from study.distillation import (
    RANKS,
    SCORES,
    SEEDS,
    UNLABELED,
    compensated,
    missing_scores,
    prompts,
    trained_on_its_base,
)
from study.distillation_report import PAGE, PLAIN
from study.pages import with_blocks
from study.plan import STEPS, TASKS, UPDATES, V1, PlannedTraining
from study.score_file import Score, ScoreFile
from trans_peft.bases.fingerprint import fingerprint
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.recipe import Perturbation
from trans_peft.edges.file_store import FileStore
from trans_peft.validation.statistics.intervals import lower_bound

__all__ = ["CHAIN", "serves", "table"]

CHAIN = ("all", "all-2", "all-3")
COMPENSATED = f"{PLAIN}, compensated {RANKS[0]}, {UNLABELED.name}"


def main() -> None:
    """Make the updates, run what the score file lacks, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m study.chain", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="folder for all files")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds to run")
    parser.add_argument("--report", action="store_true", help="write the table only")
    options = parser.parse_args()
    known = ScoreFile(SCORES)
    if not options.report:
        os.environ.update(TQDM_DISABLE="1", OMP_WAIT_POLICY="PASSIVE")
        end_with_parent()
        prepared = with_chain(prepare(options.folder.resolve(), ["all"]))
        for seed in SEEDS[: options.seeds]:
            for task in TASKS:
                for score in scores(prepared, task, seed, known):
                    known.append(score)
                    log(f"{task}, {score.arm}, seed {seed}, {score.scored_on}: {score.points:.1f}")
    PAGE.write_text(with_blocks(PAGE.read_text(), {"chain": table(tuple(known))}))
    print(PAGE)


def with_chain(prepared: Prepared) -> Prepared:
    """Return the bases with those of the chain, which are made unless they exist (minutes)."""
    held_out = read_held_out(prepared.rows(name) for name in TASKS)
    fingerprints = dict(prepared.fingerprints)
    for number, (before, after) in enumerate(pairwise(CHAIN), start=1):
        folder, settings = prepared.base(after), replace(UPDATES["all"], seed=number)
        write_update(prepared.base(before), folder, settings, held_out)
        fingerprints[after] = fingerprint(str(folder), FileStore()).digest
    return replace(prepared, fingerprints=fingerprints)


def scores(prepared: Prepared, task: str, seed: int, known: ScoreFile) -> Iterator[Score]:
    """Yield the scores of one adapter that the file lacks."""
    planned = PlannedTraining(task, PLAIN, Perturbation(), STEPS[0], seed)
    job, trained = trained_on_its_base(prepared, planned)
    yield from missing_scores(prepared, planned, (V1, *CHAIN), trained, known)
    arm = replace(planned, arm=COMPENSATED)
    cells = {score.cell for score in known}
    for base in CHAIN:
        if (task, arm.arm, arm.steps, seed, V1, base) not in cells:
            made = prompts(prepared, job, UNLABELED)
            result = compensated(prepared, arm, trained, base, RANKS[0], made)
            yield from missing_scores(prepared, arm, (base,), result, known)


def table(found: Sequence[Score]) -> str:
    """Return a Markdown table with mean scores, and how many adapters serve on each version."""
    known = {(s.arm, s.task, s.seed, s.scored_on): s for s in found if s.trained_on == V1}
    adapters = sorted(
        {(task, seed) for arm, task, seed, base in known if (arm, base) == (COMPENSATED, CHAIN[-1])}
    )
    lines = [
        "| version | unchanged | serve unchanged | compensated | serve with compensation |",
        "| -- | -: | -: | -: | -: |",
    ]
    for base in (V1, *CHAIN):
        direct = [known[PLAIN, *adapter, base] for adapter in adapters]
        points = f"{np.mean([score.points for score in direct]):.1f}"
        if base == V1:
            lines.append(f"| {base} | {points} | {len(direct)} of {len(direct)} |  |  |")
            continue
        old = [known[PLAIN, *adapter, V1] for adapter in adapters]
        made = [known[COMPENSATED, *adapter, base] for adapter in adapters]
        alone = sum(serves(before, (now,)) for before, now in zip(old, direct, strict=True))
        both = sum(serves(before, now) for before, *now in zip(old, direct, made, strict=True))
        better = f"{np.mean([score.points for score in made]):.1f}"
        count = len(adapters)
        lines.append(f"| {base} | {points} | {alone} of {count} | {better} | {both} of {count} |")
    return "\n".join(lines)


def serves(before: Score, tried: Sequence[Score]) -> bool:
    """Whether one of the tried versions is not inferior to the old one, at its share of alpha."""
    policy = GatePolicy()
    for now in tried:
        pairs = list(zip(before.right, now.right, strict=True))
        lost, gained = pairs.count(("1", "0")), pairs.count(("0", "1"))
        bound = lower_bound(len(pairs), lost, gained, policy.alpha / len(tried))
        if bound > -policy.margin_points / 100:
            return True
    return False


if __name__ == "__main__":
    main()
