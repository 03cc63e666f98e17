"""Evaluations and verdicts: what is asked, what was answered, what follows.

An evaluation keeps its result item by item, so that a gate can compare in pairs. The statistics
that turn evaluations into a verdict are in `trans_peft.validation.gate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import isfinite
from typing import ClassVar, Literal, NamedTuple

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.data import DataSource
from trans_peft.domain.identity import ADDED_LATER, content_sha256
from trans_peft.domain.names import name_problem, quoted
from trans_peft.domain.recovery import RecoveryPolicy
from trans_peft.errors import InvalidSpecError

__all__ = [
    "BARE",
    "Comparison",
    "Evaluation",
    "GatePolicy",
    "ItemResult",
    "Judgement",
    "Levels",
    "Prefix",
    "Suite",
    "SuiteJudgement",
    "Verdict",
    "evaluation_key",
    "prefix_key",
    "verdict_key",
]

_TEXT_RULES = 2
"""Counts up when prompts or answers come to be other texts under the same suite, template and
model, so that older results are never compared with newer ones. 2: answers keep special tokens, the
token that ends a chat's turn ends an answer, chat templates see a fixed date, HumanEval/115's
import stands in front."""

_MARKING_RULES = {"code": 2, "math_verify": 2}
"""Counts up where a scoring rule comes to mark answers otherwise under its name, so that older
marks are never compared with newer ones. `math_verify` 2: numbers in other notations, percentages
and points. `code` 2: floats within evalplus' tolerance, exceptions that end an iteration."""

BARE = "bare"
"""Stands where an adapter's weights hash would, for the base without any adapter."""


@dataclass(frozen=True)
class Suite:
    """A set of questions, how they are answered and when an answer is right.

    `data` holds prompt/completion (or chat) rows; the completion is the reference answer.
    `scoring` names a rule in `trans_peft.validation.scoring`, with what it takes after a colon;
    `threshold` is for rules that give a degree (chrF, ROUGE): an item is right at or above it.
    Answers are decoded greedily with at most `max_new_tokens`, and end at the first of `stop`.
    `limit` keeps the first so many rows. `chance_points` is the score of blind guessing, where it
    is known: it explains a score and changes none.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    name: str
    data: DataSource
    scoring: str = "exact_match"
    threshold: float | None = None
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    limit: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    keep_answers: bool = False
    chance_points: float | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = []
        if self.chance_points is not None and not 0 <= self.chance_points < 100:
            problems.append(f"chance_points must lie in [0, 100), not {self.chance_points}")
        if self.threshold is not None and not _is_finite(self.threshold):
            problems.append(f"threshold must be a finite number, not {quoted(self.threshold)}")
        if problem := name_problem("name", self.name):
            problems.append(problem)
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            problems.append(f"stop must be a list of strings that are not empty, not {self.stop!r}")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit must be at least 1, not {self.limit}")
        if problems:
            raise InvalidSpecError(f"suite {quoted(self.name)}: {'; '.join(problems)}")

    @property
    def is_choice(self) -> bool:
        """Whether an answer is the likeliest of an item's choices, and nothing is decoded."""
        return self.scoring.partition(":")[0] == "choice"

    @property
    def suite_sha256(self) -> str:
        """Hash of the questions and of the rule that marks them; needs pinned data.

        Where the data lies does not count, only its bytes and the template that reads them.
        """
        if not self.data.sha256:
            raise InvalidSpecError(
                f"suite {self.name!r} has no hash: its data is not pinned",
                do="read the data once (trans_peft.data.pin) and keep the pinned suite",
            )
        asked = [self.name, self.data.sha256, self.limit, self.scoring, self.threshold]
        marked = _MARKING_RULES.get(self.scoring.partition(":")[0])
        return content_sha256(
            asked
            + ([self.data.template] if self.data.template else [])
            + ([["marking", marked]] if marked else [])
        )

    @property
    def decoding_sha256(self) -> str:
        """Hash of everything that decides which text a model answers with."""
        if self.is_choice:
            return content_sha256(["choice", _TEXT_RULES, self.dtype])
        return content_sha256(
            ["greedy", _TEXT_RULES, self.max_new_tokens, list(self.stop), self.dtype]
        )

    def evaluation_key(self, weights_sha256: str, base_fingerprint_sha256: str) -> str:
        """Return the key of this suite's evaluation of an adapter (or `BARE`) on a base."""
        return evaluation_key(
            weights_sha256, base_fingerprint_sha256, self.suite_sha256, self.decoding_sha256
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def evaluation_key(
    weights_sha256: str, base_fingerprint_sha256: str, suite_sha256: str, decoding_sha256: str
) -> str:
    """Return the key of one evaluation: the same four hashes always give the same result."""
    return content_sha256([weights_sha256, base_fingerprint_sha256, suite_sha256, decoding_sha256])


def prefix_key(whole_key: str, prefix: "Prefix", asked: int) -> str:
    """Return the key of the part of an evaluation that the first `asked` items of an order are."""
    return content_sha256(["prefix", whole_key, prefix.of, prefix.seed, asked])


@dataclass(frozen=True)
class ItemResult:
    """One answered question. `answer` is user data: kept only where the suite says so."""

    id: str
    correct: bool
    answer_sha256: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Prefix:
    """Says that of a suite's `of` items only the first in the order of a `seed` were asked."""

    of: int
    seed: str


@dataclass(frozen=True)
class Evaluation:
    """One adapter (or `BARE`) on one base, item by item.

    `prefix` is None where the whole suite was asked; a part of it has another key than the whole.
    `near_ties`: tokens of all answers whose two best logits lay within 1e-4, so that another batch
    or machine may say the other.
    """

    suite: str
    weights_sha256: str
    base_fingerprint_sha256: str
    suite_sha256: str
    decoding_sha256: str
    items: tuple[ItemResult, ...]
    seconds: float = 0.0
    prefix: Prefix | None = None
    near_ties: int = 0

    def __post_init__(self) -> None:
        ids = [item.id for item in self.items]
        if not ids:
            raise InvalidSpecError(f"suite {self.suite!r}: an evaluation without items")
        if len(set(ids)) != len(ids):
            raise InvalidSpecError(f"suite {self.suite!r}: item ids are not unique")
        if self.prefix is not None and len(ids) >= self.prefix.of:
            raise InvalidSpecError(
                f"suite {self.suite!r}: {len(ids)} of {self.prefix.of} items are not a part"
            )

    @property
    def key(self) -> str:
        """The evaluation's key (see `evaluation_key` and, for a part of a suite, `prefix_key`)."""
        whole = evaluation_key(
            self.weights_sha256,
            self.base_fingerprint_sha256,
            self.suite_sha256,
            self.decoding_sha256,
        )
        return whole if self.prefix is None else prefix_key(whole, self.prefix, len(self.items))

    @property
    def score(self) -> float:
        """Share of right answers, in points (0 to 100)."""
        return 100.0 * sum(item.correct for item in self.items) / len(self.items)

    @property
    def kept_answers(self) -> dict[str, str]:
        """The texts of the answers by item id; none where the suite keeps none."""
        return {item.id: item.answer for item in self.items if item.answer is not None}


class Verdict(StrEnum):
    """What follows for one adapter on one base. The table is in docs/verdicts.md."""

    PASSED = "passed"
    NEEDS_RETUNING = "needs-retuning"
    INCONCLUSIVE = "inconclusive"
    INCOMPATIBLE = "incompatible"
    RETIRE = "retire"
    FAILED = "failed"


class Levels(NamedTuple):
    """Significance levels of the one-sided tests of one suite.

    Attributes:
        alpha: level of the tests that must hold on every required suite.
        inferiority: level of the inferiority tests. One significant test on one suite is enough for
            `needs-retuning`, so these tests share `alpha`.
    """

    alpha: float
    inferiority: float


@dataclass(frozen=True)
class GatePolicy:
    """When an adapter may serve on a new base.

    `margin_points`: the largest loss against the base it was trained on that still counts as none.
    `alpha`: one-sided level of each bound. `required_suites`: those that must all pass; empty means
    every suite that the adapter was registered with. `must_beat_bare`: it must also do better than
    the bare new base. `sequential`: stop asking once the verdict is known; at the same `alpha`,
    with less power (docs/verdicts.md). `recovery`: what is tried where direct transfer does not
    pass; all rungs share `alpha`. `must_match_fresh`: it must also lose no more than the margin
    against an adapter freshly tuned on the new base. `label` is your own word for this policy.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    margin_points: float = 5.0
    alpha: float = 0.05
    required_suites: tuple[str, ...] = ()
    must_beat_bare: bool = True
    sequential: bool = field(default=False, metadata=ADDED_LATER)
    recovery: RecoveryPolicy = field(default=RecoveryPolicy(), metadata=ADDED_LATER)
    must_match_fresh: bool = field(default=False, metadata=ADDED_LATER)
    label: str = field(default="", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = []
        if self.sequential and self.must_match_fresh:
            problems.append(
                "sequential and must_match_fresh cannot be on at once: a fresh adapter is compared "
                "on whole suites"
            )
        if not 0 < self.margin_points < 100:
            problems.append(f"margin_points must lie in (0, 100), not {self.margin_points}")
        if not 0 < self.alpha < 0.5:
            problems.append(f"alpha must lie in (0, 0.5), not {self.alpha}")
        problems += filter(
            None, (name_problem("a required suite", s) for s in self.required_suites)
        )
        if self.label and (problem := name_problem("label", self.label)):
            problems.append(problem)
        if problems:
            raise InvalidSpecError(f"the gate's policy cannot be used: {'; '.join(problems)}")

    @property
    def sha256(self) -> str:
        """Hash of the policy; part of every verdict's key."""
        return content_sha256(self)

    @property
    def per_strategy(self) -> "GatePolicy":
        """The policy that judges each rung: its share of `alpha`, so that all together have it."""
        return replace(
            self, alpha=self.alpha / len(self.recovery.strategies), recovery=RecoveryPolicy()
        )

    def levels(self, inferiority_tests: int) -> Levels:
        """Return the levels of one suite's tests. No other code turns `alpha` into a level.

        `inferiority_tests` is the number of inferiority tests on all required suites together.
        """
        return Levels(self.alpha, self.alpha / inferiority_tests)

    def requires(self, suites: Iterable[str]) -> tuple[str, ...]:
        """Return the required suites, each once, of an adapter that was registered with these."""
        return tuple(dict.fromkeys(self.required_suites)) or tuple(sorted(suites))


def verdict_key(evaluation_keys: tuple[str, ...], policy_sha256: str) -> str:
    """Return the key of one verdict: its evaluations (in any order) and its policy."""
    return content_sha256([sorted(evaluation_keys), policy_sha256])


@dataclass(frozen=True)
class Comparison:
    """The adapter on a new base compared with one reference, item by item, on one suite.

    The reference is the adapter on its old base, the bare new base, or a freshly tuned adapter.
    Scores, differences and bounds are in points; a positive difference means that the adapter on
    the new base scores higher. The bounds are one-sided. The flags are the results of one-sided
    tests; a flag that is False means "not shown", never "shown to be wrong".

    Attributes:
        reference_score: score of the reference on the compared items.
        items: number of items that both sides answered.
        discordant: number of items that exactly one side answered correctly.
        difference: score of the adapter minus `reference_score`, on the compared items.
        lower: lower confidence bound of `difference` at level `Levels.alpha`.
        upper: upper confidence bound of `difference` at level `Levels.alpha`.
        inferiority_bound: upper confidence bound of `difference` at level `Levels.inferiority`.
        non_inferior: `lower` lies above minus the margin: it is less than the margin worse.
        inferior: `inferiority_bound` lies below minus the margin: it is more than the margin worse.
        superior: `lower` lies above 0: the adapter is better than the reference.
        reference_non_inferior: `upper` lies below the margin: the reference is less than the margin
            worse than the adapter.
    """

    reference_score: float
    items: int
    discordant: int
    difference: float
    lower: float
    upper: float
    inferiority_bound: float
    non_inferior: bool
    inferior: bool
    superior: bool
    reference_non_inferior: bool


@dataclass(frozen=True)
class SuiteJudgement:
    """The figures of one suite behind a verdict.

    Attributes:
        suite: name of the suite.
        score: score of the adapter on the new base, in points.
        versus_old_base: comparison with the same adapter on the base that it was trained on.
        power: probability that `versus_old_base` shows non-inferiority if nothing was lost, given
            the observed share of discordant items.
        versus_bare_base: comparison with the bare new base; None if the bare base has no results.
        versus_fresh_adapter: comparison with an adapter that was tuned on the new base; None if
            there is none.
        items_needed: estimated size of a suite that would decide every undecided test of this suite
            with a probability of 80 %. 0 if the verdict is not `inconclusive`, if this suite is not
            required, or if more items would not help.
        prefix: the part of the suite that was evaluated in a sequential test; None for other tests.
            All figures are then those of that part, and the bounds hold at any stopping time.
    """

    suite: str
    score: float
    versus_old_base: Comparison
    power: float
    versus_bare_base: Comparison | None = None
    versus_fresh_adapter: Comparison | None = None
    items_needed: int = 0
    prefix: Prefix | None = None

    @property
    def items(self) -> int:
        """Number of items that the adapter answered on the new base."""
        return self.versus_old_base.items

    @property
    def more_items(self) -> int:
        """Number of items to add to the suite to reach `items_needed`; 0 if it has enough."""
        suite_items = self.prefix.of if self.prefix else self.items
        return max(self.items_needed - suite_items, 0)


@dataclass(frozen=True)
class Judgement:
    """A verdict, its reason as a sentence, and the figures of every suite."""

    verdict: Verdict
    reason: str
    suites: tuple[SuiteJudgement, ...] = ()
