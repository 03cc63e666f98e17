"""`python -m study`: run what is missing, then print the tables and draw the picture."""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from study.cells import bare_scores, end_with_parent, log, prepare, scores, spared_layers
from study.picture import draw
from study.plan import planned_trainings
from study.report import comparisons, markdown, page_with
from study.score_file import ScoreFile

SCORES = Path(__file__).with_name("scores.jsonl")
FIGURES = Path(__file__).with_name("updates.json")
PAGE = Path(__file__).parent.parent / "docs" / "study.md"
PICTURE = PAGE.parent / "images" / "study.png"


def main() -> None:
    """Run the parts of the study that the file of scores lacks, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="folder for all files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="adapters in parallel")
    parser.add_argument("--report", action="store_true", help="write the report only")
    options = parser.parse_args()
    score_file = ScoreFile(SCORES)
    if not options.report:
        run_missing(score_file, options.folder.resolve(), options.jobs)
    write_report(score_file)


def run_missing(score_file: ScoreFile, folder: Path, jobs: int) -> None:
    """Train and score what the file of scores lacks, `jobs` adapters in parallel."""
    os.environ.update(TQDM_DISABLE="1", OMP_WAIT_POLICY="PASSIVE")
    prepared = prepare(folder)
    FIGURES.write_text(json.dumps(prepared.updates, indent=1) + "\n")
    for score in bare_scores(prepared, score_file):
        log(f"bare, {score.task}: {score.points:.1f} % right on {score.scored_on}")
        score_file.append(score)
    spared = spared_layers(prepared)
    log(f"spared layers: {spared}")
    known = frozenset(score.key for score in score_file)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=end_with_parent) as pool:
        running = {
            pool.submit(scores, planned, prepared, known): planned
            for planned in planned_trainings(spared)
        }
        for done, future in enumerate(as_completed(running), start=1):
            for score in future.result():
                score_file.append(score)
            log(f"{done} of {len(running)} adapters")


def write_report(score_file: ScoreFile) -> None:
    """Write the tables into the page of the study, print them, and draw the picture."""
    updates = json.loads(FIGURES.read_text())
    PAGE.write_text(page_with(PAGE.read_text(), tuple(score_file), updates))
    found = list(comparisons(tuple(score_file)))
    Console().print(Markdown("\n\n".join(map(markdown, found))))
    print(f"\n{PAGE}\n{draw(found, PICTURE) if found else 'no picture yet'}")


if __name__ == "__main__":
    main()
