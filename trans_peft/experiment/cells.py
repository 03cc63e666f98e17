"""Train and score the cells of an experiment, each once.

A cell is one adapter, or a bare base, on one base and one suite. Its key covers everything that the
result depends on. A training that was killed resumes from its last checkpoint.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from trans_peft.data import Example
from trans_peft.data.training_rows import read_training_rows
from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import BARE, Evaluation
from trans_peft.domain.experiment import PlannedTraining
from trans_peft.domain.names import quoted
from trans_peft.domain.numbers import is_finite_number
from trans_peft.domain.recipe import Perturbation, TrainingRecipe
from trans_peft.errors import EvaluationError, InvalidSpecError
from trans_peft.experiment.prepare import Prepared
from trans_peft.lifecycle.base_files import base_folder
from trans_peft.lifecycle.evaluation import BARE_BASE, EvaluationSubject, evaluate_on
from trans_peft.lifecycle.progress import ProgressCallback
from trans_peft.lifecycle.train import job_on, remove_checkpoints, stored_checkpoints
from trans_peft.models import release_base
from trans_peft.ports import Platform
from trans_peft.training.checkpoint_store import continued
from trans_peft.training.events import Event
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.launch import fit

__all__ = [
    "HELD_OUT",
    "Score",
    "adapter_on_disk",
    "answer_loss",
    "bare_scores",
    "is_complete",
    "keys",
    "scores",
    "selected",
]

HELD_OUT = "held-out training rows"
"""The suite of a score that is the loss on held-out training rows."""


@dataclass(frozen=True)
class Score:
    """The results of one adapter, or of a bare base, on one base and one suite.

    InvalidSpecError for other characters in `right`, and for numbers that are not finite.

    Attributes:
        key: hash of all inputs.
        family: name of the family of bases.
        method: name of the method; `BARE` for a bare base.
        perturbation: the fields of the perturbation.
        seed: the seed.
        data_seed: seed of the order of rows, if it differs from `seed`.
        trained_on: label of the base that the adapter was trained on.
        scored_on: label of the base.
        suite: name of the suite, or `HELD_OUT`.
        right: one character per item, in the order of the suite: "1" for a right answer.
        loss: with `HELD_OUT`, the loss in nats per answer token; None otherwise.
        gpu_seconds: duration of the training loop, times its processes, over all attempts.
        score_seconds: duration of the evaluation.
        is_quick: whether the score was computed with `--quick` and is no result.
        steps: optimizer steps, if they are not those of the experiment.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    key: str
    family: str
    method: str
    perturbation: dict[str, Any]
    seed: int
    data_seed: int | None
    trained_on: str
    scored_on: str
    suite: str
    right: str = ""
    loss: float | None = None
    gpu_seconds: float = 0.0
    score_seconds: float = 0.0
    is_quick: bool = False
    steps: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.loss or 0.0, self.gpu_seconds, self.score_seconds)
        if {*self.right} - {"0", "1"} or not all(map(is_finite_number, numbers)):
            raise InvalidSpecError(
                f"the score of {self.suite} has invalid values",
                expected="answers that are 0 or 1, and finite numbers",
                found=f"{quoted(self.right)}, {numbers}",
            )

    @property
    def cell(self) -> tuple[object, ...]:
        """What was scored, by names."""
        trained = (self.family, self.trained_on, self.method, self.arm, self.seed, self.data_seed)
        return (*trained, self.steps, self.scored_on, self.suite)

    @property
    def arm(self) -> Perturbation:
        """The perturbation."""
        given = self.perturbation
        return Perturbation(**{**given, "spared_layers": tuple(given["spared_layers"])})

    @property
    def points(self) -> float:
        """Share of right answers, in percent."""
        return 100 * self.right.count("1") / len(self.right)


def is_complete(planned: PlannedTraining, prepared: Prepared, known: Container[str]) -> bool:
    """Whether all scores of a training are known."""
    return all(key in known for _, _, key in _cells(planned, prepared))


def keys(prepared: Prepared, trainings: Sequence[PlannedTraining]) -> frozenset[str]:
    """Return the keys of all scores of these trainings; without trainings, of the bare bases."""
    if trainings:
        return frozenset(key for each in trainings for _, _, key in _cells(each, prepared))
    return frozenset(
        prepared.key(BARE, base, suite)
        for (family, _), base in prepared.bases.items()
        for suite in prepared.experiment.suites_of(family)
    )


def bare_scores(
    prepared: Prepared,
    platform: Platform,
    known: Container[str],
    *,
    on_progress: ProgressCallback | None = None,
    is_quick: bool = False,
) -> Iterator[Score]:
    """Yield the missing scores of bases without an adapter."""
    for (family, label), base in prepared.bases.items():
        for suite in prepared.experiment.suites_of(family):
            key = prepared.key(BARE, base, suite)
            if key not in known:
                try:
                    (found,) = evaluate_on(
                        base, [suite], platform, BARE_BASE, on_progress=on_progress
                    ).values()
                except EvaluationError as error:
                    raise EvaluationError(
                        f"{family}/{label}, without an adapter: {error}"
                    ) from error
                yield Score(
                    key, family, BARE, asdict(Perturbation()), 0, None, label, label, suite.name,
                    right=_marks(found), score_seconds=round(found.seconds, 1), is_quick=is_quick,
                )  # fmt: skip


def scores(  # noqa: PLR0913  two callbacks, as in `lifecycle.train`
    planned: PlannedTraining,
    prepared: Prepared,
    platform: Platform,
    known: Container[str],
    *,
    on_event: Callable[[Event], None],
    on_progress: ProgressCallback | None = None,
    is_quick: bool = False,
) -> Iterator[Score]:
    """Train one adapter and yield its missing scores. Does nothing if none is missing.

    Raises TrainingError, OutOfMemoryError, DataError, InvalidSpecError or NotFoundError.
    """
    missing = [cell for cell in _cells(planned, prepared) if cell[2] not in known]
    if not missing:
        return
    result = _trained(planned, prepared, platform, on_event)
    unscored = Score(
        "", planned.family, planned.method, asdict(planned.perturbation), planned.seed,
        planned.data_seed, planned.base, "", "", gpu_seconds=round(result.device_seconds, 3),
        is_quick=is_quick, steps=planned.steps,
    )  # fmt: skip
    subject = EvaluationSubject(str(planned), result.weights_sha256, lambda: result.folder)
    for label, suite, key in missing:
        base = prepared.bases[planned.family, label]
        score = replace(unscored, key=key, scored_on=label, suite=suite)
        if suite == HELD_OUT:
            yield replace(score, loss=_held_out_loss(planned, prepared, base, result, platform))
            continue
        suites = prepared.experiment.suites_of(planned.family)
        (pinned,) = (found for found in suites if found.name == suite)
        (found,) = evaluate_on(base, [pinned], platform, subject, on_progress=on_progress).values()
        yield replace(score, right=_marks(found), score_seconds=round(found.seconds, 1))


def selected(prepared: Prepared, found: Iterable[Score]) -> Perturbation | None:
    """Return the candidate with the lowest held-out loss on the new base.

    None if a candidate has no score yet.
    """
    chosen = prepared.experiment.selection
    assert chosen is not None
    losses = {score.key: score for score in found if score.suite == HELD_OUT}
    by_candidate = {}
    for planned in prepared.experiment.selection_trainings():
        for label, _, key in _cells(planned, prepared):
            if label == chosen.new:
                if key not in losses:
                    return None
                by_candidate[planned.perturbation] = losses[key].loss or 0.0
    return min(by_candidate, key=lambda candidate: by_candidate[candidate])


def _cells(planned: PlannedTraining, prepared: Prepared) -> list[tuple[str, str, str]]:
    """Return (label of the base, name of the suite, key) of each score of a training."""
    recipe_sha256 = prepared.recipe(planned).sha256
    suites = prepared.experiment.suites_of(planned.family)
    scored = [HELD_OUT] if planned.held_out else list(suites)
    return [
        (
            label,
            suite if isinstance(suite, str) else suite.name,
            prepared.key(recipe_sha256, prepared.bases[planned.family, label], suite),
        )
        for label in planned.scored_on
        for suite in scored
    ]


def _trained(
    planned: PlannedTraining,
    prepared: Prepared,
    platform: Platform,
    on_event: Callable[[Event], None],
) -> TrainingResult:
    job = _job(planned, prepared, platform)
    checkpoints = stored_checkpoints(job, platform)
    release_base()  # that of the last evaluation
    result = fit(job, on_event=continued(job, checkpoints, on_event))
    remove_checkpoints(checkpoints)
    return result


def adapter_on_disk(
    planned: PlannedTraining, prepared: Prepared, platform: Platform
) -> Path | None:
    """Return the folder of a training's adapter; None if it is not on this machine."""
    job = _job(planned, prepared, platform)
    return job.adapter_folder if job.result_file.is_file() else None


def _job(planned: PlannedTraining, prepared: Prepared, platform: Platform) -> TrainingJob:
    base, recipe = prepared.base(planned), prepared.recipe(planned)
    job = job_on(base, recipe, read_training_rows(recipe, platform.store), platform)
    # Its place may change, and its content may not.
    return replace(job, base_name=base.fingerprint_sha256)


def _held_out_loss(
    planned: PlannedTraining,
    prepared: Prepared,
    base: BaseVersion,
    result: TrainingResult,
    platform: Platform,
) -> float:
    """Return the adapter's loss on the held-out rows on a base, in nats per answer token."""
    recipe = prepared.recipe(planned)
    rows = read_training_rows(recipe, platform.store).validation
    folder = base_folder(base, platform)
    return answer_loss(folder, result.folder, rows, recipe)


def answer_loss(
    base: Path, adapter: Path, rows: tuple[Example, ...], recipe: TrainingRecipe
) -> float:
    """Return the mean loss of the answers of rows, in nats per token, cut as in training."""
    from trans_peft.models import load_base
    from trans_peft.text.chat import template_of
    from trans_peft.text.saved_template import saved_template
    from trans_peft.training.job_rows import token_rows
    from trans_peft.transfer.load_adapter import attached
    from trans_peft.validation.engine import LoopEngine

    loaded = load_base(base, "float32" if recipe.dtype == "float32" else "bfloat16")
    template = saved_template(adapter) or template_of(loaded.tokenizer)
    texts = []
    for row in token_rows(rows, loaded.tokenizer, template):
        ids = row["input_ids"][: recipe.optimizer.max_length]
        start = row["completion_mask"].index(1)
        if len(ids) > start:  # with `train_on_prompt`, a prompt may fill the length
            texts.append((ids[:start], ids[start:]))
    with attached(loaded.model, adapter) as model:
        found = LoopEngine(model, loaded.tokenizer).scores(texts)
    losses = [-token.log_p for text in found for token in text]
    return sum(losses) / len(losses)


def _marks(found: Evaluation) -> str:
    return "".join("1" if item.correct else "0" for item in found.items)
