"""The platform of a worker process, built once from its settings."""

from functools import cache

from tasks import metrics
from tasks.settings import settings
from trans_peft.client import connect
from trans_peft.ports import Platform

__all__ = ["platform"]


@cache
def platform() -> Platform:
    """Return the platform of this process: MLflow, S3 and local folders, with metrics."""
    metrics.serve(settings().metrics_port)
    return metrics.counting(
        connect(
            settings().mlflow_tracking_uri,
            work_dir=settings().state_dir,
            cache_bytes=settings().cache_bytes,
            places=settings().places,
            may_lack=settings().may_lack,
            owners=settings().owners,
            checkpoints_uri=settings().checkpoints_uri,
            suites_uri=settings().suites_uri,
            vllm=settings().vllm,
        )
    )
