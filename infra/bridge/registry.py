"""Looks up in MLflow which base family a notification concerns.

A payload contains the name of a model and what changed, not whether the model is a base or an
adapter, nor who changed it. Reconcile and users set the same aliases of adapters, and both cause
the same webhook. `MlflowRegistry` records what reconcile set; any other change is a user's.
"""

from infra.bridge.dispatcher import UnavailableError
from infra.bridge.notifications import Notification, NotificationKind
from trans_peft.domain.names import name_problem
from trans_peft.edges.mlflow_client import Tracking, own_tags
from trans_peft.edges.mlflow_registry import MlflowRegistry
from trans_peft.errors import NotFoundError

__all__ = ["MlflowFamilyLookup"]


class MlflowFamilyLookup:
    """Registered models of one MLflow server."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking = Tracking(tracking_uri)
        self._adapters = MlflowRegistry(tracking_uri)

    def family(self, notification: Notification) -> str | None:
        """Return the family that the notification concerns; None for none. UnavailableError."""
        try:
            tags = own_tags(self._tracking.client.get_registered_model(notification.name).tags)
            match tags.get("kind"):
                case "base" if notification.kind is not NotificationKind.APPROVAL:
                    return notification.name
                case "adapter" if self._is_users_change(notification):
                    family = tags.get("family")
                    return None if name_problem("family", family) else family
            return None
        except NotFoundError:  # the model was deleted meanwhile
            return None
        except Exception as error:  # also a response that cannot be read, such as a proxy's HTML
            raise UnavailableError.because("MLflow", error) from error

    def _is_users_change(self, notification: Notification) -> bool:
        """Whether a user requested a reconcile of an adapter, or changed its alias."""
        if notification.kind is NotificationKind.REQUESTED:
            return True
        if notification.kind is not NotificationKind.APPROVAL:
            return False
        return not self._adapters.owns_alias(notification.name, notification.alias)
