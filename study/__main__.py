"""`python -m study`: run the experiments of the study, then write the tables of docs/study.md."""

import argparse
import json
import sys
from pathlib import Path

from study.cells import prepare
from study.pages import with_blocks
from study.plan import CANDIDATES, STUDY, results, scores
from trans_peft.cli import main as trans_peft
from trans_peft.experiment import figures, tables
from trans_peft.experiment.comparison import Scores

FOLDER = Path(__file__).parents[1] / ".study"
"""The folder of bases, rows and adapters, which the experiment files name."""

FIGURES = Path(__file__).with_name("updates.json")
PAGE = FOLDER.with_name("docs") / "study.md"


def main() -> None:
    """Make the bases and rows, run what the experiments lack, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--report", action="store_true", help="write the page only")
    if not parser.parse_args().report:
        FIGURES.write_text(json.dumps(prepare(FOLDER).updates, indent=1) + "\n")
        for experiment in (CANDIDATES, STUDY):
            file = Path(__file__).with_name(f"{experiment.name}.yaml")
            out, state = results(experiment), FOLDER / "state"
            code = trans_peft(
                ["experiment", str(file), "--out", str(out), "--state", str(state)]
            )  # fmt: skip
            if code:
                sys.exit(code)
    for task in STUDY.families:
        for update, picture in pictures(task).items():
            figures.transfer_figure(Scores.of(STUDY, task, scores(STUDY)), update, picture)
    PAGE.write_text(page_with(PAGE.read_text()))
    print(PAGE)


def pictures(task: str) -> dict[str, Path]:
    """Return the file of a task's picture for each update."""
    folder = PAGE.parent / "images"
    return {name: folder / f"study-{task}-{name}.svg" for name in STUDY.families[task].new}


def page_with(page: str) -> str:
    """Return the page with its blocks `updates`, `comparisons` and `candidates` replaced."""
    (task,) = CANDIDATES.families
    (update,) = CANDIDATES.families[task].new
    blocks = {
        "updates": _updates_table(),
        "candidates": tables.change_table(Scores.of(CANDIDATES, task, scores(CANDIDATES)), update),
        "comparisons": "\n\n".join(map(_comparisons, STUDY.families)),
    }
    return with_blocks(page, blocks)


def _comparisons(task: str) -> str:
    """Return the tables of a task, for each update."""
    found = Scores.of(STUDY, task, scores(STUDY))
    return "\n\n".join(
        f"### {task}, update `{update}`\n\n![scores on both bases](images/{picture.name})\n\n"
        f"{tables.change_table(found, update)}\n\n"
        f"At an equal score on the old base:\n\n{tables.equal_score_table(found, update)}"
        for update, picture in pictures(task).items()
    )


def _updates_table() -> str:
    """Return the table of the updates: the loss on held-out source code, and the drift."""
    columns = ["update", "held-out loss, nats per token", "attention", "FFN", "other weights"]
    rows = [
        [
            f"`{name}`",
            f"{found['held_out_loss_before']:.3f} -> {found['held_out_loss_after']:.3f}",
            *(f"{found[f'drift_{kind}_percent']:.2f} %" for kind in ("attention", "ffn", "other")),
        ]
        for name, found in json.loads(FIGURES.read_text()).items()
    ]
    return tables.table(columns, rows)


if __name__ == "__main__":
    main()
