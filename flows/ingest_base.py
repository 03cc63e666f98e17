"""Flow `ingest-base`: verify an uploaded base version, fingerprint it and make it ready."""

from prefect import flow

from tasks import ingestion
from trans_peft.domain.base import BaseVersion, Upload


@flow(name="ingest-base", flow_run_name="ingest {uri}")
def ingest_base(uri: str) -> BaseVersion:
    """Verify an upload against its manifest and register it as a ready base version.

    Args:
        uri: Prefix of the upload: the files and `trans_peft_manifest.json`.
    """
    return ingestion.ingest_base(Upload(uri))
