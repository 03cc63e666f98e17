"""The command `experiment`: the tables and figures of the paper for your own bases and data."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trans_peft.cli.files import read_experiment
from trans_peft.cli.options import Json, State
from trans_peft.cli.show import ProgressDisplay, print_json, progress
from trans_peft.cli.show import out as stdout
from trans_peft.cli.workspace import LOCAL, Workspace
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.experiment import Experiment
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.places import HUB
from trans_peft.errors import DataError, NotFoundError, StoreError
from trans_peft.files import check_writable

__all__ = ["experiment"]


def experiment(
    file: Annotated[Path, Parameter(help="Experiment, as a YAML or JSON file.")],
    /,
    *,
    out: Annotated[Path, Parameter(name="--out", help="Folder of the results, new or to resume.")],
    quick: Annotated[
        bool, Parameter(negative=(), help="Few rows, items and steps, to try the file. No result.")
    ] = False,
    dry_run: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Print the plan, its cost and its differences from the paper. Runs nothing, and "
            "downloads no base.",
        ),
    ] = False,
    mlflow: Annotated[
        bool, Parameter(negative=(), help="Log the report to the server at MLFLOW_TRACKING_URI.")
    ] = False,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Compare Trans-PEFT with direct transfer and re-tuning on versions of a base.

    Trains and scores what the folder of results lacks, then writes `report.md` and `report.html`
    with the tables and figures of the paper. To resume a command that was killed, run it again.

    Example: `trans-peft experiment examples/experiments/commonsense.yaml --out runs/paper --dry-run`

    Example: `trans-peft experiment my.yaml --out runs/mine --quick`
    """  # noqa: E501
    from trans_peft.experiment.analyses import FamilyAnalysis
    from trans_peft.experiment.cells import Score
    from trans_peft.experiment.prepare import prepare
    from trans_peft.experiment.report import MARK
    from trans_peft.experiment.run import report_on, run
    from trans_peft.experiment.score_file import ScoreFile

    wanted = read_experiment(file)
    if quick:
        wanted = wanted.as_quick()
        out = out / MARK.replace(" ", "-")
    check_writable(out)
    with progress() as shown, nullcontext() if dry_run else _locked(out):
        found = ScoreFile(out / "scores.jsonl", Score)
        analyses = ScoreFile(out / "analyses.jsonl", FamilyAnalysis)
        workspace = Workspace.at(state, shown)
        if dry_run:
            return _print_plan(wanted, workspace, found, json=json)
        prepared = prepare(wanted, _finder(workspace, download=True), workspace.platform)
        try:
            run(prepared, workspace.platform, found, analyses, _watch(shown), is_quick=quick)
        finally:  # what was scored before an error is reported as well
            report = report_on(prepared, workspace.platform, found, analyses, out, is_quick=quick)
    if mlflow:
        from trans_peft.client import connect

        name = f"experiment {wanted.name}" + (f" ({MARK})" if quick else "")
        with connect(work_dir=state).runs.run(name, tags={"experiment": wanted.name}) as logged:
            for path in report.files:
                logged.file(
                    path, "" if path.parent == out else path.parent.relative_to(out).as_posix()
                )
    if json:
        print_json({"report": report.page, "files": report.files, "scores": len(list(found))})
    else:
        stdout.print(f"the report was written to {report.page}")
    return 0


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder of results. StoreError if another command writes to it."""
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"another command writes to {out}",
            expected="one command at a time for a folder of results",
            do="wait until it has ended, or pass another folder as --out",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _finder(workspace: Workspace, *, download: bool) -> Any:
    """Return a function that verifies the base at a place. InternLM2 bases are converted."""
    from trans_peft.bases.converters import convert, needs_conversion
    from trans_peft.edges.model_hub import model_folder

    def find(uri: str) -> BaseVersion:
        folder = str(model_folder(uri, download=download)) if uri.startswith(HUB) else uri
        store = workspace.platform.store
        if needs_conversion(folder, store):
            files = [(file.name, file.size, file.etag) for file in store.list(folder)]
            name = content_sha256([folder, files])
            converted = workspace.platform.work_dir / "converted" / name
            if not converted.exists():
                if not download:
                    raise NotFoundError(f"{uri} has not been converted on this machine")
                convert(folder, store, converted)
            folder = str(converted)
        return workspace.base(folder, LOCAL)

    return find


def _watch(shown: ProgressDisplay) -> Any:
    from trans_peft.experiment.run import Watch
    from trans_peft.lifecycle.progress import WorkProgress
    from trans_peft.training.events import Event, TrainingMetrics

    def on_event(event: Event) -> None:
        if isinstance(event, TrainingMetrics):
            shown.update("training", event.step, event.total_steps, f"steps  {event.summary}")

    def on_progress(reached: WorkProgress) -> None:
        note = f"{reached.summary}  {reached.description}"
        shown.update("evaluation", reached.done, reached.total, note)

    def on_trainings(reached: WorkProgress) -> None:
        left = "" if not reached.eta_s else f", {reached.eta_s / 3600:.1f} h left"
        shown.update(reached.description, reached.done, reached.total, f"{reached.unit}{left}")

    return Watch(on_trainings, on_event, on_progress)


def _print_plan(wanted: Experiment, workspace: Workspace, found: Any, *, json: bool) -> int:
    from trans_peft.experiment.disk import check_disk
    from trans_peft.experiment.outline import outline
    from trans_peft.experiment.prepare import (
        check_families,
        check_layers,
        check_settings,
        pinned,
        with_leakage,
    )
    from trans_peft.experiment.run import with_selected_rates

    check_settings(wanted)

    find, notes, invalid = _finder(workspace, download=False), [], None
    bases = {}
    for name, family in wanted.families.items():
        for label in family.labels:
            try:
                bases[name, label] = find(family.uri(label))
            except NotFoundError as error:
                notes.append(f"families.{name}.{label}: {error}")
    check_families(bases, workspace.platform)
    check_layers(wanted, bases, workspace.platform)
    prepared = None
    if not notes:
        try:
            prepared = with_leakage(pinned(wanted, find, workspace.platform), workspace.platform)
            prepared = with_selected_rates(prepared, found)
        except NotFoundError as error:
            notes.append(str(error))
        except DataError as error:  # raised when the plan is printed
            invalid = error
    plan = outline(
        wanted if prepared is None else prepared.experiment,
        prepared, workspace.platform, tuple(found), notes,
    )  # fmt: skip
    if json:
        print_json({**asdict(plan), "missing": plan.missing})
    else:
        for row in plan.rows:
            state = {True: "reused", False: "new", None: "unknown"}[row.is_known]
            stdout.print(f"{state:8} {row.training} -> {', '.join(row.training.scored_on)}")
        stdout.print(f"{len(plan.rows)} trainings, {plan.missing} to run")
        hours = "unknown" if plan.gpu_hours is None else f"{plan.gpu_hours:,.1f}"
        stdout.print(f"GPU hours: {hours}")
        if plan.disk is None:
            stdout.print("disk: unknown")
        else:
            stdout.print(
                f"disk: {plan.disk.needed / 1e9:.1f} GB of {plan.disk.free / 1e9:.1f} GB free"
            )
        for title, lines in (
            ("differences from the paper", plan.deviations),
            ("notes", plan.notes),
        ):
            if lines:
                stdout.print(f"{title}:")
            for line in lines:
                stdout.print(f"  - {line}")
    if plan.disk is not None:
        check_disk(plan.disk, workspace.platform.work_dir)
    if invalid is not None:
        raise invalid
    return 0
