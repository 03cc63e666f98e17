"""Flow `experiment`: compare Trans-PEFT with direct transfer and re-tuning, on a base's updates."""

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from tasks import experiments
from trans_peft.domain.experiment import Experiment


@flow(
    name="experiment",
    flow_run_name="experiment {experiment.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # type: ignore[arg-type]
)
def experiment(experiment: Experiment, results_uri: str, is_quick: bool = False) -> State:
    """Run the cells of an experiment that have no scores, each on a GPU, and write the report.

    The trainings from which rates are selected come first. Cells with scores are not repeated: to
    resume, start the flow again.

    Args:
        experiment: Experiment. Its bases are base versions of the catalog, as FAMILY/VERSION.
        results_uri: Prefix for scores and the report, such as `s3://data/experiments/mine`.
        is_quick: Few rows, items and steps, to try the experiment. Its figures are no results.
    """
    wanted = experiment.as_quick() if is_quick else experiment
    failed: tuple[str, ...] = ()
    for _ in ("the selection", "all others"):
        cells = experiments.find_missing(wanted, results_uri)
        if cells and not failed:
            failed = experiments.run_cells(wanted, cells, results_uri, is_quick=is_quick)
    experiments.publish_report(wanted, results_uri, is_quick=is_quick)
    if failed:
        return Failed(message="\n".join([f"{len(failed)} cells failed", *failed]))
    return Completed(message=f"the report is at {results_uri}")
