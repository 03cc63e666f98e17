"""Ingestion of base versions, one step at a time."""

from prefect import task

from tasks.composition import platform
from tasks.policy import RETRIES
from tasks.settings import settings
from trans_peft.domain.base import BaseVersion, Upload
from trans_peft.lifecycle import bases

__all__ = ["find_pending", "ingest_base"]


@task(**RETRIES)
def find_pending() -> tuple[Upload, ...]:
    """Find uploads and registered versions that are not ready yet."""
    return bases.pending(platform(), root_uri=settings().bases_uri)


@task(**RETRIES, task_run_name="ingest {upload.uri}")
def ingest_base(upload: Upload) -> BaseVersion:
    """Verify, fingerprint and register one upload."""
    return bases.ingest(upload, platform())
