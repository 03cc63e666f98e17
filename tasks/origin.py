"""Which hint a run goes back to: two tags, which every run hands on to those that it starts.

    hint:DELIVERY            the delivery's id, as the bridge logged it
    hinted:KIND:TIME         what it told of, and when that happened (ISO 8601)

So events tell the hint that a verdict goes back to. The registry does not: what stands there is the
same whoever started the run.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from prefect import runtime

__all__ = ["Origin", "handed_on", "origin"]

_HINT, _HINTED = "hint:", "hinted:"


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
        try:
            happened = datetime.fromisoformat(str(at))
        except ValueError:  # somebody else's tags
            return None
        return cls(str(delivery_id), str(kind), happened) if delivery_id and kind else None


def origin() -> Origin | None:
    """Return the hint that the run at work goes back to."""
    return Origin.of_tags(runtime.flow_run.tags or ())


def handed_on() -> list[str]:
    """Return the tags for a run that the run at work starts."""
    found = origin()
    return found.tags if found else []
