"""Creates, updates and tests webhooks of MLflow's model registry.

MLflow does not return the secret of a webhook, so each update writes it. MLflow's server caches
webhooks for 60 s (`MLFLOW_WEBHOOK_CACHE_TTL`). During this time a new webhook may miss events, and
the server may still sign with the old secret.
"""

from dataclasses import dataclass, field

from trans_peft.edges.mlflow_client import Tracking
from trans_peft.edges.mlflow_search import all_pages

__all__ = ["Webhook", "ensure_webhook", "send_test_event"]


@dataclass(frozen=True)
class Webhook:
    """One webhook.

    Attributes:
        name: name that identifies the webhook.
        url: where MLflow sends the events.
        events: events to send, such as `model_version.created`.
        secret: secret with which MLflow signs.
    """

    name: str
    url: str
    events: tuple[str, ...]
    secret: str = field(repr=False)


def ensure_webhook(tracking_uri: str, wanted: Webhook) -> str:
    """Create or update the webhook and return its id. Deletes others with its name or URL.

    StoreError; InvalidSpecError if MLflow refuses the URL (MLFLOW_WEBHOOK_ALLOWED_SCHEMES).
    """
    client = Tracking(tracking_uri).client
    settings = {
        "name": wanted.name,
        "url": wanted.url,
        "events": list(wanted.events),
        "secret": wanted.secret,
        "status": "ACTIVE",
    }
    found = [
        hook.webhook_id
        for hook in all_pages(lambda token: client.list_webhooks(page_token=token))
        if wanted.name == hook.name or wanted.url == hook.url
    ]
    for surplus in found[1:]:
        client.delete_webhook(surplus)
    if found:
        return str(client.update_webhook(found[0], **settings).webhook_id)
    return str(client.create_webhook(**settings).webhook_id)


def send_test_event(tracking_uri: str, webhook_id: str, event: str) -> str:
    """Let MLflow send an example of the event; return the problem, empty if there is none."""
    result = Tracking(tracking_uri).client.test_webhook(webhook_id, event)
    if result.success:
        return ""
    answer = f"status {result.response_status}" if result.response_status else result.error_message
    return f"the test event of MLflow's webhook failed: {answer}"
