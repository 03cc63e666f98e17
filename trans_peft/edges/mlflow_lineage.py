"""Link a run of MLflow to a model and to data sets, so that MLflow's pages show them together."""

import json
import time
from collections.abc import Iterable, Mapping

from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Evaluation, Suite, flipped_items
from trans_peft.edges.mlflow_client import DatasetUse, Tracking

__all__ = ["dataset_use", "log_flipped_items", "log_scores"]

_TABLE = "flipped-items.json"
_MAX_DIGEST = 36  # characters, in MLflow


def dataset_use(name: str, data: DataSource, context: str) -> DatasetUse:
    """Return a pinned data source as MLflow's data set; `context` is "training" or "evaluation"."""
    kind = data.uri.partition(":")[0] if ":" in data.uri else "local"
    return DatasetUse(name, data.sha256[:_MAX_DIGEST], kind, json.dumps({"uri": data.uri}), context)


def log_scores(
    tracking: Tracking,
    run_id: str,
    model_id: str | None,
    suites: Iterable[Suite],
    figures: Mapping[str, Mapping[str, float]],
) -> None:
    """Record the figures of each suite as metrics of a model and of the suite's data set.

    `figures` are by suite name. MLflow's page of the model then shows them. `model_id` is None for
    versions without a logged model.
    """
    used = {
        suite.name: dataset_use(suite.name, suite.data, "evaluation")
        for suite in suites
        if suite.name in figures and suite.data.sha256
    }
    tracking.log_datasets(run_id, tuple(used.values()))
    for suite, values in figures.items():
        tracking.log_metrics(
            run_id,
            {f"{suite}/{name}": value for name, value in values.items()},
            step=0,
            time_ms=int(time.time() * 1000),
            model_id=model_id,
            dataset=used.get(suite),
        )


def log_flipped_items(
    tracking: Tracking, run_id: str, pairs: Iterable[tuple[Evaluation, Evaluation]]
) -> None:
    """Attach a table of the items whose results differ, from (old base, new base) evaluations.

    The table has answers only where the suite keeps them. Without such items, nothing is attached.
    """
    rows = [
        {
            "suite": old.suite,
            "item": before.id,
            "change": "lost" if before.correct > after.correct else "gained",
            "old answer": before.answer or "",
            "new answer": after.answer or "",
        }
        for old, new in pairs
        for before, after in flipped_items(old, new)
    ]
    if rows:
        tracking.log_table(run_id, rows, _TABLE)
