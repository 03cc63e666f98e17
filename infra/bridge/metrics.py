"""What the bridge counts, for Prometheus. One registry for each bridge, none of the process.

Each combination of label values is a time series that is kept until the process ends. So every
label has a closed set of values, whatever a webhook, an event or a message says: a value that is
not in the set is counted as `other`.
"""

from collections.abc import Collection
from datetime import UTC, datetime
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from infra.bridge.dispatcher import DispatchOutcome
from infra.bridge.notifications import NotificationKind

__all__ = ["Metrics", "Place"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600)
_TO_A_VERDICT = (5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)
_SENDERS = frozenset({"mlflow", "s3", "sqs", "bridge"})
_KINDS = frozenset({*NotificationKind, "none"})
_OUTCOMES = frozenset(DispatchOutcome)


class Place(StrEnum):
    """Where the bridge survived an exception."""

    HINT = "hint"  # while one hint was answered
    EVENTS = "events"  # while Prefect was asked for events
    EVENT = "event"  # in one of these events
    QUEUE = "queue"  # while the queue was asked for messages
    MESSAGE = "message"  # in one of these messages


_PLACES = frozenset(Place)


class Metrics:
    """Hints by sender, kind and outcome; how long it took to a run, and to the first verdict."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._hints = Counter(
            "trans_peft_hints",
            "Hints by sender (mlflow, s3, sqs, bridge), kind and outcome",
            ["sender", "kind", "outcome"],
            registry=self._registry,
        )
        self._failures = Counter(
            "trans_peft_bridge_failures",
            "Exceptions that the bridge survived, by place (hint, events, event, queue, message)",
            ["place"],
            registry=self._registry,
        )
        self._answer = Histogram(
            "trans_peft_hint_answer_seconds",
            "From the arrival of a hint to its answer",
            ["sender"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._lag = Histogram(
            "trans_peft_hint_lag_seconds",
            "From what happened, by the sender's clock, to a run that exists",
            ["kind"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._verdict = Histogram(
            "trans_peft_first_verdict_lag_seconds",
            "From what happened, by the sender's clock, to the first verdict that goes back to it",
            ["kind"],
            buckets=_TO_A_VERDICT,
            registry=self._registry,
        )

    def answered(self, sender: str, kind: str, outcome: DispatchOutcome, seconds: float) -> None:
        """Count one hint that was answered after so many seconds."""
        sender = _one_of(_SENDERS, sender)
        self._hints.labels(sender, _one_of(_KINDS, kind), _one_of(_OUTCOMES, outcome)).inc()
        self._answer.labels(sender).observe(seconds)

    def failed(self, place: Place) -> None:
        """Count one exception that the bridge survived."""
        self._failures.labels(_one_of(_PLACES, place)).inc()

    def run_exists(self, kind: str, happened: datetime | None) -> None:
        """Note how long ago the thing happened for which a run exists now."""
        if happened is not None:
            lag = (datetime.now(UTC) - happened).total_seconds()
            self._lag.labels(_one_of(_KINDS, kind)).observe(
                max(0.0, lag)
            )  # two clocks may disagree

    def first_verdict(self, kind: str, lag_s: float) -> None:
        """Note how long after the thing happened the first verdict stood."""
        self._verdict.labels(_one_of(_KINDS, kind)).observe(max(0.0, lag_s))

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry)


def _one_of(known: Collection[str], value: str) -> str:
    return value if value in known else "other"
