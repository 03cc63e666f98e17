"""Prefect events of this project, for users' own automations.

    event                           resource                            labels to match
    trans-peft.base.ready           trans-peft.base.FAMILY.VERSION      family, version
    trans-peft.base.refused         trans-peft.upload.URI
    trans-peft.adapter.judged       trans-peft.adapter.NAME             family, base, verdict
    trans-peft.adapters.withdrawn   trans-peft.family.FAMILY
    trans-peft.fleet.promoted       trans-peft.family.FAMILY
    trans-peft.promotion.refused    trans-peft.family.FAMILY

Automations match labels, whose names start with `trans-peft.`. The payload repeats the labels and
adds further fields for templates. `notification`, `notification_kind` and `notification_at` name
the notification that caused the run.

A run sends an event after it has written the change. A process that dies in between never sends the
event, and two processes that write the same change both send it. No part of this project therefore
depends on an event. docs/promotion.md shows two automations.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prefect.events import emit_event

from tasks.origin import origin
from tasks.reporting import MAX_LISTED
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.conventions import EVENT_PREFIX, Event
from trans_peft.domain.fleet import AliasChange
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.errors import listed

__all__ = [
    "adapter_judged",
    "adapters_withdrawn",
    "base_ready",
    "base_refused",
    "fleet_promoted",
    "promotion_refused",
]


def base_ready(base: BaseVersion) -> None:
    """A base version was verified and is ready for evaluation."""
    _emit(
        Event.BASE_READY,
        f"base.{base.family}.{base.version}",
        labels={"family": base.family, "version": base.version},
        payload={"uri": base.uri, "fingerprint": base.fingerprint_sha256},
    )


def base_refused(upload: str, uri: str, why: str) -> None:
    """An upload, or a version that a user registered, cannot become a base version."""
    _emit(Event.BASE_REFUSED, f"upload.{uri}", payload={"upload": upload, "why": why})


def adapter_judged(outcome: TransferOutcome) -> None:
    """An adapter received its verdict on a base, or an attempt failed."""
    _emit(
        Event.ADAPTER_JUDGED,
        f"adapter.{outcome.adapter}",
        labels={
            "family": outcome.base.family,
            "base": outcome.base.version,
            "verdict": outcome.verdict.value,
        },
        payload={
            "adapter": outcome.adapter,
            "reason": outcome.judgment.reason,
            "version": outcome.new_number,
            "attempts": outcome.attempts,
        },
    )


def adapters_withdrawn(family: str, withdrawn: Sequence[AliasChange]) -> None:
    """Adapters lost the alias by which they served on a base, for instance by a new policy."""
    what = [f"{change.adapter} ({change.alias})" for change in withdrawn]
    _emit(
        Event.ADAPTERS_WITHDRAWN,
        f"family.{family}",
        payload={"family": family, "count": len(what), "adapters": listed(what, MAX_LISTED)},
    )


def fleet_promoted(family: str, base: str) -> None:
    """The fleet was moved to `base`, which serves from now on."""
    _emit(Event.FLEET_PROMOTED, f"family.{family}", payload={"family": family, "base": base})


def promotion_refused(family: str, why: str) -> None:
    """The promotion of a base was refused, for a reason that was not reported before."""
    _emit(Event.PROMOTION_REFUSED, f"family.{family}", payload={"family": family, "why": why})


def _emit(
    event: Event,
    resource: str,
    *,
    labels: Mapping[str, str] | None = None,
    payload: Mapping[str, Any],
) -> None:
    labels, cause = labels or {}, origin()
    names = {f"{EVENT_PREFIX}{name}": value for name, value in labels.items()}
    emit_event(
        event,
        resource={"prefect.resource.id": f"{EVENT_PREFIX}{resource}", **names},
        payload={**labels, **payload, **(cause.payload if cause else {})},
    )
