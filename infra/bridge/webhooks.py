"""MLflow's webhook for this bridge, created and kept right by code."""

from infra.bridge.settings import BridgeSettings
from trans_peft.edges.mlflow_webhooks import Webhook, keep, send_test_delivery
from trans_peft.errors import InvalidSpecError

__all__ = ["EVENTS", "ensure_bridge_webhook"]

_TRIAL = "model_version_alias.created"  # MLflow sends it with an alias that decides nothing
EVENTS = (
    _TRIAL,
    "model_version_alias.deleted",
    "model_version.created",
    "model_version_tag.set",
)


def ensure_bridge_webhook(settings: BridgeSettings) -> str:
    """Make MLflow's webhooks what they should be; return what speaks against it, empty if nothing.

    InvalidSpecError without a secret; StoreError where MLflow cannot be reached.
    """
    if not settings.mlflow_secrets:
        raise InvalidSpecError(
            "MLflow's webhook needs a secret.",
            expected="BRIDGE_MLFLOW_SECRETS",
            found="not set",
            do="set it to the words that the bridge has; the first one is given to MLflow",
        )
    wanted = Webhook(
        name="trans-peft",
        url=f"{settings.public_url}/hints/mlflow",
        events=EVENTS,
        secret=settings.mlflow_secrets[0],
    )
    kept = keep(settings.tracking_uri, wanted)
    return send_test_delivery(settings.tracking_uri, kept, _TRIAL)
