"""The notification that caused a run, stored in two tags of the run.

    notification:DELIVERY    id of the delivery, as in the bridge's log
    notified:KIND:TIME       kind and time (ISO 8601) of the change that was reported

A run passes these tags to the runs that it starts, and its events contain the same fields. Events
therefore link a verdict to a notification. The registry does not store them, because its content
does not depend on what started a run.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect import runtime

__all__ = ["Origin", "inherited_tags", "is_delivery_id", "is_plausible", "origin"]

_DELIVERY_TAG, _CHANGE_TAG = "notification", "notified"
_FIELDS = ("notification", "notification_kind", "notification_at")
_DELIVERY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=-]{0,127}")
_KIND = re.compile(r"[a-z-]{1,20}")
_FIRST, _END = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def is_delivery_id(text: str) -> bool:
    """Whether the text is a valid delivery id: it becomes part of keys, tags and logs."""
    return _DELIVERY_ID.fullmatch(text) is not None


def is_plausible(at: datetime) -> bool:
    """Whether a time has a time zone and lies between the years 2000 and 2099."""
    return at.utcoffset() is not None and _FIRST <= at < _END


@dataclass(frozen=True)
class Origin:
    """A notification.

    Attributes:
        delivery_id: id of its delivery.
        kind: kind of the change that it reported.
        at: time of that change.
    """

    delivery_id: str
    kind: str
    at: datetime

    @property
    def tags(self) -> list[str]:
        """Tags of a run that the notification caused."""
        return [
            f"{_DELIVERY_TAG}:{self.delivery_id}",
            f"{_CHANGE_TAG}:{self.kind}:{self.at.isoformat()}",
        ]

    @property
    def payload(self) -> dict[str, str]:
        """Fields of an event that the notification caused."""
        values = (self.delivery_id, self.kind, self.at.isoformat())
        return dict(zip(_FIELDS, values, strict=True))

    @classmethod
    def of_tags(cls, tags: Iterable[str]) -> "Origin | None":
        """Parse the tags of a run; None if no notification caused it."""
        found = {tag.partition(":")[0]: tag.partition(":")[2] for tag in sorted(tags)}
        kind, _, at = found.get(_CHANGE_TAG, "").partition(":")
        return cls._of(found.get(_DELIVERY_TAG), kind, at)

    @classmethod
    def of_payload(cls, payload: Mapping[str, object]) -> "Origin | None":
        """Parse the payload of an event; None if no notification caused it."""
        return cls._of(*(payload.get(name) for name in _FIELDS))

    @classmethod
    def _of(cls, delivery_id: object, kind: object, at: object) -> "Origin | None":
        """Return the notification if its fields are valid: any client can write tags and events."""
        if not (isinstance(delivery_id, str) and isinstance(kind, str) and isinstance(at, str)):
            return None
        try:
            happened = datetime.fromisoformat(at)
        except ValueError:
            return None
        well_formed = is_delivery_id(delivery_id) and _KIND.fullmatch(kind)
        return cls(delivery_id, kind, happened) if well_formed and is_plausible(happened) else None


def origin() -> Origin | None:
    """Return the notification that caused the current run."""
    return Origin.of_tags(runtime.flow_run.tags or ())


def inherited_tags() -> list[str]:
    """Return the tags for a run that the current run starts."""
    found = origin()
    return found.tags if found else []
