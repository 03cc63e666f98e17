"""An adapter that exists already becomes a live one."""

from prefect import flow

from tasks import training
from tasks.limits import gpu_slot
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import Suite


@flow(name="adopt-adapter", flow_run_name="adopt {adapter}")
def adopt_adapter(
    adapter: str,
    folder_uri: str,
    family: str,
    suites: tuple[Suite, ...],
    base_version: str | None = None,
) -> AdapterVersion:
    """Check a PEFT folder on its base, evaluate it there, register it."""
    with gpu_slot():
        return training.adopt_adapter(adapter, folder_uri, family, suites, base_version)
