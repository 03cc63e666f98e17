"""Transfers of adapters to new base versions: planned tasks, and the recorded outcomes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from trans_peft.domain.base import BaseRef
from trans_peft.domain.evaluation import Evaluation, Judgment, Verdict, verdict_key
from trans_peft.domain.names import check_names
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt

__all__ = [
    "Compatibility",
    "Effect",
    "Plan",
    "Reason",
    "TransferOutcome",
    "TransferTask",
    "outcome_of",
]


@dataclass(frozen=True)
class Compatibility:
    """The result of comparing an adapter and its old base with a new base.

    Attributes:
        mismatches: Differences that prevent a transfer, such as other shapes. Empty: compatible.
        notes: Differences that allow a transfer, such as a changed chat template or added tokens.
    """

    mismatches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the adapter is compatible."""
        return not self.mismatches


@dataclass(frozen=True)
class Effect:
    """The result of the effect probe: the largest change of a logit that the adapter causes."""

    max_logit_change: float

    @property
    def found(self) -> bool:
        """Whether the adapter changes any logit."""
        return self.max_logit_change > 0


class Reason(StrEnum):
    """Why an adapter has to be transferred to a base version."""

    NO_VERDICT = "no verdict on this base yet"
    POLICY_CHANGED = "the gate policy changed; stored results are reused"
    RETRY = "an earlier attempt failed"


@dataclass(frozen=True)
class TransferTask:
    """A planned transfer of one adapter to one base version.

    Attributes:
        adapter: The adapter's name.
        source_number: The number of the version whose weights are transferred.
        base: The new base version.
        reason: Why the transfer is necessary.
        attempt: 1, or one more than the number of failed attempts.
        estimated_seconds: The estimated duration; None if it is unknown.
        suites_sha256: What decides the results of the adapter's suites, in the code that planned
            the task (`suites_sha256`). Empty: not checked.
    """

    adapter: str
    source_number: int
    base: BaseRef
    reason: Reason
    attempt: int = 1
    estimated_seconds: float | None = None
    suites_sha256: str = ""

    def __post_init__(self) -> None:
        check_names("the transfer task", adapter=self.adapter)

    @property
    def key(self) -> tuple[str, int, BaseRef, int]:
        """Identifies the same task in two plans. The reason and the estimate may differ."""
        return self.adapter, self.source_number, self.base, self.attempt

    def __str__(self) -> str:
        cost = "" if self.estimated_seconds is None else f", about {self.estimated_seconds:.0f} s"
        return f"{self.adapter} on {self.base}: {self.reason}{cost}"


@dataclass(frozen=True)
class TransferOutcome:
    """The audit record of the transfer of one adapter to one base version.

    Attributes:
        adapter: The adapter's name.
        source_number: The number of the version whose weights were transferred.
        base: The new base version.
        weights_sha256: The hash of the source version's weights.
        policy_sha256: The hash of the gate policy.
        judgment: The verdict, its reason and its figures.
        compatibility: The comparison of the two bases.
        effect: The result of the effect probe; None for an incompatible adapter.
        evaluations: The evaluations behind the verdict. Registries return outcomes without them.
        new_number: The number of the version that was registered for the new base; None for the
            verdicts `incompatible` and `failed`.
        attempts: The number of failed attempts in a row, this one included.
        seconds: The duration of the transfer.
        strategy: The recovery strategy that made the registered version.
        tried: All strategies that were tried, each with its verdict and duration.
        training: The recipe for retraining, if the policy allows it and nothing else passed.
    """

    adapter: str
    source_number: int
    base: BaseRef
    weights_sha256: str
    policy_sha256: str
    judgment: Judgment
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
        """The verdict of the judgment."""
        return self.judgment.verdict

    @property
    def verdict_key(self) -> str:
        """The key of the verdict: a hash of its evaluations and its policy (see `verdict_key`)."""
        return verdict_key(tuple(e.key for e in self.evaluations), self.policy_sha256)

    def counted_after(self, previous: "TransferOutcome | None") -> "TransferOutcome":
        """Return this outcome with `attempts` counted from the previous outcome on the same base.

        A failure after a failure of the same weights under the same policy increases the count. Any
        other failure is the first attempt.
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
    """Return the first outcome of these weights on that base; `outcomes` are newest first."""
    for outcome in outcomes:
        if (outcome.weights_sha256, outcome.base.fingerprint_sha256) == (
            weights_sha256,
            base_fingerprint_sha256,
        ):
            return outcome
    return None


@dataclass(frozen=True)
class Plan:
    """The tasks that are missing for the desired state of one family.

    Attributes:
        family: The base family.
        tasks: The transfers to run, most important base version first.
        parked: Transfers whose attempts all failed; a person has to act.
        unreadable: Registry entries that cannot be read, each with the reason.
        trainings: Recipes for retraining that recorded outcomes contain.
        awaited: The base version to which a person wants the fleet to move, until it serves.
        recoveries: The strategies for adapters that do not pass with direct transfer.
        recovery_seconds: The median duration of the recoveries of this family so far; None without
            any.
    """

    family: str
    tasks: tuple[TransferTask, ...]
    parked: tuple[TransferTask, ...] = ()
    unreadable: tuple[str, ...] = ()
    trainings: tuple[TrainingRecipe, ...] = ()
    awaited: BaseRef | None = None
    recoveries: tuple[RecoveryStrategy, ...] = ()
    recovery_seconds: float | None = None

    @property
    def total_cost(self) -> str:
        """How long the tasks take together on one GPU slot, in words; empty without an estimate."""
        known = [
            item.estimated_seconds for item in self.tasks if item.estimated_seconds is not None
        ]
        if not known:
            return ""
        minutes = len(self.tasks) * sum(known) / len(known) / 60
        took = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
        by = "" if len(known) == len(self.tasks) else f", by the mean of {len(known)} estimates"
        return f"all transfers together take about {took} on one GPU slot{by}"

    @property
    def recovery_cost(self) -> str:
        """What a recovery adds to the estimates, in words.

        Empty if there is nothing to transfer, or no strategy but direct transfer.
        """
        if not (self.tasks and self.recoveries):
            return ""
        names = ", ".join(self.recoveries)
        if self.recovery_seconds is None:
            return (
                f"the estimates do not include the recovery ({names}) of adapters that do not pass "
                "with direct transfer: its duration is not known in this family yet"
            )
        return (
            f"an adapter that does not pass with direct transfer takes about "
            f"{self.recovery_seconds:.0f} s more, the median recovery of this family ({names}); "
            "estimates from earlier transfers include it"
        )
