"""Which hint a run goes back to: two tags, which every run hands on to those that it starts.

    hint:DELIVERY            the delivery's id, as the bridge logged it
    hinted:KIND:TIME         what it told of, and when that happened (ISO 8601)

So events tell the hint that a verdict goes back to. The registry does not: what stands there is the
same whoever started the run.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from prefect import runtime

__all__ = ["Origin", "inherited_tags", "is_delivery_id", "is_plausible", "origin"]

_HINT, _HINTED = "hint:", "hinted:"
_DELIVERY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=-]{0,127}")
_KIND = re.compile(r"[a-z-]{1,20}")
_FIRST, _END = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def is_delivery_id(text: str) -> bool:
    """Whether the text can be the id of a delivery: it goes into keys, tags and logs."""
    return _DELIVERY_ID.fullmatch(text) is not None


def is_plausible(at: datetime) -> bool:
    """Whether a time has a time zone and lies between the years 2000 and 2099."""
    return at.utcoffset() is not None and _FIRST <= at < _END


@dataclass(frozen=True)
class Origin:
    """A hint: the id of its delivery, what kind it is, when it happened."""

    delivery_id: str
    kind: str
    at: datetime

    @property
    def tags(self) -> list[str]:
        """The tags of a run that was started for it."""
        return [f"{_HINT}{self.delivery_id}", f"{_HINTED}{self.kind}:{self.at.isoformat()}"]

    @property
    def payload(self) -> dict[str, str]:
        """What an event says of it."""
        return {"hint": self.delivery_id, "hint_kind": self.kind, "hint_at": self.at.isoformat()}

    @classmethod
    def of_tags(cls, tags: Iterable[str]) -> "Origin | None":
        """Return what the tags of a run say; None where it was not started for a hint."""
        found = {tag.partition(":")[0]: tag.partition(":")[2] for tag in sorted(tags)}
        kind, _, at = found.get("hinted", "").partition(":")
        return cls._of(found.get("hint"), kind, at)

    @classmethod
    def of_payload(cls, payload: Mapping[str, object]) -> "Origin | None":
        """Return what an event says; None where it goes back to no hint."""
        return cls._of(*(payload.get(name) for name in ("hint", "hint_kind", "hint_at")))

    @classmethod
    def _of(cls, delivery_id: object, kind: object, at: object) -> "Origin | None":
        """Return the hint if its fields are well formed: tags and payloads may be anybody's."""
        if not (isinstance(delivery_id, str) and isinstance(kind, str) and isinstance(at, str)):
            return None
        try:
            happened = datetime.fromisoformat(at)
        except ValueError:
            return None
        well_formed = is_delivery_id(delivery_id) and _KIND.fullmatch(kind)
        return cls(delivery_id, kind, happened) if well_formed and is_plausible(happened) else None


def origin() -> Origin | None:
    """Return the hint that the run at work goes back to."""
    return Origin.of_tags(runtime.flow_run.tags or ())


def inherited_tags() -> list[str]:
    """Return the tags for a run that the run at work starts."""
    found = origin()
    return found.tags if found else []
