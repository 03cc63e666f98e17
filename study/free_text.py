"""The study's task with free text: the first line of a docstring, from the rest of the function.

An answer has the degree chrF / 100. The updates were made before this task was added. So its
evaluation rows come from the files that other tasks hold out of every update, and its training rows
from files that no task uses for evaluation.
"""

import hashlib
from dataclasses import replace

from demo.functions import docstrings
from demo.sources import rank, source_files
from demo.tasks import EVALUATION_SHARE, Task, is_written, read_held_out, split, write
from study.cells import Prepared, log
from study.plan import DATA_SEED, TASKS
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite

__all__ = ["FREE_TEXT", "MAX_LENGTH", "with_free_text"]

FREE_TEXT = "docstrings"
MAX_LENGTH = 192
"""Tokens of a row. Five of the prompts have more than 127, which fills the study's `max_length`."""

_TASK = Task(FREE_TEXT, docstrings, train_per_label=3_200, evaluation_per_label=400)


def with_free_text(prepared: Prepared) -> Prepared:
    """Return the rows and bases with those of this task, which are written unless they exist."""
    folder = prepared.rows(FREE_TEXT)
    if not is_written(folder):
        log(f"{FREE_TEXT}: extracting")
        held_out = read_held_out(prepared.rows(name) for name in TASKS).files
        files = (
            file
            for file in source_files()
            if file.name in held_out or rank(file.name, DATA_SEED) >= EVALUATION_SHARE
        )
        write(split(_TASK, files, DATA_SEED), folder)
    sha256 = hashlib.sha256((folder / "eval.jsonl").read_bytes()).hexdigest()
    suite = Suite(
        name=FREE_TEXT,
        data=DataSource(f"{FREE_TEXT}/eval.jsonl", sha256),
        scoring="chrf",
        max_new_tokens=24,
        stop=("\n",),
    )
    return replace(prepared, suites={**prepared.suites, FREE_TEXT: suite})
