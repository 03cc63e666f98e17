"""A base version shows up: verify every byte, fingerprint it, make it ready."""

from prefect import flow

from tasks import ingestion
from trans_peft.domain.base import BaseVersion, Upload


@flow(name="ingest-base", flow_run_name="ingest {uri}")
def ingest_base(uri: str) -> BaseVersion:
    """Make the upload under `uri` (files and a manifest) a ready base version."""
    return ingestion.ingest_base(Upload(uri))
