"""The composition root: the one place of the flows that chooses which door leads where."""

from functools import cache

from tasks.settings import settings
from trans_peft.edges.mlflow_catalog import MlflowCatalog
from trans_peft.edges.mlflow_evaluations import MlflowEvaluations
from trans_peft.edges.mlflow_registry import MlflowRegistry
from trans_peft.edges.mlflow_runs import MlflowRunLog
from trans_peft.edges.stores import SchemeStore
from trans_peft.ports import Platform

__all__ = ["platform"]


@cache
def platform() -> Platform:
    """Return this process's platform: MLflow for everything registered, S3 or folders for files."""
    tracking_uri = settings().mlflow_tracking_uri
    return Platform(
        store=SchemeStore(),
        catalog=MlflowCatalog(tracking_uri),
        registry=MlflowRegistry(tracking_uri),
        evaluations=MlflowEvaluations(tracking_uri),
        runs=MlflowRunLog(tracking_uri),
        work_dir=settings().state_dir,
        cache_bytes=settings().cache_bytes,
    )
