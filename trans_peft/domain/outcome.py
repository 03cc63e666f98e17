"""What became of one adapter on one new base: the audit record, and the work that leads to it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from trans_peft.domain.evaluation import Evaluation, Judgement, Verdict, verdict_key
from trans_peft.domain.names import check_names
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt

__all__ = [
    "Compatibility",
    "Effect",
    "FleetChanges",
    "Plan",
    "Reason",
    "TransferOutcome",
    "TransferTask",
    "outcome_of",
]


@dataclass(frozen=True)
class Compatibility:
    """Whether an adapter's bytes mean anything on a base. No mismatch: compatible.

    `notes` are differences that do not forbid the transfer (a changed chat template, added tokens).
    """

    mismatches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing forbids the transfer."""
        return not self.mismatches


@dataclass(frozen=True)
class Effect:
    """The effect probe: the largest change of a logit that the adapter makes on its prompts."""

    max_logit_change: float

    @property
    def found(self) -> bool:
        """Whether the adapter changes anything at all."""
        return self.max_logit_change > 0


class Reason(StrEnum):
    """Why an adapter has work to do on a base."""

    NEVER_JUDGED = "never judged on this base"
    POLICY_CHANGED = "the policy changed: judged anew from stored results"
    RETRY = "an earlier attempt failed"


@dataclass(frozen=True)
class TransferTask:
    """One adapter to be judged on one base: one line of `--dry-run`."""

    adapter: str
    source_number: int
    base_version: str
    reason: Reason
    attempt: int = 1
    estimated_seconds: float | None = None

    def __post_init__(self) -> None:
        check_names("the work", adapter=self.adapter, base_version=self.base_version)

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What makes it the same work in another plan: reasons and estimates may change."""
        return self.adapter, self.source_number, self.base_version, self.attempt

    def __str__(self) -> str:
        cost = "" if self.estimated_seconds is None else f", about {self.estimated_seconds:.0f} s"
        return f"{self.adapter} on {self.base_version}: {self.reason}{cost}"


@dataclass(frozen=True)
class TransferOutcome:
    """The audit record of one adapter on one new base.

    `new_number` is the version made on the new base; none where the verdict is `incompatible` or
    `failed`. `evaluations` are those that the verdict rests on, per item. `weights_sha256` is that
    of the bytes that were carried over; `strategy` says what the version was made by, `tried` every
    rung with its verdict and cost. `training` is what is left to try: a recipe to train by.
    """

    adapter: str
    source_number: int
    family: str
    base_version: str
    base_fingerprint_sha256: str
    weights_sha256: str
    policy_sha256: str
    judgement: Judgement
    compatibility: Compatibility = Compatibility()
    effect: Effect | None = None
    evaluations: tuple[Evaluation, ...] = ()
    new_number: int | None = None
    attempts: int = 1
    seconds: float = 0.0
    strategy: RecoveryStrategy = RecoveryStrategy.DIRECT
    tried: tuple[StrategyAttempt, ...] = ()
    training: TrainingRecipe | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict alone."""
        return self.judgement.verdict

    @property
    def verdict_key(self) -> str:
        """The verdict's key: the evaluations it rests on and the policy (see `verdict_key`)."""
        return verdict_key(tuple(e.key for e in self.evaluations), self.policy_sha256)

    def counted_after(self, previous: "TransferOutcome | None") -> "TransferOutcome":
        """Return this outcome with its attempts counted by what the registry held before.

        A failure that follows failures of the same bytes under the same policy is one more attempt;
        any other failure is the first.
        """
        if self.verdict is not Verdict.FAILED:
            return self
        again = (
            previous is not None
            and previous.verdict is Verdict.FAILED
            and previous.weights_sha256 == self.weights_sha256
            and previous.policy_sha256 == self.policy_sha256
        )
        return replace(self, attempts=previous.attempts + 1 if previous and again else 1)


def outcome_of(
    weights_sha256: str, base_fingerprint_sha256: str, outcomes: Iterable[TransferOutcome]
) -> TransferOutcome | None:
    """Return the newest outcome of these bytes on that base; `outcomes` are the newest first."""
    for outcome in outcomes:
        if (outcome.weights_sha256, outcome.base_fingerprint_sha256) == (
            weights_sha256,
            base_fingerprint_sha256,
        ):
            return outcome
    return None


@dataclass(frozen=True)
class Plan:
    """What reconcile found missing, and what it leaves to a person.

    `parked`: three attempts failed. `unreadable`: what stands in the registry and cannot be read
    (adapters, base versions), and why.
    `trainings`: recipes that judged adapters have left to try.
    """

    family: str
    work: tuple[TransferTask, ...]
    parked: tuple[TransferTask, ...] = ()
    unreadable: tuple[str, ...] = ()
    trainings: tuple[TrainingRecipe, ...] = ()


@dataclass(frozen=True)
class FleetChanges:
    """What reconcile wrote, in words, and why it did not write the rest.

    `manual_overrides`: aliases that a person set or took away, left as they are. `promoted`: the
    base that serves from now on. Why `champion` does not serve: `waiting` (verdicts are missing),
    `refused` (the policy, or a version that cannot serve); `already_reported` where its page said
    so already.
    `is_outdated`: a person moved `champion` meanwhile, so that another look is due. `unreadable`:
    what stands in the registry and cannot be read, and why.
    """

    aliases: tuple[str, ...] = ()
    manual_overrides: tuple[str, ...] = ()
    promoted: str | None = None
    waiting: str | None = None
    refused: str | None = None
    already_reported: bool = False
    is_outdated: bool = False
    unreadable: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return what was written, a line each."""
        lines = [f"- {alias}" for alias in self.aliases]
        lines += [f"- left alone: {alias}" for alias in self.manual_overrides]
        lines += [f"- **serving moved to {self.promoted}**"] if self.promoted else []
        lines += [f"- **serving did not move**: {self.waiting}"] if self.waiting else []
        lines += [f"- **promotion refused**: {_indented(self.refused)}"] if self.refused else []
        return "\n".join(["## Changes", "", *(lines or ["- none"])])


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")
