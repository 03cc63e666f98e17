"""Tasks that find and ingest base versions."""

from prefect import task

from tasks import events, lineage
from tasks.composition import platform
from tasks.limits import upload_lock
from tasks.origin import origin
from tasks.retries import RETRIES
from tasks.settings import settings
from trans_peft.bases.model_check import IMPORTS as MODEL_IMPORTS
from trans_peft.domain.base import BaseVersion, Upload
from trans_peft.errors import UploadError
from trans_peft.isolation import prepare
from trans_peft.lifecycle import bases

__all__ = ["find_pending", "ingest_base", "ingest_pending", "prepare_for_upload"]


def prepare_for_upload() -> None:
    """Start the process that will build the model of an upload, if one caused this run.

    It imports for three seconds, while the run reads the registry.
    """
    if (cause := origin()) is not None and cause.kind == "upload":
        prepare(MODEL_IMPORTS)


@task(**RETRIES)
def find_pending() -> tuple[Upload, ...]:
    """Return the uploads and registered versions that are not ready yet.

    If there are some, the process that will build their models starts meanwhile.
    """
    found = bases.pending(platform(), root_uri=settings().bases_uri)
    if found:
        prepare(MODEL_IMPORTS)
    return found


@task(**RETRIES, task_run_name="ingest {upload.uri}")
def ingest_base(upload: Upload) -> BaseVersion:
    """Verify, fingerprint and register one upload. Waits while another run ingests it."""
    with upload_lock(upload.uri):
        return _ingest(upload)


@task(**RETRIES, task_run_name="ingest {upload.uri}")
def ingest_pending(upload: Upload) -> BaseVersion | None:
    """Ingest an upload that `find_pending` returned; None if another run ingests it, or has."""
    with upload_lock(upload.uri, wait=False) as held:
        if not held or upload not in bases.pending(platform(), root_uri=settings().bases_uri):
            return None
        return _ingest(upload)


def _ingest(upload: Upload) -> BaseVersion:
    try:
        base = bases.ingest(upload, platform())
    except UploadError as refusal:
        events.base_refused(str(upload), upload.uri, str(refusal))
        raise
    events.base_ready(base)
    lineage.base_ready(base.ref)
    return base
