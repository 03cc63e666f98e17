"""Prometheus metrics of the bridge and of what Prefect does, in a registry of their own.

Prometheus keeps one time series for each combination of label values until the process ends. Every
label therefore has a closed set of values. A value outside of the set is counted as `other`.
"""

from collections.abc import Collection
from datetime import UTC, datetime
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from infra.bridge.dispatcher import DispatchOutcome
from infra.bridge.notifications import NotificationKind

__all__ = ["FailureSource", "Metrics"]

_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600)
_VERDICT_BUCKETS_S = (5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)
_SENDERS = frozenset({"mlflow", "s3", "sqs", "bridge"})
_KINDS = frozenset({*NotificationKind, "none"})
_OUTCOMES = frozenset(DispatchOutcome)


class FailureSource(StrEnum):
    """Operation in which the bridge handled an exception."""

    NOTIFICATION = "notification"  # dispatching one notification
    EVENTS = "events"  # reading Prefect's events
    EVENT = "event"  # processing one of these events
    QUEUE = "queue"  # reading the queue
    MESSAGE = "message"  # processing one of its messages
    STATE = "state"  # reading what waits and runs in Prefect


_FAILURE_SOURCES = frozenset(FailureSource)


class Metrics:
    """Notifications by sender, kind and outcome; times to the run and to the first verdict.

    `PrefectMonitor` sets the gauges, which are attributes.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._notifications = Counter(
            "trans_peft_notifications",
            "Notifications by sender (mlflow, s3, sqs, bridge), kind and outcome",
            ["sender", "kind", "outcome"],
            registry=self._registry,
        )
        self._failures = Counter(
            "trans_peft_bridge_failures",
            "Exceptions after which the bridge continued, by place "
            "(notification, events, event, queue, message, state)",
            ["place"],
            registry=self._registry,
        )
        self._answer = Histogram(
            "trans_peft_notification_answer_seconds",
            "Time from the arrival of a notification to its answer",
            ["sender"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._lag = Histogram(
            "trans_peft_notification_lag_seconds",
            "Time from the change, by the sender's clock, to a run that exists",
            ["kind"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._verdict = Histogram(
            "trans_peft_first_verdict_lag_seconds",
            "Time from the change, by the sender's clock, to the first verdict that it caused",
            ["kind"],
            buckets=_VERDICT_BUCKETS_S,
            registry=self._registry,
        )

        self.prefect_up = self._gauge("prefect_up", "1 if Prefect answered the last time")
        self.queue_runs = self._gauge(
            "queue_runs", "Flow runs that are due, by state (waiting, running)", "queue", "state"
        )
        self.queue_age = self._gauge(
            "queue_age_seconds", "Time for which the oldest due flow run has waited", "queue"
        )
        self.queue_poll_age = self._gauge(
            "queue_poll_age_seconds", "Time since a worker polled the queue", "queue"
        )
        self.shards = self._gauge("shards", "Shards, by state (waiting, running)", "state")
        self.workers = self._gauge("workers_online", "Workers of the pool that send heartbeats")
        self.reconcile_end = self._gauge(
            "reconcile_end_timestamp_seconds",
            "When reconcile last ended, by final state (completed, failed, crashed)",
            "state",
        )

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(f"trans_peft_{name}", description, labels, registry=self._registry)

    def answered(self, sender: str, kind: str, outcome: DispatchOutcome, seconds: float) -> None:
        """Count one notification that was answered after this many seconds."""
        sender = _known(sender, _SENDERS)
        self._notifications.labels(sender, _known(kind, _KINDS), _known(outcome, _OUTCOMES)).inc()
        self._answer.labels(sender).observe(seconds)

    def failed(self, source: FailureSource) -> None:
        """Count one exception after which the bridge continued."""
        self._failures.labels(_known(source, _FAILURE_SOURCES)).inc()

    def run_exists(self, kind: str, changed_at: datetime | None) -> None:
        """Observe the time from a change until now, when its run exists."""
        if changed_at is not None:
            lag_s = (datetime.now(UTC) - changed_at).total_seconds()
            self._lag.labels(_known(kind, _KINDS)).observe(max(0.0, lag_s))  # clocks differ

    def first_verdict(self, kind: str, lag_s: float) -> None:
        """Observe the time from a change to its first verdict."""
        self._verdict.labels(_known(kind, _KINDS)).observe(max(0.0, lag_s))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


def _known(value: str, values: Collection[str]) -> str:
    return value if value in values else "other"
