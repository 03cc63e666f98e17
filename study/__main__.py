"""`python -m study`: carry out what is missing, then print the table and draw the picture."""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from study.cells import Prepared, bare_scores, prepare, scores, spared_layers
from study.ledger import Ledger, Score
from study.plan import Fit, fits

HERE = Path(__file__).parent


def main() -> None:
    """Resume the study where its ledger ends."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="for all that is made")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="adapters at a time")
    options = parser.parse_args()
    os.environ.update(TQDM_DISABLE="1", OMP_WAIT_POLICY="PASSIVE")
    ledger = Ledger(HERE / "scores.jsonl")
    prepared = prepare(options.folder.resolve(), say)
    for score in bare_scores(prepared, ledger):
        say(f"bare, {score.task}: {score.points:.1f} % right on {score.scored_on}")
        ledger.append(score)
    spared = spared_layers(prepared)
    say(f"spared layers: {spared}")
    known = frozenset(score.key for score in ledger)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_cell, fit, prepared, known): fit for fit in fits(spared)}
        for done, future in enumerate(as_completed(running), start=1):
            for score in future.result():
                ledger.append(score)
            say(f"{done} of {len(running)} adapters")


def say(what: str) -> None:
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)


def _cell(fit: Fit, prepared: Prepared, known: frozenset[str]) -> list[Score]:
    return list(scores(fit, prepared, known, say))


if __name__ == "__main__":
    main()
