"""Events of a training process, written as one JSON line each to its stdout.

Other output of the process (stderr, prints of libraries) is its log and becomes `LogLine` events.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

__all__ = [
    "CheckpointSaved",
    "Event",
    "Failed",
    "Finished",
    "LogLine",
    "MemoryEstimated",
    "ProcessStarted",
    "TrainingMetrics",
    "TrainingStarted",
    "ValidationMetrics",
    "decode",
    "encode",
    "on_steps",
]


@dataclass(frozen=True)
class LogLine:
    """One line of the log of the training process."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class MemoryEstimated:
    """The estimated memory of a training step, in one process.

    Attributes:
        base_bytes: weights of the frozen base.
        adapter_bytes: weights of the adapter.
        optimizer_bytes: the optimizer's state, and copies of gradients.
        activation_bytes: activations, gradients and temporary tensors at the peak.
    """

    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())

    @property
    def peak(self) -> str:
        """The sum of all parts as text."""
        return f"{self.peak_bytes / (1 << 30):.2f} GiB"

    def __str__(self) -> str:
        parts = {
            "base": self.base_bytes,
            "adapter": self.adapter_bytes,
            "optimizer": self.optimizer_bytes,
            "activations": self.activation_bytes,
        }
        shown = ", ".join(f"{name} {size / (1 << 30):.2f}" for name, size in parts.items())
        return f"estimated memory {self.peak} ({shown})"


@dataclass(frozen=True)
class TrainingStarted:
    """The model is ready. Training starts after `step` (0, or the step of the checkpoint).

    `epochs` is how often the steps of the whole run use each row.
    """

    step: int
    total_steps: int
    trainable_parameters: int
    device: str
    processes: int
    epochs: float

    def __str__(self) -> str:
        start = f"resumes after step {self.step}" if self.step else "starts"
        return (
            f"training {start}: {self.total_steps} steps ({self.epochs:.3g} epochs), "
            f"{self.trainable_parameters:,} trainable parameters, {self.processes} process(es) on "
            f"{self.device}"
        )


@dataclass(frozen=True)
class TrainingMetrics:
    """Metrics after one optimizer step.

    Attributes:
        step: completed optimizer steps.
        total_steps: steps of the whole run.
        loss: mean over the answer tokens of this step, in nats.
        learning_rate: learning rate of this step.
        grad_norm: norm of the gradients before clipping.
        tokens_per_s: tokens without padding, over all processes, since training started or
            resumed.
        eta_s: estimated remaining seconds; None until a tenth of the steps are done.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    eta_s: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of this step, by the names under which MLflow stores them."""
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_s": self.tokens_per_s,
        }

    def __str__(self) -> str:
        return f"step {self.step}/{self.total_steps}  {self.summary}"

    @property
    def summary(self) -> str:
        """The metrics and the remaining time, as the log and the terminal show them."""
        left = "" if self.eta_s is None else f"  {self.eta_s:.0f} s left"
        return (
            f"loss {self.loss:.4f}  lr {self.learning_rate:.2e}  "
            f"{self.tokens_per_s:,.0f} tokens/s{left}"
        )


@dataclass(frozen=True)
class ValidationMetrics:
    """The loss on the validation rows after a step.

    Attributes:
        step: completed optimizer steps.
        loss: mean over the answer tokens of all validation rows, in nats.
        best_step: step with the lowest loss so far.
    """

    step: int
    loss: float
    best_step: int

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of this step, by the names under which MLflow stores them."""
        return {"validation_loss": self.loss}

    def __str__(self) -> str:
        lowest = "the lowest" if self.step == self.best_step else f"lowest after {self.best_step}"
        return f"step {self.step}: validation loss {self.loss:.4f}, {lowest}"


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete; training can resume from it."""

    step: int

    def __str__(self) -> str:
        return f"checkpoint after step {self.step}"


Event = (
    LogLine
    | MemoryEstimated
    | TrainingStarted
    | TrainingMetrics
    | ValidationMetrics
    | CheckpointSaved
)
"""Events that `fit` passes to its caller."""


def on_steps(report: Callable[[int, int], None]) -> Callable[[Event], None]:
    """Return a callback for `fit` that calls `report` with (steps done, steps in total)."""

    def on_event(event: Event) -> None:
        if isinstance(event, TrainingMetrics):
            report(event.step, event.total_steps)

    return on_event


@dataclass(frozen=True)
class ProcessStarted:
    """A process of the training started, in this process group."""

    process_group: int


@dataclass(frozen=True)
class Failed:
    """The process ended without an adapter. `error` is a class name in `trans_peft.errors`."""

    error: str
    message: str


@dataclass(frozen=True)
class Finished:
    """The adapter is saved; the result is in the work folder."""


EventMessage = (
    MemoryEstimated
    | TrainingStarted
    | TrainingMetrics
    | ValidationMetrics
    | CheckpointSaved
    | ProcessStarted
    | Failed
    | Finished
)
_MESSAGES: dict[str, type[EventMessage]] = {
    kind.__name__: kind
    for kind in (
        MemoryEstimated,
        TrainingStarted,
        TrainingMetrics,
        ValidationMetrics,
        CheckpointSaved,
        ProcessStarted,
        Failed,
        Finished,
    )
}


def encode(message: EventMessage) -> str:
    """Return a message as one line of JSON."""
    return json.dumps({"event": type(message).__name__} | asdict(message))


def decode(line: str) -> EventMessage | LogLine:
    """Return the message in a line, or a LogLine if the line has no message."""
    try:
        fields = json.loads(line)
        return _MESSAGES[fields.pop("event")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return LogLine(line)
