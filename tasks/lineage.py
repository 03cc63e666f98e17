"""Lineage of adapter versions as Prefect assets.

    asset             key                           depends on
    base version      mlflow://FAMILY/FINGERPRINT
    adapter version   mlflow://ADAPTER/NUMBER       its base version and its source version

FINGERPRINT has 12 digits. The metadata of an adapter version has the verdict by which it was made.
Prefect Cloud shows assets as a graph, the open-source server as events. Like all events, they can
be lost, so no part of this project depends on them.
"""

from collections.abc import Mapping

from prefect.assets import Asset
from prefect.assets.core import AssetProperties
from prefect.context import AssetContext
from prefect.states import Completed

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseRef
from trans_peft.domain.outcome import TransferOutcome

__all__ = ["adapter_trained", "adapter_transferred", "base_ready"]


def base_ready(base: BaseRef) -> None:
    """A base version was verified and is ready for evaluation."""
    _emit(_base(base), {"fingerprint": base.fingerprint_sha256})


def adapter_trained(version: AdapterVersion) -> None:
    """An adapter version was trained on its base version, or adopted for it."""
    _emit(
        _adapter(version.adapter, version.number, version.base),
        {"weights_sha256": version.weights_sha256, "recipe_sha256": version.recipe_sha256},
        _base(version.base),
    )


def adapter_transferred(outcome: TransferOutcome) -> None:
    """An adapter was judged on a base version. Without a registered version there is no asset."""
    if outcome.new_number is None:
        return
    _emit(
        _adapter(outcome.adapter, outcome.new_number, outcome.base),
        {
            "verdict": outcome.verdict.value,
            "reason": outcome.judgment.reason,
            "made_by": outcome.strategy.value,
        },
        _base(outcome.base),
        _adapter(outcome.adapter, outcome.source_number),
    )


def _base(base: BaseRef) -> Asset:
    return Asset(
        key=f"mlflow://{base.family}/{base.fingerprint_sha256[:12]}",
        properties=AssetProperties(name=f"{base.family}/{base.version}"),
    )


def _adapter(name: str, number: int, base: BaseRef | None = None) -> Asset:
    """Return the asset of an adapter version. Without a base, it keeps its name."""
    title = None if base is None else AssetProperties(name=f"{name} {number} on {base.version}")
    return Asset(key=f"mlflow://{name}/{number}", properties=title)


def _emit(asset: Asset, metadata: Mapping[str, str], *depends_on: Asset) -> None:
    """Emit the events that a task of `prefect.materialize` emits when it has completed.

    Such a task must name its assets before it runs. The number of a version is known afterwards.
    """
    AssetContext(
        downstream_assets={asset},
        direct_asset_dependencies=set(depends_on),
        materialization_metadata={asset.key: dict(metadata)},
    ).emit_events(Completed())
