"""What the bridge counts, for Prometheus. One registry for each bridge, none of the process."""

from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from infra.bridge.desk import Outcome

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600)
_TO_A_VERDICT = (5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)


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

    def answered(self, sender: str, kind: str, outcome: Outcome, seconds: float) -> None:
        """Count one hint that was answered after so many seconds."""
        self._hints.labels(sender, kind, outcome).inc()
        self._answer.labels(sender).observe(seconds)

    def run_exists(self, kind: str, happened: datetime | None) -> None:
        """Note how long ago the thing happened for which a run exists now."""
        if happened is not None:
            lag = (datetime.now(UTC) - happened).total_seconds()
            self._lag.labels(kind).observe(max(0.0, lag))  # two clocks may disagree

    def first_verdict(self, kind: str, lag_s: float) -> None:
        """Note how long after the thing happened the first verdict stood."""
        self._verdict.labels(kind).observe(max(0.0, lag_s))

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self._registry)
