"""Creates and updates MLflow's webhook for this bridge."""

from infra.bridge.settings import MLFLOW_PATH, BridgeSettings
from trans_peft.edges.mlflow_webhooks import Webhook, ensure_webhook, send_test_event
from trans_peft.errors import InvalidSpecError

__all__ = ["EVENTS", "ensure_bridge_webhook"]

_TEST_EVENT = "model_version_alias.created"  # the alias in MLflow's example is ignored here
EVENTS = (
    _TEST_EVENT,
    "model_version_alias.deleted",
    "model_version.created",
    "model_version_tag.set",
)


def ensure_bridge_webhook(settings: BridgeSettings) -> str:
    """Create or update the webhook, and return why its test event failed (empty: it succeeded).

    InvalidSpecError without a secret; StoreError if MLflow does not answer.
    """
    if not settings.mlflow_secrets:
        raise InvalidSpecError(
            "MLflow's webhook needs a secret",
            expected="BRIDGE_MLFLOW_SECRETS",
            found="not set",
            do="set it to the secrets of the bridge; MLflow gets the first one",
        )
    webhook = Webhook(
        name="trans-peft",
        url=f"{settings.public_url}{MLFLOW_PATH}",
        events=EVENTS,
        secret=settings.mlflow_secrets[0],
    )
    webhook_id = ensure_webhook(settings.tracking_uri, webhook)
    return send_test_event(settings.tracking_uri, webhook_id, _TEST_EVENT)
