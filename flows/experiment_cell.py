"""Flow `experiment-cell`: train and score one adapter of an experiment."""

from prefect import flow

from tasks import experiments
from tasks.limits import gpu_slots
from tasks.worker import check_worker
from trans_peft.domain.experiment import Experiment, PlannedTraining


@flow(name="experiment-cell")
def experiment_cell(
    experiment: Experiment,
    results_uri: str,
    training: PlannedTraining | None = None,
    is_quick: bool = False,
) -> int:
    """Train one adapter on a GPU and score it on its bases. The flow `experiment` starts this.

    Args:
        experiment: Experiment.
        results_uri: Prefix for the scores.
        training: Adapter to train. None: score the bases without an adapter.
        is_quick: Whether the scores are no results.
    """
    check_worker()
    with gpu_slots(1 if training is None else experiment.training.processes):
        return experiments.score_cell(experiment, training, results_uri, is_quick=is_quick)
