"""Flow `adopt-adapter`: register an adapter that was trained elsewhere."""

from prefect import flow

from tasks import training
from tasks.limits import gpu_slots
from tasks.worker import check_worker
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
    """Check a PEFT folder on its base, evaluate it there, and register it as a live adapter.

    Args:
        adapter: Name of the new adapter.
        folder_uri: PEFT folder, as a path or an `s3://` prefix that the worker may read.
        family: Base family that the adapter was trained on.
        suites: Evaluation suites by which the adapter is judged on each new base version.
        base_version: Base version that the adapter was trained on. None: the one that `revision` in
            adapter_config.json names.
    """
    check_worker()
    with gpu_slots():
        return training.adopt_adapter(adapter, folder_uri, family, suites, base_version)
