"""Recover adapters of the study after an update, without labels: `python -m study.distillation`.

For each task, update and seed it trains a plain adapter and one under Trans-PEFT on v1, and a plain
adapter on the new base; carries the first two over directly; and compensates and distills them with
prompts from each source. study/distilled.jsonl has one line for each score, with the seconds that
it cost after the update. The seconds for writing prompts, before the update, are in the log.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from study.cells import Prepared, end_with_parent, log, log_steps, prepare, score_of, spared_layers
from study.distillation_report import (
    PAGE,
    PICTURE,
    README,
    draw,
    figures,
    page_with,
    readme_with,
    recoveries,
)
from study.free_text import FREE_TEXT, MAX_LENGTH, with_free_text
from study.plan import STEPS, V1, PlannedTraining, arms
from study.score_file import Score, ScoreFile
from trans_peft.analysis.updates import public_rows
from trans_peft.bases.drift import weight_pairs
from trans_peft.data import Example, parse_examples, read_prompts, write_examples
from trans_peft.data.overlap import distinct_from
from trans_peft.data.rows import NO_ANSWER
from trans_peft.domain.data import DataSource
from trans_peft.domain.identity import ADDED_LATER, content_sha256
from trans_peft.domain.privacy import PrivacySettings
from trans_peft.domain.recipe import SyntheticPrompts
from trans_peft.domain.recovery import DistillationPolicy
from trans_peft.edges.file_store import FileStore
from trans_peft.errors import DataError
from trans_peft.lifecycle.recovery.compensation import answering_inputs
from trans_peft.lifecycle.synthetic_prompts import kept_prompts, write_synthetic_prompts
from trans_peft.models import adapter_weights_sha256
from trans_peft.training.distill import Distillation
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.launch import fit as train
from trans_peft.transfer.compensation import compensate

SCORES = Path(__file__).with_name("distilled.jsonl")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results.json"
POLICY = DistillationPolicy()
CELLS = (("exceptions", "ffn"), ("signatures", "all"), ("exceptions", "all"), ("signatures", "ffn"))
"""Tasks and updates. The policy's defaults were chosen in the last one, with seed 1."""
FREE_TEXT_CELLS = ((FREE_TEXT, "ffn"), (FREE_TEXT, "all"))
"""Run with the first seed, after the other tasks."""
SEEDS = (1, 2, 3)
APPROVED = (20, 5)
"""Numbers of approved prompts after which v1 writes others."""
PROMPT_MODEL_STEPS = 60


@dataclass(frozen=True)
class Source:
    """A source of prompts: its name, and how they are written before the update, if they are.

    With `epsilon`, the prompt model has differential privacy, and `private_rows` are the rows of
    one of its steps.
    """

    name: str
    approved: int = 0
    steps: int = 0
    epsilon: float = field(default=0.0, metadata=ADDED_LATER)
    private_rows: int = field(default=0, metadata=ADDED_LATER)


UNLABELED, OTHER_TASK, GENERIC = (
    Source(name) for name in ("unlabeled", "other task", "generic text")
)
WRITTEN = (
    *(Source(f"written after {n}", approved=n) for n in APPROVED),
    Source("prompt model", steps=PROMPT_MODEL_STEPS),
    Source("prompt model with epsilon 8", steps=PROMPT_MODEL_STEPS, epsilon=8.0, private_rows=256),
)
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")
RANKS = (16, 64)
"""Ranks of the compensation. The first is the policy's default."""


@dataclass(frozen=True)
class Part:
    """Arms that are recovered with the same strategies and prompts. A rank of 0 distills."""

    arm: str
    ranks: Sequence[int]
    sources: Sequence[Source]


PARTS = (
    Part("plain", (0, RANKS[0]), (UNLABELED,)),
    Part("plain", RANKS[:1], (OTHER_TASK,)),
    Part("plain", RANKS[:1], WRITTEN),
    Part("plain", RANKS[:1], (GENERIC,)),
    Part("spared", (0, RANKS[0]), (UNLABELED,)),
    Part("plain", RANKS[1:], (UNLABELED,)),
    Part("plain", (0,), WRITTEN),
)
"""In the order in which they run."""


def prompts(prepared: Prepared, job: TrainingJob, source: Source) -> Sequence[Example]:
    """Return the prompts of a source for the adapter of a training job.

    Unlabeled prompts are no training or evaluation rows, as recent traffic is none.
    """
    task = job.recipe.adapter
    rows, store = prepared.rows(task), FileStore()
    items = [row.prompt_text() for row in _rows(prepared, task, "eval.jsonl")]
    if source == GENERIC:
        return sentences(public_rows())
    if source == OTHER_TASK:
        rows = prepared.rows(next(name for name in prepared.suites if name != task))
    if source in (UNLABELED, OTHER_TASK):
        traffic = read_prompts(DataSource(str(rows / "prompts.jsonl")), store).prompts
        return distinct_from(traffic, items, text=Example.prompt_text, limit=POLICY.prompts)
    folder = job.work_dir / f"prompts-{content_sha256([source, POLICY.prompts])[:8]}"
    examples = _rows(prepared, task, "train.jsonl")
    approved = write_examples(examples[: source.approved], folder / "approved.jsonl")
    settings = SyntheticPrompts(
        approved=DataSource(str(approved)) if source.approved else None,
        steps=source.steps,
        count=POLICY.prompts,
        privacy=PrivacySettings(source.epsilon, batch_size=source.private_rows)
        if source.epsilon
        else None,
    )
    suite = replace(prepared.suites[task], data=DataSource(str(rows / "eval.jsonl")))
    recipe = replace(job.recipe, suites=(suite,), synthetic_prompts=settings)
    started_s = time.monotonic()
    write_synthetic_prompts(
        replace(job, recipe=recipe, work_dir=folder), examples, store, on_event=lambda event: None
    )
    found = kept_prompts(folder).prompts
    log(f"{task}, {source.name}: {len(found)} prompts, {time.monotonic() - started_s:.0f} s")
    return found


def sentences(texts: Sequence[Example]) -> Sequence[Example]:
    """Return the sentences of texts that have at least 30 characters, as prompts."""
    found = (
        part.strip() for row in texts for part in _SENTENCE_END.split(row.prompt + row.completion)
    )
    return [
        Example(f"sentence-{number}", text, NO_ANSWER)
        for number, text in enumerate(dict.fromkeys(found))
        if len(text) >= 30
    ]


def scores(
    prepared: Prepared, planned: PlannedTraining, update: str, part: Part, known: ScoreFile
) -> Iterator[Score]:
    """Yield the scores of one arm of a cell that the score file lacks."""
    job, trained = trained_on_its_base(prepared, planned)
    yield from missing_scores(prepared, planned, (V1, update), trained, known)
    if planned.arm == "plain":
        anew = replace(planned, base=update)
        yield from missing_scores(
            prepared, anew, (update,), trained_on_its_base(prepared, anew)[1], known
        )
    for source in part.sources:
        for rank in part.ranks:
            strategy = f"compensated {rank}" if rank else "distilled"
            arm = replace(planned, arm=f"{planned.arm}, {strategy}, {source.name}")
            if (*_cell(arm), update) in {score.cell for score in known}:
                continue
            try:
                made = prompts(prepared, job, source)
                result = (
                    compensated(prepared, arm, trained, update, rank, made)
                    if rank
                    else _distilled(prepared, arm, job, trained, update, made)
                )
            except DataError as error:  # too few prompts
                log(f"{arm}: {error}")
                continue
            yield from missing_scores(prepared, arm, (update,), result, known)


def compensated(
    prepared: Prepared,
    planned: PlannedTraining,
    trained: TrainingResult,
    update: str,
    rank: int,
    made: Sequence[Example],
) -> TrainingResult:
    """Return the compensated adapter; its seconds are those of the answers and of the products."""
    folder = prepared.folder / "compensated" / content_sha256([planned, update])[:16]
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    started_s = time.monotonic()
    inputs, answered = answering_inputs(
        trained.folder, prepared.base(V1), prepared.suites[planned.task], made
    )
    weights = weight_pairs(prepared.base(V1), prepared.base(update))
    found = compensate(trained.folder, weights, inputs, rank, folder)
    seconds = time.monotonic() - started_s
    log(f"{planned}: {answered} of {len(made)} prompts, {found}")
    weights_sha256 = adapter_weights_sha256(folder)
    return replace(trained, folder=folder, weights_sha256=weights_sha256, seconds=seconds)


def _distilled(
    prepared: Prepared,
    planned: PlannedTraining,
    job: TrainingJob,
    trained: TrainingResult,
    update: str,
    made: Sequence[Example],
) -> TrainingResult:
    """Return the result of a distillation; its seconds include the teacher's."""
    folder = prepared.folder / "distilled" / content_sha256([planned, update])[:16]
    found = Distillation(
        adapter=trained.folder,
        old_base=prepared.base(V1),
        job=replace(
            job,
            base_folder=prepared.base(update),
            base_revision=prepared.fingerprints[update],
            work_dir=folder,
        ),
        suite=prepared.suites[planned.task],
        policy=POLICY,
    ).run(made, folder)
    log(f"{planned}: {len(made)} prompts, {found.change}, {found.teacher_s:.0f} s for the answers")
    return replace(found.training, seconds=found.teacher_s + found.training.seconds)


def missing_scores(
    prepared: Prepared,
    planned: PlannedTraining,
    bases: Sequence[str],
    result: TrainingResult,
    known: ScoreFile,
) -> Iterator[Score]:
    """Yield the scores of an adapter on these bases that the score file lacks."""
    for base in bases:
        key = prepared.key(result.weights_sha256, planned.task, base)
        if key not in known:
            yield score_of(prepared, planned, base, key, result)


def _cell(planned: PlannedTraining) -> tuple[str, str, int, int, str]:
    return (planned.task, planned.arm, planned.steps, planned.seed, planned.base)


def trained_on_its_base(
    prepared: Prepared, planned: PlannedTraining
) -> tuple[TrainingJob, TrainingResult]:
    """Train an adapter in float32, which is faster than bfloat16 on most processors."""
    job = prepared.job(planned)
    job = replace(job, recipe=replace(job.recipe, dtype="float32"))
    if planned.task == FREE_TEXT:
        optimizer = replace(job.recipe.optimizer, max_length=MAX_LENGTH)
        job = replace(job, recipe=replace(job.recipe, optimizer=optimizer))
    job = replace(job, work_dir=prepared.folder / "adapters" / job.identity()[:16])

    return job, train(job, on_event=log_steps(planned))


def _cells() -> list[tuple[str, str, int]]:
    """Return the tasks, updates and seeds in the order in which they run."""
    first, *_ = SEEDS
    return [
        *((task, update, seed) for seed in SEEDS for task, update in CELLS),
        *((task, update, first) for task, update in FREE_TEXT_CELLS),
    ]


def _rows(prepared: Prepared, task: str, name: str) -> Sequence[Example]:
    return parse_examples((prepared.rows(task) / name).read_bytes(), name)


def main() -> None:
    """Run what the score file lacks, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m study.distillation", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="folder for all files")
    parser.add_argument("--cells", type=int, default=len(_cells()), help="cells to run")
    parser.add_argument("--parts", type=int, default=len(PARTS), help="parts of each cell to run")
    parser.add_argument("--report", action="store_true", help="write the report only")
    options = parser.parse_args()
    known = ScoreFile(SCORES)
    if not options.report:
        run_missing(known, options.folder.resolve(), options.cells, PARTS[: options.parts])
    write_report(known)


def run_missing(known: ScoreFile, folder: Path, cells: int, parts: Sequence[Part]) -> None:
    """Run what the score file lacks, the first cells only."""
    os.environ.update(TQDM_DISABLE="1", OMP_WAIT_POLICY="PASSIVE")
    end_with_parent()
    planned = _cells()[:cells]
    prepared = prepare(folder, sorted({update for _, update, _ in planned}))
    if any(task == FREE_TEXT for task, *_ in planned):
        prepared = with_free_text(prepared)
    named = arms(spared_layers(prepared))
    for part in parts:
        for task, update, seed in planned:
            training = PlannedTraining(task, part.arm, named[part.arm], STEPS[0], seed)
            for score in scores(prepared, training, update, part, known):
                known.append(score)
                log(
                    f"{score.task}, {score.arm}, seed {seed}, on {score.scored_on}: "
                    f"{score.points:.1f}, {score.train_seconds:.0f} s"
                )


def write_report(known: ScoreFile) -> None:
    """Write the tables of README.md and docs/survival.md, the picture, and results.json."""
    found = list(recoveries(tuple(known)))
    README.write_text(readme_with(README.read_text(), found))
    PAGE.write_text(page_with(PAGE.read_text(), found))
    results = json.loads(RESULTS.read_text()) | figures(found)
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(f"{PAGE}\n{draw(found, PICTURE) if found else 'no picture yet'}")


if __name__ == "__main__":
    main()
