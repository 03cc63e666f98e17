"""`EvaluationStore` in MLflow: one run for each evaluation, in `trans-peft/evaluations`.

The tag `evaluation_key` identifies the run, `evaluation.json` has the results of all items, and the
metric `score` is shown on MLflow's page.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from trans_peft.domain.evaluation import Evaluation, EvaluationSummary
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.edges.mlflow_client import Tracking
from trans_peft.errors import IntegrityError, NotFoundError

__all__ = ["MlflowEvaluations"]

_FILE = "evaluation.json"
_MAX_ITEMS = 50_000
"""Items of all evaluations that are kept in memory, about 30 MB. The oldest ones are removed."""


class MlflowEvaluations:
    """Evaluations by key in the MLflow server at `tracking_uri`.

    Those that were read last stay in memory: a shard reads the evaluation of the bare base for each
    adapter. One that was only written does not: another process may have written it first.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)
        self._kept: dict[str, Evaluation] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, the oldest that can be read, or None.

        A run whose file is missing or damaged does not count: the same key always has the same
        evaluation, so it is computed and stored again.
        """
        if (kept := self._kept.get(key)) is not None:
            return kept
        for run in self._tracking.finished_runs("evaluations", {"evaluation_key": key}):
            with suppress(NotFoundError, IntegrityError):
                text = self._tracking.read_text(run.artifact_uri, _FILE)
                evaluation: Evaluation = from_json(Evaluation, text, where=_FILE)
                if evaluation.key == key:
                    return self._keep(evaluation)
        return None

    def summary(self, key: str) -> EvaluationSummary | None:
        """Return score and duration of the oldest evaluation with that key, or None.

        One request: the file of the evaluation is not read.
        """
        runs = self._tracking.finished_runs("evaluations", {"evaluation_key": key}, limit=1)
        for run in runs:
            if {"score", "seconds"} <= run.metrics.keys():
                return EvaluationSummary(run.metrics["score"], run.metrics["seconds"])
        return None

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Keep an evaluation. Changes nothing where `get` returns one with the same key."""
        if self.get(evaluation.key) is not None:
            return
        tags = {
            **(labels or {}),
            "evaluation_key": evaluation.key,
            "suite": evaluation.suite,
            "weights_sha256": evaluation.weights_sha256,
            "base_fingerprint": evaluation.base_fingerprint_sha256,
        }
        with self._tracking.run("evaluations", evaluation.suite, tags) as run_id:
            self._tracking.write_text(run_id, _FILE, to_json(evaluation))
            self._tracking.log_metrics(
                run_id,
                {
                    "score": evaluation.score,
                    "items": len(evaluation.items),
                    "seconds": evaluation.seconds,
                },
                step=0,
                time_ms=int(time.time() * 1000),
            )

    def _keep(self, evaluation: Evaluation) -> Evaluation:
        with self._lock:  # a shard reads in several threads
            self._kept[evaluation.key] = evaluation
            while sum(len(one.items) for one in self._kept.values()) > _MAX_ITEMS:
                self._kept.pop(next(iter(self._kept)))
        return evaluation
