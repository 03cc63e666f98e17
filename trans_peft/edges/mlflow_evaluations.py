"""`EvaluationStore` in MLflow: a run per evaluation, found by its key.

Experiment `trans-peft/evaluations`; the tag `evaluation_key` finds the run, the metric `score` is
for people, `evaluation.json` holds every item.
"""

import time
from collections.abc import Mapping

from trans_peft.domain.evaluation import Evaluation
from trans_peft.edges.json_codec import from_json, to_json
from trans_peft.edges.mlflow_client import Tracking
from trans_peft.errors import IntegrityError

__all__ = ["MlflowEvaluations"]

_FILE = "evaluation.json"


class MlflowEvaluations:
    """Evaluations by key in the MLflow server at `tracking_uri`."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)

    def get(self, key: str) -> Evaluation | None:
        """Return the evaluation with that key, or None. Of two, the older one. IntegrityError."""
        run_id = self._tracking.oldest_run("evaluations", {"evaluation_key": key})
        if run_id is None:
            return None
        text = self._tracking.read_text(run_id, _FILE)
        where = f"{_FILE} of run {run_id}"
        evaluation: Evaluation = from_json(Evaluation, text, where=where)
        if evaluation.key != key:
            raise IntegrityError(
                f"{where} holds another evaluation",
                expected=key,
                found=evaluation.key,
                do="delete the run in MLflow: the evaluation is made again",
            )
        return evaluation

    def put(self, evaluation: Evaluation, *, labels: Mapping[str, str] | None = None) -> None:
        """Keep an evaluation. The same key again changes nothing."""
        if self._tracking.oldest_run("evaluations", {"evaluation_key": evaluation.key}) is not None:
            return
        tags = {
            **(labels or {}),
            "evaluation_key": evaluation.key,
            "suite": evaluation.suite,
            "weights_sha256": evaluation.weights_sha256,
            "base_fingerprint": evaluation.base_fingerprint_sha256,
        }
        with self._tracking.run("evaluations", evaluation.suite, tags) as run_id:
            self._tracking.write_text(run_id, _FILE, to_json(Evaluation, evaluation))
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
