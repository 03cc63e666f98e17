"""Tasks of an experiment: find missing cells, run each as a flow run on a GPU, write the report.

Scores are files below `RESULTS_URI/scores`, one for each cell, so that any worker can run any cell.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from io import BytesIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.futures import wait
from pydantic import TypeAdapter

from tasks.composition import platform
from tasks.origin import inherited_tags
from tasks.progress import training_progress, work_progress
from tasks.retries import RETRIES
from trans_peft.artifacts import child_uri, read_file
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import Deployment, artifact_key
from trans_peft.domain.experiment import Experiment, PlannedTraining
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import InvalidSpecError, TrainingError
from trans_peft.experiment.analyses import FamilyAnalysis, analyse_families, are_complete
from trans_peft.experiment.cells import Score, bare_scores, is_complete, keys, scores
from trans_peft.experiment.disk import check_disk, disk
from trans_peft.experiment.prepare import Prepared, pinned, prepare
from trans_peft.experiment.report import MARK
from trans_peft.experiment.run import report_on, with_selected_rates
from trans_peft.lifecycle.resolve import find_base

__all__ = ["Cell", "find_missing", "publish_report", "run_cells", "score_cell"]

_POLL_S = 10.0
_SCORES = TypeAdapter(tuple[Score, ...])


class Cell(NamedTuple):
    """A flow run of an experiment: one training with its scores, or all bare bases (None).

    `key` is a hash of all that the scores depend on.
    """

    key: str
    training: PlannedTraining | None


@task(**RETRIES, task_run_name="missing cells of {experiment.name}")
def find_missing(experiment: Experiment, results_uri: str) -> tuple[Cell, ...]:
    """Return the cells without scores: those of the selection, or all others after it."""
    prepared = prepare(experiment, _find, platform())
    known = frozenset(score.key for score in _stored(results_uri))
    chosen = with_selected_rates(prepared, _stored(results_uri))
    wanted = chosen.experiment.selection_trainings() or chosen.experiment.trainings()
    missing: list[PlannedTraining | None] = [
        planned for planned in wanted if not is_complete(planned, chosen, known)
    ]
    if not (keys(prepared, ()) <= known and _are_analyzed(chosen, results_uri)):
        missing.append(None)
    return tuple(Cell(_cell_key(chosen, planned), planned) for planned in missing)


def run_cells(
    experiment: Experiment, cells: Sequence[Cell], results_uri: str, *, is_quick: bool
) -> tuple[str, ...]:
    """Run each cell as a flow run of its own, wait for all, and return what failed."""
    futures = [
        _run_cell.with_options(task_run_name=str(cell.training or "bare bases")).submit(
            experiment, cell, results_uri, is_quick=is_quick
        )
        for cell in cells
    ]
    wait(futures)
    return tuple(
        f"{cell.training or 'bare bases'}: {future.state.message}"
        for cell, future in zip(cells, futures, strict=True)
        if not future.state.is_completed()
    )


@task(**RETRIES)
def _run_cell(experiment: Experiment, cell: Cell, results_uri: str, *, is_quick: bool) -> None:
    """Start the flow run of a cell, or find the active one, and wait until it has ended.

    Prefect returns the same run for an idempotency key for ever. If that run has ended, its scores
    are missing, and the next key starts a new run.
    """
    for attempt in count():
        run = cast(  # `run_deployment` returns a coroutine in asynchronous code only
            FlowRun,
            run_deployment(
                Deployment.EXPERIMENT_CELL,
                parameters={
                    "experiment": experiment,
                    "results_uri": results_uri,
                    "training": cell.training,
                    "is_quick": is_quick,
                },
                idempotency_key=f"{content_sha256([cell.key, results_uri])}:{attempt}",
                tags=[f"experiment:{experiment.name}", *inherited_tags()],
                timeout=0,
            ),
        )
        if run.state is None or not run.state.is_final():
            break
    with get_client(sync_client=True) as client:
        while run.state is None or not run.state.is_final():
            time.sleep(_POLL_S)
            run = client.read_flow_run(run.id)
    if not run.state.is_completed():
        raise TrainingError(f"flow run {run.name}: {run.state.name} {run.state.message or ''}")


@task(**RETRIES)
def score_cell(
    experiment: Experiment,
    training: PlannedTraining | None,
    results_uri: str,
    *,
    is_quick: bool,
) -> int:
    """Train and score one cell on this worker, store its scores, and return their number."""
    prepared = pinned(experiment, _find, platform())
    if training is None:
        return _score_bases(prepared, results_uri, is_quick=is_quick)
    check_disk(disk([training], prepared, platform()), platform().work_dir)
    found = scores(
        training,
        prepared,
        platform(),
        (),
        on_event=training_progress(str(training)),
        on_progress=work_progress(),
        is_quick=is_quick,
    )
    return _store(found, _cell_key(prepared, training), results_uri)


def _score_bases(prepared: Prepared, results_uri: str, *, is_quick: bool) -> int:
    """Score the bases without an adapter and analyse their families, each once."""
    stored = _stored(results_uri)
    known = frozenset(score.key for score in stored)
    found = bare_scores(
        prepared, platform(), known, on_progress=work_progress(), is_quick=is_quick
    )  # fmt: skip
    count = _store(found, _cell_key(prepared, None), results_uri)
    chosen = with_selected_rates(prepared, stored)
    if chosen.experiment.selection is None:
        known = frozenset(analysis.key for analysis in _analyses(results_uri))
        for analysis in analyse_families(
            chosen, platform(), known, on_progress=work_progress(), is_quick=is_quick
        ):
            uri = child_uri(results_uri, f"analyses/{analysis.key}.json")
            # pydantic writes null for NaN, which is a drift without such weights.
            content = json.dumps(asdict(analysis)).encode()
            platform().store.write(uri, BytesIO(content))
    return count


@task(**RETRIES, task_run_name="report of {experiment.name}")
def publish_report(experiment: Experiment, results_uri: str, *, is_quick: bool) -> str:
    """Write the report to the results, to MLflow and to a Markdown artifact. Return its text."""
    prepared = prepare(experiment, _find, platform())
    name = f"experiment {experiment.name}" + (f" ({MARK})" if is_quick else "")
    with TemporaryDirectory() as folder:
        root = Path(folder)
        report = report_on(
            prepared,
            platform(),
            _stored(results_uri),
            _analyses(results_uri),
            root,
            is_quick=is_quick,
        )
        with platform().runs.run(name, tags={"experiment": experiment.name}) as run:
            for path in report.files:
                place = path.relative_to(root)
                with path.open("rb") as file:
                    platform().store.write(child_uri(results_uri, place.as_posix()), file)
                run.file(path, "" if path.parent == root else place.parent.as_posix())
        text = report.markdown.read_text()
    # Prefect's page cannot show files of a bucket, so that images become links.
    linked = text.replace("![", "[").replace("](figures/", f"]({child_uri(results_uri, 'figures')}/")  # noqa: E501  # fmt: skip
    create_markdown_artifact(key=artifact_key("experiment", experiment.name), markdown=linked)
    get_run_logger().info("the report is at %s", results_uri)
    return linked


def _find(place: str) -> BaseVersion:
    """Return the base version at FAMILY/VERSION. A worker uses ingested bases only."""
    family, separator, version = place.partition("/")
    if not separator or "/" in version or ":" in place:
        raise InvalidSpecError(
            f"the flow cannot use the base {place!r}",
            expected="a base version of the catalog, as FAMILY/VERSION",
            do="ingest the base, and name its family and version; the command `trans-peft "
            "experiment` also takes folders, s3:// and hub:",
        )
    return find_base(family, version, platform())


def _stored(results_uri: str) -> tuple[Score, ...]:
    """Return all stored scores."""
    return tuple(
        score
        for content in _files(child_uri(results_uri, "scores"))
        for score in _SCORES.validate_json(content)
    )


def _analyses(results_uri: str) -> tuple[FamilyAnalysis, ...]:
    """Return all stored analyses."""
    contents = _files(child_uri(results_uri, "analyses"))
    return tuple(FamilyAnalysis(**json.loads(content)) for content in contents)


def _are_analyzed(chosen: Prepared, results_uri: str) -> bool:
    """Whether no analysis is missing. They need the selected rates, for theorem 1."""
    if chosen.experiment.selection is not None:
        return True
    return are_complete(chosen, {analysis.key for analysis in _analyses(results_uri)})


def _files(prefix: str) -> Iterator[bytes]:
    store = platform().store
    for file in store.list(prefix):
        if file.name.endswith(".json"):
            yield read_file(prefix, file, store)


def _store(found: Iterable[Score], key: str, results_uri: str) -> int:
    """Write the scores of a cell, if there are any, and return their number."""
    new = tuple(found)
    if new:
        uri = child_uri(results_uri, f"scores/{key}.json")
        platform().store.write(uri, BytesIO(_SCORES.dump_json(new)))
    return len(new)


def _cell_key(prepared: Prepared, training: PlannedTraining | None) -> str:
    """Return the hash of the keys of a cell's scores."""
    trainings = () if training is None else (training,)
    return content_sha256(sorted(keys(prepared, trainings)))
