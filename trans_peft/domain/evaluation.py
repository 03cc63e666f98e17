"""Suites, evaluations, gate policies and verdicts.

An evaluation stores its results item by item, so that the gate can compare two evaluations in
pairs. The code that turns evaluations into a verdict is in `trans_peft.validation.gate`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import ClassVar, Final, Literal, NamedTuple

from trans_peft.domain import FORBID_EXTRA_FIELDS
from trans_peft.domain.data import DataSource
from trans_peft.domain.field_checks import choice_problems
from trans_peft.domain.harness_task import HarnessTask
from trans_peft.domain.identity import ADDED_LATER, content_sha256
from trans_peft.domain.judge_model import JudgeModel
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.domain.names import name_problem, quoted
from trans_peft.domain.numbers import is_finite_number
from trans_peft.domain.recovery import RecoveryPolicy
from trans_peft.errors import InvalidSpecError

__all__ = [
    "BARE",
    "DEFAULT_ENGINE",
    "Comparison",
    "EngineKind",
    "Evaluation",
    "EvaluationSummary",
    "GatePolicy",
    "ItemResult",
    "Judgment",
    "Levels",
    "NegativeFlips",
    "Prefix",
    "SliceJudgment",
    "Suite",
    "SuiteJudgment",
    "Verdict",
    "engine_lines",
    "evaluation_key",
    "flipped_items",
    "prefix_key",
    "suites_sha256",
    "verdict_key",
]

_DECODING_REVISION = 3
"""Part of every evaluation key. Increased when the same suite, template and model produce other
prompts or answers, so that results of different revisions are never compared. Revision 2: answers
keep special tokens, the end-of-turn token ends a chat answer, chat templates get a fixed date, and
the import of HumanEval/115 precedes the prompt. Revision 3: a padding token is part of an
answer."""

_SAMPLING_REVISION = 1
"""Part of the keys of evaluations with sampled answers. Increased when the same distributions and
seed give other tokens."""

_MAX_SAMPLES = 64

_SCORING_REVISIONS: Mapping[str, int | str] = {
    "bleu": "case:mixed|eff:yes|tok:13a|smooth:exp",
    "code": 2,
    "math_verify": 3,
}
"""Part of the evaluation keys of these scoring rules. Changed when a rule scores the same answer
differently. `bleu`: sacrebleu's signature. `code` 2: evalplus' tolerance for floats, and exceptions
that end an iteration. `math_verify` 3: other number notations, percentages, points, words and
units."""

EngineKind = Literal["loop", "continuous-batching", "vllm"]
"""The engines that a gate policy may choose: this project's decoding loop, continuous batching by
transformers, and vLLM. The name in an evaluation also has the version (`Evaluation.engine`)."""

DEFAULT_ENGINE: Final = "loop"
"""The engine of evaluations whose keys name none: `trans_peft.validation.engine.LoopEngine`."""

_NO_DATA = DataSource("harness:")
"""The data of a suite whose items pinning writes, from a task of lm-evaluation-harness."""

BARE = "bare"
"""The value of `weights_sha256` for a base without an adapter."""


@dataclass(frozen=True)
class Suite:
    """An evaluation data set, with the settings for decoding and scoring answers.

    Attributes:
        name: name of the suite, part of its hash.
        data: prompt/completion rows or chat rows. The completion is the reference answer. Omitted
            in a suite with `harness` that is not pinned.
        scoring: name of a rule in `trans_peft.validation.scoring`; its parameter follows a colon.
        threshold: smallest correct value of a rule that returns a degree (BLEU, chrF, ROUGE-L,
            label F1). None for such a rule: results are degrees, and the claim is about their mean.
        max_new_tokens: largest number of tokens of an answer.
        stop: strings that end an answer. The answer is cut before the first of them.
        limit: number of rows to use, from the first. None: all rows.
        dtype: data type of the model's weights.
        keep_answers: whether evaluations store the texts of answers, which are user data.
        chance_points: score of random guessing, in points. Reports show it; no verdict uses it. An
            adapter that scores no better on its old base is not distilled.
        temperature: answers are sampled with this temperature, from 0.05 to 10. None: decoding is
            greedy.
        top_p: only the most likely tokens are sampled, those before which the sum of probabilities
            is less than `top_p`, from 0.01 to 1. 1: all tokens.
        samples: answers to each item, at most 64. With several, the result of an item is their mean
            score, from 0.0 to 1.0.
        sampling_seed: seed of the random numbers. They depend on it, the item's id and the number
            of the answer alone.
        judge: the model that marks the answers; only with the scoring rule `judge`. The claim is
            then about the share of answers that people would label as right.
        harness: the task of lm-evaluation-harness that gives the items, their answers, the scoring
            rule, `max_new_tokens` and `stop`. Pinning sets these fields
            (`trans_peft.lifecycle.evaluation.pin_suites`).

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA_FIELDS

    name: str
    data: DataSource = _NO_DATA
    scoring: str = "exact_match"
    threshold: float | None = None
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    limit: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    keep_answers: bool = False
    chance_points: float | None = field(default=None, metadata=ADDED_LATER)
    temperature: float | None = field(default=None, metadata=ADDED_LATER)
    top_p: float = field(default=1.0, metadata=ADDED_LATER)
    samples: int = field(default=1, metadata=ADDED_LATER)
    sampling_seed: int = field(default=0, metadata=ADDED_LATER)
    judge: JudgeModel | None = field(default=None, metadata=ADDED_LATER)
    harness: HarnessTask | None = field(default=None, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = []
        if self.chance_points is not None and not 0 <= self.chance_points < 100:
            problems.append(f"chance_points must lie in [0, 100), not {self.chance_points}")
        if self.threshold is not None and not is_finite_number(self.threshold):
            problems.append(f"threshold must be a finite number, not {quoted(self.threshold)}")
        if problem := name_problem("name", self.name):
            problems.append(problem)
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            problems.append(f"stop must be a list of strings that are not empty, not {self.stop!r}")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit must be at least 1, not {self.limit}")
        problems += [*_sampling_problems(self), *_judge_problems(self), *_harness_problems(self)]
        if problems:
            raise InvalidSpecError(f"suite {quoted(self.name)}: {'; '.join(problems)}")

    @property
    def is_choice(self) -> bool:
        """Whether the suite is multiple choice: the most likely choice is the answer."""
        return self.scoring.partition(":")[0] == "choice"

    @property
    def needs_items(self) -> bool:
        """Whether the items come from a task of lm-evaluation-harness and are not written yet."""
        return self.harness is not None and not self.harness.is_pinned

    @property
    def is_sampled(self) -> bool:
        """Whether answers are sampled instead of decoded greedily."""
        return self.temperature is not None

    def answer_key(self, item: str, number: int) -> int:
        """Return the key of the random numbers of an answer to an item, less than 2**128."""
        return int(content_sha256(["answer", self.sampling_seed, item, number])[:32], 16)

    @property
    def suite_sha256(self) -> str:
        """Hash of the items and the scoring rule.

        The hash includes the bytes of the data, its template and the columns of its clusters and
        slices, but not its location. It also includes the task of lm-evaluation-harness that the
        items come from.

        Raises:
            InvalidSpecError: the data or the judge model is not pinned.
        """
        if not self.data.sha256:
            raise InvalidSpecError(
                f"suite {self.name!r} has no hash: its data is not pinned",
                do="pin the suite with trans_peft.lifecycle.evaluation.pin_suites",
            )
        fields = [self.name, self.data.sha256, self.limit, self.scoring, self.threshold]
        revision = _SCORING_REVISIONS.get(self.scoring.partition(":")[0])
        columns = [self.data.cluster, self.data.slice]
        return content_sha256(
            fields
            + ([self.data.template] if self.data.template else [])
            + ([["marking", revision]] if revision else [])
            + ([["columns", *columns]] if any(columns) else [])
            + ([["judge", self.judge.sha256]] if self.judge else [])
            + ([["harness", self.harness]] if self.harness else [])
        )

    @property
    def decoding_sha256(self) -> str:
        """Hash of the settings that affect the answers of a model."""
        if self.is_choice:
            return content_sha256(["choice", _DECODING_REVISION, self.dtype])
        shared = [_DECODING_REVISION, self.max_new_tokens, list(self.stop), self.dtype]
        if not self.is_sampled:
            return content_sha256(["greedy", *shared])
        sampling = [self.temperature, self.top_p, self.samples, self.sampling_seed]
        return content_sha256(["sampled", _SAMPLING_REVISION, *shared, *sampling])

    def evaluation_key(
        self, weights_sha256: str, base_fingerprint_sha256: str, engine: str = DEFAULT_ENGINE
    ) -> str:
        """Return the key of this suite's evaluation of an adapter (or `BARE`) on a base."""
        return evaluation_key(
            weights_sha256, base_fingerprint_sha256, self.suite_sha256, self.decoding_sha256, engine
        )


def _sampling_problems(suite: Suite) -> list[str]:
    problems = []
    if not suite.is_sampled:
        options = {"samples": 1, "top_p": 1.0, "sampling_seed": 0}
        problems += [
            f"{name}={getattr(suite, name)} needs a temperature, because greedy decoding "
            "has one answer"
            for name, default in options.items()
            if getattr(suite, name) != default
        ]
    elif suite.is_choice:
        problems.append(
            "temperature needs a scoring rule for generated answers: choice compares likelihoods"
        )
    numbers = [("temperature", suite.temperature, 0.05, 10), ("top_p", suite.top_p, 0.01, 1)]
    for name, value, least, most in numbers:
        if value is not None and not (is_finite_number(value) and least <= value <= most):
            problems.append(f"{name} must lie in [{least}, {most}], not {quoted(value)}")
    if not 1 <= suite.samples <= _MAX_SAMPLES:
        problems.append(f"samples must lie in [1, {_MAX_SAMPLES}], not {suite.samples}")
    if not 0 <= suite.sampling_seed < 2**63:
        problems.append(f"sampling_seed must lie in [0, 2**63), not {suite.sampling_seed}")
    return problems


def _judge_problems(suite: Suite) -> list[str]:
    if (suite.judge is None) != (suite.scoring != "judge"):
        return ["scoring: judge and the field judge, a judge model, belong together"]
    if suite.judge is None:
        return []
    problems = []
    if suite.samples > 1:
        problems.append("a judge model marks one answer to each item: remove samples")
    if suite.threshold is not None:
        problems.append("the marks of a judge model have no threshold: remove it")
    return problems


_SET_BY_PINNING = ("data", "scoring", "max_new_tokens", "stop")
_NOT_WITH_HARNESS = ("threshold", "temperature", "judge")


def _harness_problems(suite: Suite) -> list[str]:
    if suite.harness is None:
        return ["data is missing"] if suite.data == _NO_DATA else []
    pinned = suite.harness.is_pinned
    if pinned and not suite.data.sha256:
        return ["harness has a version, but data is not pinned: remove version and config_sha256"]
    defaults = {field.name: field.default for field in fields(suite)}
    fixed = _NOT_WITH_HARNESS if pinned else (*_SET_BY_PINNING, *_NOT_WITH_HARNESS)
    return [
        f"the task of lm-evaluation-harness decides about {name}: remove it"
        for name in fixed
        if getattr(suite, name) != defaults[name]
    ]


def evaluation_key(
    weights_sha256: str,
    base_fingerprint_sha256: str,
    suite_sha256: str,
    decoding_sha256: str,
    engine: str = DEFAULT_ENGINE,
) -> str:
    """Return the key of an evaluation. Equal keys mean equal results.

    The default engine is not part of the key.
    """
    parts = [weights_sha256, base_fingerprint_sha256, suite_sha256, decoding_sha256]
    return content_sha256(parts if engine == DEFAULT_ENGINE else [*parts, ["engine", engine]])


def suites_sha256(suites: Iterable[Suite]) -> str:
    """Return the hash of all that decides the results of these suites on one base and adapter.

    Code of two versions that gives other results for a suite has other hashes of it.
    """
    return content_sha256([[suite.suite_sha256, suite.decoding_sha256] for suite in suites])


def prefix_key(whole_key: str, prefix: "Prefix", items: int) -> str:
    """Return the key of a partial evaluation, which has the first `items` items of an order.

    `whole_key` is the key of the complete evaluation.
    """
    return content_sha256(["prefix", whole_key, prefix.suite_items, prefix.seed, items])


@dataclass(frozen=True)
class ItemResult:
    """The result of one item.

    Attributes:
        id: id of the item.
        correct: whether the scoring rule accepted the answer. In a suite with degrees, the degree
            from 0.0 to 1.0. With several answers to an item, the mean of their results.
        answer_sha256: SHA-256 of `answer`, also if it is not kept; empty if it was not recorded.
        answer: text of the answer; None unless the suite sets `keep_answers`. With several answers
            to an item, the JSON list of their texts.
        cluster: the cluster of the item. Empty: the item is independent of all others.
        slice: the slice of the item; empty if the suite has no slices.
    """

    id: str
    correct: bool | float
    answer_sha256: str = ""
    answer: str | None = None
    cluster: str = ""
    slice: str = ""


@dataclass(frozen=True)
class Prefix:
    """The part of a suite that was evaluated: the first items of a seeded order.

    Attributes:
        suite_items: number of items of the complete suite.
        seed: seed of the order.
    """

    suite_items: int
    seed: str


class EvaluationSummary(NamedTuple):
    """The score of an evaluation in points, and its duration."""

    score: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The results of an adapter, or of the bare base, on one base and suite, item by item.

    Attributes:
        suite: name of the suite.
        weights_sha256: hash of the adapter's weights, or `BARE`.
        base_fingerprint_sha256: fingerprint of the base.
        suite_sha256: hash of the items and the scoring rule.
        decoding_sha256: hash of the decoding settings.
        items: the results; ids are unique.
        seconds: duration of the evaluation.
        prefix: the part of the suite that was evaluated; None for the complete suite.
        near_ties: number of answer tokens that would be others if logits changed by 1e-4. Another
            batch size or machine may choose the other token.
        engine: name of the engine that answered (`trans_peft.ports.Engine`).
        labeled: for marks of a judge model, whether each labeled answer is right, and its mark.

    Raises:
        InvalidSpecError: there are no items, ids repeat, or `prefix` covers the complete suite.
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
    engine: str = DEFAULT_ENGINE
    labeled: tuple[tuple[bool, float], ...] = ()

    def __post_init__(self) -> None:
        ids = [item.id for item in self.items]
        if not ids:
            raise InvalidSpecError(f"suite {self.suite!r}: the evaluation has no items")
        if len(set(ids)) != len(ids):
            raise InvalidSpecError(f"suite {self.suite!r}: the evaluation has repeated item ids")
        if self.prefix is not None and len(ids) >= self.prefix.suite_items:
            raise InvalidSpecError(
                f"suite {self.suite!r}: a partial evaluation has all items of the suite",
                expected=f"fewer than {self.prefix.suite_items} items",
                found=len(ids),
            )

    @property
    def key(self) -> str:
        """Key of the evaluation: `evaluation_key`, or `prefix_key` for a part of a suite."""
        whole = evaluation_key(
            self.weights_sha256,
            self.base_fingerprint_sha256,
            self.suite_sha256,
            self.decoding_sha256,
            self.engine,
        )
        return whole if self.prefix is None else prefix_key(whole, self.prefix, len(self.items))

    @property
    def has_degrees(self) -> bool:
        """Whether the results are degrees instead of right or wrong."""
        return any(isinstance(item.correct, float) for item in self.items)

    @property
    def score(self) -> float:
        """Share of correct answers, or mean degree, in points (0 to 100).

        With a judge model, the share of right answers that its mean mark corresponds to: the mean
        mark of labeled right answers is 100 points, that of wrong ones 0.
        """
        mean = sum(item.correct for item in self.items) / len(self.items)
        if self.labeled:
            marks = [
                [mark for is_right, mark in self.labeled if is_right == side]
                for side in (True, False)
            ]
            right, wrong = (sum(part) / len(part) for part in marks)
            mean = min(max((mean - wrong) / (right - wrong), 0.0), 1.0)
        return 100.0 * mean

    @property
    def kept_answers(self) -> dict[str, str]:
        """Texts of answers by item id; empty if the suite does not store answers."""
        return {item.id: item.answer for item in self.items if item.answer is not None}


def flipped_items(
    before: Evaluation, after: Evaluation
) -> tuple[tuple[ItemResult, ItemResult], ...]:
    """Return both results of each item that is right in one of two evaluations of a suite only.

    In a suite with degrees these are the items whose degrees differ by at least one half.
    Items that one of them does not have are left out.
    """
    old = {item.id: item for item in before.items}
    return tuple(
        (old[item.id], item)
        for item in after.items
        if item.id in old and abs(old[item.id].correct - item.correct) >= 0.5
    )


class Verdict(StrEnum):
    """The gate's result for one adapter on one base.

    docs/verdicts.md defines the conditions, margins and levels.

    Attributes:
        PASSED: on every required suite, non-inferior to the adapter on the old base and, by
            default, superior to the bare base. The only verdict that sets the serving alias.
        NEEDS_RETUNING: inferior on at least one required suite.
        INCONCLUSIVE: the results show neither; more items are needed.
        INCOMPATIBLE: the adapter's weights cannot be used on this base.
        RETIRE: the bare base is non-inferior to the adapter on every required suite.
        FAILED: the transfer raised an error.
    """

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
    """The conditions under which an adapter passes on a new base.

    Attributes:
        margin_points: non-inferiority margin against the base that the adapter was trained on, in
            points. A smaller loss is acceptable.
        alpha: one-sided significance level for each adapter.
        required_suites: suites that must all pass. Empty: all suites of the adapter.
        must_beat_bare: whether the adapter must also be superior to the bare new base.
        sequential: whether evaluation stops as soon as the verdict is known. The level stays
            `alpha`; the power is lower (docs/verdicts.md).
        recovery: the strategies that are tried if direct transfer does not pass. They share
            `alpha`.
        must_match_fresh: whether the adapter must also be non-inferior to an adapter that was tuned
            on the new base.
        max_negative_flip_points: the share of items that were right on the old base and are wrong
            on the new one must be shown to lie below this limit, in points. None: no limit.
        required_slices: slices of required suites on which the adapter must be non-inferior as
            well, each as `SUITE/SLICE`.
        max_leakage_points: largest share of a required suite's items that may be (nearly) training
            rows, in points. An adapter above it does not pass. None: no limit.
        engine: what answers the suites on both bases. The default engine answers a suite instead,
            on both bases, if this engine cannot serve the suite or one of the adapters.
        label: a name for this policy; part of its hash.

    Raises:
        InvalidSpecError: fields are invalid. The message lists all problems.
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
    max_negative_flip_points: float | None = field(default=None, metadata=ADDED_LATER)
    required_slices: tuple[str, ...] = field(default=(), metadata=ADDED_LATER)
    max_leakage_points: float | None = field(default=None, metadata=ADDED_LATER)
    engine: EngineKind = field(default=DEFAULT_ENGINE, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        problems = choice_problems(self, engine=EngineKind)
        limit = self.max_negative_flip_points
        if limit is not None and not 0 < limit < 100:
            problems.append(f"max_negative_flip_points must lie in (0, 100), not {limit}")
        if self.max_leakage_points is not None and not 0 <= self.max_leakage_points < 100:
            problems.append(
                f"max_leakage_points must lie in [0, 100), not {self.max_leakage_points}"
            )
        if self.sequential and self.must_match_fresh:
            problems.append(
                "sequential and must_match_fresh exclude each other, because a fresh adapter is "
                "compared on complete suites"
            )
        problems += _slice_problems(self)
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
            raise InvalidSpecError(f"the gate policy is invalid: {'; '.join(problems)}")

    @cached_property
    def sha256(self) -> str:
        """Hash of the policy, part of every verdict key."""
        return content_sha256(self)

    @property
    def per_strategy(self) -> "GatePolicy":
        """The policy for each recovery strategy, with an equal share of `alpha`.

        The probability that any strategy passes wrongly stays at most `alpha`.
        """
        return replace(
            self, alpha=self.alpha / len(self.recovery.strategies), recovery=RecoveryPolicy()
        )

    def levels(self, required_count: int, *, has_fresh_test: bool = False) -> Levels:
        """Return the levels of one suite's tests.

        All inferiority tests on the `required_count` required suites share `alpha`: against the old
        base, against a fresh adapter (`has_fresh_test`), of the limit of negative flips, and on
        each required slice.
        """
        tests = 1 + has_fresh_test + (self.max_negative_flip_points is not None)
        slices = len(set(self.required_slices))
        return Levels(self.alpha, self.alpha / (required_count * tests + slices))

    def requires(self, suites: Iterable[str]) -> tuple[str, ...]:
        """Return the required suites without repetitions; `suites` are those of the adapter."""
        return tuple(dict.fromkeys(self.required_suites)) or tuple(sorted(suites))


def _slice_problems(policy: GatePolicy) -> list[str]:
    problems = []
    if policy.sequential and policy.required_slices:
        problems.append(
            "sequential and required_slices exclude each other, because the items of a slice are "
            "tested as a whole"
        )
    for name in policy.required_slices:
        suite, _, found = name.partition("/")
        if not suite or not found:
            problems.append(f"a required slice must have the form SUITE/SLICE, not {quoted(name)}")
        elif policy.required_suites and suite not in policy.required_suites:
            problems.append(f"the suite of the required slice {quoted(name)} is not required")
    return problems


def verdict_key(evaluation_keys: tuple[str, ...], policy_sha256: str) -> str:
    """Return the key of a verdict. The order of the evaluations does not matter."""
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
class NegativeFlips:
    """Items of a suite that were right on the old base and are wrong on the new one.

    In a suite with degrees, items whose degree fell by at least one half.

    Attributes:
        items: number of these items.
        points: their share of the compared items, in points.
        lower: lower confidence bound of `points` at level `Levels.inferiority`.
        upper: upper confidence bound of `points` at level `Levels.alpha`.
        below_limit: `upper` lies below the policy's limit. False without a limit.
        above_limit: `lower` lies above the policy's limit. False without a limit.
    """

    items: int
    points: float
    lower: float
    upper: float
    below_limit: bool = False
    above_limit: bool = False


@dataclass(frozen=True)
class SliceJudgment:
    """The figures of one slice of a suite.

    Attributes:
        name: the slice's value in the column that the suite's data names.
        score: score of the adapter on the new base, on the items of the slice, in points.
        versus_old_base: comparison with the same adapter on the base that it was trained on.
        required: whether the policy requires the slice.
        clusters: number of clusters of its items; 0 if all items are independent.
        items_needed: estimated number of items of this slice that would decide its test with a
            probability of 80 %. 0 if it is decided or not required.
    """

    name: str
    score: float
    versus_old_base: Comparison
    required: bool = False
    clusters: int = 0
    items_needed: int = 0


@dataclass(frozen=True)
class SuiteJudgment:
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
        clusters: number of clusters of the compared items; 0 if all items are independent.
        design_effect: variance of the difference from the old base relative to independent items.
        negative_flips: items that were right on the old base and are wrong on the new one. None in
            outcomes that were recorded without them.
        slices: the figures of each slice, by name; empty if the suite has no slices.
        engine: name of the engine that answered on both bases (`Evaluation.engine`).
        engine_note: why the default engine answered instead of the policy's; empty if it did not.
    """

    suite: str
    score: float
    versus_old_base: Comparison
    power: float
    versus_bare_base: Comparison | None = None
    versus_fresh_adapter: Comparison | None = None
    items_needed: int = 0
    prefix: Prefix | None = None
    clusters: int = 0
    design_effect: float = 1.0
    negative_flips: NegativeFlips | None = None
    slices: tuple[SliceJudgment, ...] = ()
    engine: str = DEFAULT_ENGINE
    engine_note: str = ""

    @property
    def required_slices(self) -> tuple[SliceJudgment, ...]:
        """The slices that the policy requires."""
        return tuple(found for found in self.slices if found.required)

    @property
    def items(self) -> int:
        """Number of items that the adapter answered on the new base."""
        return self.versus_old_base.items

    @property
    def more_items(self) -> int:
        """Number of items to add to the suite to reach `items_needed`; 0 if it has enough."""
        suite_items = self.prefix.suite_items if self.prefix else self.items
        return max(self.items_needed - suite_items, 0)


def engine_lines(suites: Iterable[SuiteJudgment]) -> tuple[str, ...]:
    """Return which engine answered each suite, unless it was the default by the policy's choice."""
    return tuple(
        f"{one.suite}: {one.engine}"
        + (f", not the policy's engine: {one.engine_note}" if one.engine_note else "")
        for one in suites
        if one.engine != DEFAULT_ENGINE or one.engine_note
    )


@dataclass(frozen=True)
class Judgment:
    """A verdict, its reason as a sentence, and the figures of every suite.

    Attributes:
        verdict: the verdict.
        reason: the reason as one line of text.
        suites: the figures of every suite that was compared.
        margin_points: margin of the policy that was applied, in points. None if no suite was
            compared, and in outcomes that were recorded without it.
        alpha: one-sided level of that policy, likewise. For a recovery strategy it is its share.
        leakage: training rows that are items of a suite, for each suite; empty if they were not
            counted.
        e_value: evidence against "the adapter does not pass": the smallest wealth of the tests that
            `passed` needs, divided by alpha. None unless the policy is sequential.
    """

    verdict: Verdict
    reason: str
    suites: tuple[SuiteJudgment, ...] = ()
    margin_points: float | None = None
    alpha: float | None = None
    leakage: tuple[SuiteLeakage, ...] = ()
    e_value: float | None = None
