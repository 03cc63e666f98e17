"""A webhook of MLflow's registry, kept as it should be.

MLflow tells everything about a webhook but its secret, so the secret is written each time. Its
server looks a webhook up once in 60 s (`MLFLOW_WEBHOOK_CACHE_TTL`): that long, a new one may miss
events, and the old secret may still be in use.
"""

from dataclasses import dataclass, field

from trans_peft.edges.mlflow_client import Tracking, all_pages

__all__ = ["Webhook", "keep", "send_test_delivery"]


@dataclass(frozen=True)
class Webhook:
    """Which events (`model_version.created`) go where, signed with what. Known by its name."""

    name: str
    url: str
    events: tuple[str, ...]
    secret: str = field(repr=False)


def keep(tracking_uri: str, wanted: Webhook) -> str:
    """Create or correct the webhook and return its id; others of its name or URL are deleted.

    StoreError, InvalidSpecError (MLflow refuses the URL: see MLFLOW_WEBHOOK_ALLOWED_SCHEMES).
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


def send_test_delivery(tracking_uri: str, webhook_id: str, event: str) -> str:
    """Let MLflow send its example of an event; return what went wrong, or nothing."""
    result = Tracking(tracking_uri).client.test_webhook(webhook_id, event)
    if result.success:
        return ""
    answer = f"status {result.response_status}" if result.response_status else result.error_message
    return f"MLflow's webhook was not answered as it should be: {answer}"
