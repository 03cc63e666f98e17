"""What a training process says while it runs: typed events, one JSON line each on its stdout.

Everything else that a process writes (stderr, a library's print) is its log and becomes `LogLine`s.
"""

import json
from dataclasses import asdict, dataclass

__all__ = [
    "CheckpointSaved",
    "Event",
    "Failed",
    "Finished",
    "LogLine",
    "ProcessStarted",
    "TrainingMetrics",
    "TrainingStarted",
    "decode",
    "encode",
]


@dataclass(frozen=True)
class LogLine:
    """One line of the training process' log."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TrainingStarted:
    """The model is ready; training begins after `step` (0, or the checkpoint it resumes from)."""

    step: int
    total_steps: int
    trainable_parameters: int
    device: str
    processes: int

    def __str__(self) -> str:
        start = f"resumes after step {self.step}" if self.step else "starts"
        return (
            f"training {start}: {self.total_steps} steps, {self.trainable_parameters:,} trainable "
            f"parameters, {self.processes} process(es) on {self.device}"
        )


@dataclass(frozen=True)
class TrainingMetrics:
    """Figures after one optimiser step.

    `loss` is the mean over the answers' tokens of this step, in nats. `tokens_per_s` counts all
    tokens but padding, over all processes, since training started or resumed.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    eta_s: float

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of this step by the names they are recorded under."""
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_s": self.tokens_per_s,
        }

    def __str__(self) -> str:
        return (
            f"step {self.step}/{self.total_steps}  loss {self.loss:.4f}  lr "
            f"{self.learning_rate:.2e}  {self.tokens_per_s:,.0f} tokens/s  {self.eta_s:.0f} s left"
        )


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint that training can resume from is complete."""

    step: int

    def __str__(self) -> str:
        return f"checkpoint after step {self.step}"


Event = LogLine | TrainingStarted | TrainingMetrics | CheckpointSaved
"""What the caller of `fit` is told."""


@dataclass(frozen=True)
class ProcessStarted:
    """One process of the training runs, in this process group."""

    process_group: int


@dataclass(frozen=True)
class Failed:
    """The process ends without an adapter: an error of `trans_peft.errors`, and its text."""

    error: str
    message: str


@dataclass(frozen=True)
class Finished:
    """The adapter is saved; the result stands in the work folder."""


EventMessage = (
    TrainingStarted | TrainingMetrics | CheckpointSaved | ProcessStarted | Failed | Finished
)
_MESSAGES: dict[str, type[EventMessage]] = {
    kind.__name__: kind
    for kind in (
        TrainingStarted,
        TrainingMetrics,
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
    """Return the message in a line; whatever is none is a line of the log."""
    try:
        fields = json.loads(line)
        return _MESSAGES[fields.pop("event")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return LogLine(line)
