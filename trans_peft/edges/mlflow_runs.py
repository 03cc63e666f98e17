"""`RunLog` in MLflow: training runs in the experiment `trans-peft/training`.

Metrics are written immediately, so that MLflow's page shows them while the run is active. Metrics
of the machine (CPU, memory, disk, network) are added every few seconds, and those of NVIDIA GPUs
if the package nvidia-ml-py is installed.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trans_peft.domain.data import DataSource
from trans_peft.edges.mlflow_client import Tracking
from trans_peft.edges.mlflow_lineage import dataset_use

__all__ = ["MlflowRun", "MlflowRunLog"]


class MlflowRun:
    """One active run."""

    def __init__(self, run_id: str, tracking: Tracking) -> None:
        self.id = run_id
        self._tracking = tracking

    def params(self, values: Mapping[str, object]) -> None:
        """Record parameters; values are cut to the length that MLflow accepts."""
        self._tracking.log_params(self.id, values)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics at a step."""
        self._tracking.log_metrics(self.id, values, step=step, time_ms=int(time.time() * 1000))

    def dataset(self, name: str, data: DataSource) -> None:
        """Record the data that the run is trained on."""
        self._tracking.log_datasets(self.id, [dataset_use(name, data, "training")])

    def file(self, path: Path, folder: str = "") -> None:
        """Attach a file."""
        self._tracking.client.log_artifact(self.id, str(path), folder or None)


class MlflowRunLog:
    """Runs in the MLflow server at `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)

    @contextmanager
    def run(self, name: str, *, tags: Mapping[str, str]) -> Iterator[MlflowRun]:
        """Record one run, with metrics of the machine. It is failed if the block raises."""
        with self._tracking.run("training", name, tags) as run_id:
            machine = self._tracking.system_metrics(run_id)
            machine.start()
            try:
                yield MlflowRun(run_id, self._tracking)
            finally:
                machine.finish()
