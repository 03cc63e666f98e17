"""The commands `train`, `evaluate` and `adopt`: one adapter on one base."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trans_peft.cli.files import check_results_folder, read_recipe, read_suites, write_json
from trans_peft.cli.options import Adapter, BaseUri, Json, Out, State, SuiteFiles
from trans_peft.cli.show import evaluation_table, print_json, progress
from trans_peft.cli.show import out as stdout
from trans_peft.cli.workspace import LOCAL, Workspace, adapter_name
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import Evaluation, Suite
from trans_peft.errors import InvalidSpecError

__all__ = ["adopt", "evaluate", "train"]


def train(
    recipe: Annotated[Path, Parameter(help="Training recipe, as a JSON or YAML file.")],
    /,
    *,
    base: BaseUri,
    out: Out,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Train an adapter by a recipe, and evaluate it on the base that it was trained on.

    Writes `adapter/` (a stock PEFT folder), `evaluations/` (the result of each item),
    `training.json` (the metrics of each step) and `record.json`. To resume a command that was
    killed, run it again: it continues from the last checkpoint.

    Example: `trans-peft train recipe.yaml --base models/v1 --out runs/mine`
    """
    from trans_peft.lifecycle.train import train as train_on
    from trans_peft.training import events

    check_results_folder(out)
    wanted = read_recipe(recipe)
    steps: list[events.TrainingMetrics] = []
    with progress() as shown:
        workspace = Workspace.at(state, shown)
        version_name = workspace.base(base, wanted.family).version
        wanted = replace(wanted, base_version=version_name)

        def on_event(event: events.Event) -> None:
            if isinstance(event, events.TrainingMetrics):
                steps.append(event)
                what, note = f"training {wanted.adapter}", f"steps  {event.summary}"
                shown.update(what, event.step, event.total_steps, note)
            elif isinstance(event, events.TrainingStarted | events.ValidationMetrics):
                shown.print_line(str(event))

        version = train_on(wanted, workspace.platform, on_event=on_event, on_progress=shown.work)
        write_json(out / "training.json", steps)
        evaluations = _write_version(version, workspace, out)
    _print_version(version, evaluations, out, json=json)
    return 0


def evaluate(
    adapter: Annotated[
        str | None, Parameter(help="PEFT folder of the adapter: a path or an `s3://` prefix.")
    ] = None,
    /,
    *,
    base: BaseUri,
    suite: SuiteFiles,
    bare: Annotated[
        bool, Parameter(negative=(), help="Evaluate the base without an adapter.")
    ] = False,
    out: Annotated[
        Path | None, Parameter(help="Folder for the results of each item, one file per suite.")
    ] = None,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Evaluate an adapter on a base, or the bare base, with one or more suites.

    Example: `trans-peft evaluate runs/mine/adapter --base models/v1 --suite suite.yaml`

    Example: `trans-peft evaluate --bare --base models/v2 --suite suite.yaml --json`
    """
    from trans_peft.lifecycle.evaluation import (
        BARE_BASE,
        EvaluationSubject,
        evaluate_on,
        pin_suites,
    )
    from trans_peft.lifecycle.preflight import check_suites
    from trans_peft.models import adapter_weights_sha256
    from trans_peft.text.saved_template import saved_template

    if bare == (adapter is not None):
        raise InvalidSpecError(
            "the command does not say what to evaluate", expected="either an adapter or --bare"
        )
    suites = read_suites(suite)
    with progress() as shown:
        workspace = Workspace.at(state, shown)
        folder = workspace.adapter(adapter) if adapter is not None else None
        on, pinned = workspace.base(base, LOCAL), pin_suites(suites, workspace.platform)
        template = None if folder is None else saved_template(folder)
        check_suites(on, pinned, workspace.platform, template=template)
        subject = BARE_BASE
        if adapter is not None and folder is not None:
            weights_sha256 = adapter_weights_sha256(folder)
            subject = EvaluationSubject(adapter_name(adapter), weights_sha256, lambda: folder)
        found = evaluate_on(on, pinned, workspace.platform, subject, on_progress=shown.work)
    if out is not None:
        _write_evaluations(found.values(), out)
    if json:
        print_json([_summary(evaluation) for evaluation in found.values()])
    else:
        stdout.print(evaluation_table(found.values()))
    return 0


def adopt(
    adapter: Adapter,
    /,
    *,
    base: BaseUri,
    suite: SuiteFiles,
    out: Out,
    name: Annotated[
        str | None, Parameter(help="Name of the adapter. The default is the folder's name.")
    ] = None,
    json: Json = False,
    state: State = Path(".trans-peft"),
) -> int:
    """Check and evaluate an adapter that was trained elsewhere, and bind it to its base.

    Checks that the adapter fits the base and changes its logits. Writes `adapter/` (bound to this
    base), `evaluations/` and `record.json`. Exit code 2 if the adapter does not fit.

    Example: `trans-peft adopt downloads/lora --base models/v1 --suite suite.yaml --out runs/lora`
    """
    from trans_peft.lifecycle.adopt import adopt as adopt_on

    check_results_folder(out)
    suites = read_suites(suite)
    with progress() as shown:
        workspace = Workspace.at(state, shown)
        folder = workspace.adapter(adapter)
        trained_on = workspace.base(base, LOCAL)
        version = adopt_on(
            name or adapter_name(adapter),
            str(folder),
            LOCAL,
            suites,
            workspace.platform,
            base_version=trained_on.version,
            on_progress=shown.work,
        )
        evaluations = _write_version(version, workspace, out)
    _print_version(version, evaluations, out, json=json)
    return 0


def _write_version(version: AdapterVersion, workspace: Workspace, out: Path) -> list[Evaluation]:
    """Write a registered version, its evaluations and its record. Return the evaluations."""
    found = [_evaluation(version, suite, workspace) for suite in version.suites]
    evaluations = [evaluation for evaluation in found if evaluation is not None]
    workspace.platform.registry.download(version, out / "adapter")
    _write_evaluations(evaluations, out / "evaluations")
    write_json(out / "record.json", version)
    return evaluations


def _evaluation(version: AdapterVersion, suite: Suite, workspace: Workspace) -> Evaluation | None:
    return workspace.platform.evaluations.get(
        suite.evaluation_key(version.weights_sha256, version.base.fingerprint_sha256)
    )


def _print_version(
    version: AdapterVersion, evaluations: list[Evaluation], out: Path, *, json: bool
) -> None:
    if json:
        print_json(
            {
                "adapter": out / "adapter",
                "record": version,
                "evaluations": [_summary(evaluation) for evaluation in evaluations],
            }
        )
    else:
        stdout.print(evaluation_table(evaluations))
        stdout.print(f"the adapter {version.adapter} was written to {out / 'adapter'}")


def _write_evaluations(evaluations: Iterable[Evaluation], folder: Path) -> None:
    for evaluation in evaluations:
        write_json(folder / f"{evaluation.suite}.json", evaluation)


def _summary(evaluation: Evaluation) -> dict[str, object]:
    return {
        "suite": evaluation.suite,
        "items": len(evaluation.items),
        "score": evaluation.score,
        "key": evaluation.key,
        "weights_sha256": evaluation.weights_sha256,
        "base_fingerprint_sha256": evaluation.base_fingerprint_sha256,
    }
