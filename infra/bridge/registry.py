"""What a name in a hint is, asked of MLflow: a payload tells what was clicked, not what it means.

An alias on an adapter is set by reconcile, by verdict, or by a person, against it, and the two
webhooks are the same. `MlflowRegistry` remembers what reconcile set; anything else is a person's.
"""

from infra.bridge.dispatcher import UnavailableError
from infra.bridge.notifications import Notification, NotificationKind
from trans_peft.domain.names import name_problem
from trans_peft.edges.mlflow_client import Tracking, own_tags
from trans_peft.edges.mlflow_registry import MlflowRegistry
from trans_peft.errors import NotFoundError

__all__ = ["MlflowNames"]


class MlflowNames:
    """The registered models of one MLflow server."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)
        self._adapters = MlflowRegistry(tracking_uri)

    def family(self, notification: Notification) -> str | None:
        """Return the family that the hint is about; None if it means nothing. UnavailableError."""
        try:
            tags = own_tags(self._tracking.client.get_registered_model(notification.name).tags)
            match tags.get("kind"):
                case "base" if notification.kind is not NotificationKind.APPROVAL:
                    return notification.name
                case "adapter" if notification.kind is NotificationKind.ASKED or self._is_a_persons(
                    notification
                ):
                    family = tags.get("family")
                    return None if name_problem("family", family) else family
            return None
        except NotFoundError:  # deleted meanwhile
            return None
        except Exception as error:  # also an answer that cannot be read, such as a proxy's HTML
            raise UnavailableError(f"MLflow: {type(error).__name__}") from error

    def _is_a_persons(self, notification: Notification) -> bool:
        if notification.kind is not NotificationKind.APPROVAL:
            return False
        return not self._adapters.owns_alias(notification.name, notification.alias)
