"""Sequential gate: evaluate a suite's items in a seeded order until the verdict is known.

The verdicts and their hypotheses are those of the gate (docs/verdicts.md). Each hypothesis is
tested by betting (`trans_peft.validation.statistics.betting`) instead of by a bound on all items.
The order does not depend on any result, so its first items are a sample of the population, as the
whole suite is. Items of one cluster follow each other and are one bet.

Levels. A wrong `passed` requires a wrong rejection on at least one suite, which happens with a
probability of at most `alpha`, for any number of suites and any stopping time. The same holds for
`retire`. For `needs-retuning` the suites share `alpha`. A stop for futility rejects nothing, so it
costs power but cannot raise an error rate.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from trans_peft.domain.evaluation import Evaluation, GatePolicy, ItemResult, Verdict
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.betting import BettingTest
from trans_peft.validation.statistics.order import SuiteClusters, cluster_of, order, order_seed

__all__ = [
    "EvaluatedModel",
    "ItemRequest",
    "SequentialGate",
    "SequentialSuiteTest",
    "batch_ends",
    "replay",
]

_MIN_BATCH_SIZE = 32
_MAX_BATCHES = 16


class EvaluatedModel(StrEnum):
    """A model on the new base: with the adapter, or the bare base."""

    CANDIDATE = "candidate"
    BARE = "bare"


class ItemRequest(NamedTuple):
    """The next items to evaluate, in this order: suite name, model and item ids."""

    suite: str
    model: EvaluatedModel
    ids: tuple[str, ...]


def batch_ends(items: int) -> range:
    """Return the numbers of items after which the tests are examined; at most 16, 32 or more apart.

    The last number may be larger than `items`.
    """
    size = max(_MIN_BATCH_SIZE, -(-items // _MAX_BATCHES))
    return range(size, items + size, size)


class SequentialSuiteTest:
    """The four betting tests of one required suite, and the results observed so far.

    Attributes:
        suite: name of the suite.
        seed: seed of the order.
        order: all item ids, in the order in which they are evaluated.
        levels: significance levels of the tests.
        clusters: the clusters of the items; one for each item of a suite without clusters.
        batch_ends: numbers of items after which the tests are examined. Each completes a cluster.
        old: whether the answer on the old base was right, for each item of `order`.
        slices: the slice of each item of `order`; empty texts without slices.
        changes: new base minus old base for each item, in this order; each -1, 0 or 1.
        bare_differences: adapter minus bare base for each item, likewise.
        non_inferior: test that the loss against the old base is smaller than the margin.
        inferior: test that the loss against the old base is larger than the margin.
        superior: test that the adapter is better than the bare base.
        baseline_non_inferior: test that the bare base is less than the margin worse.
        few_flips: test that the share of negative flips lies below the policy's limit; None without
            a limit.
        many_flips: test that it lies above the limit; None without a limit.
    """

    def __init__(
        self, policy: GatePolicy, reference: Evaluation, seed: str, *, suites: int
    ) -> None:
        if reference.has_degrees:
            raise InvalidSpecError(
                f"suite {reference.suite!r} has degrees, which a sequential policy cannot test",
                expected="a suite whose items are right or wrong",
                found="a graded scoring rule without a threshold, several answers to an item, or a "
                "judge model",
                do="set `threshold` or `samples: 1` in the suite, or `sequential: false` in the "
                "gate policy",
            )
        self.suite, self.seed = reference.suite, seed
        clusters = {item.id: cluster_of(item) for item in reference.items}
        self.order = order(clusters, seed, clusters)
        self.clusters = SuiteClusters([clusters[id_] for id_ in self.order])
        ends = [self.clusters.end_after(end) for end in batch_ends(len(self.order))]
        self.batch_ends = tuple(dict.fromkeys(ends))
        self.changes: list[int] = []
        self.bare_differences: list[int] = []
        items = {item.id: item for item in reference.items}
        self.old = [bool(items[id_].correct) for id_ in self.order]
        self.slices = [items[id_].slice for id_ in self.order]
        self._correct: dict[EvaluatedModel, list[bool]] = {
            EvaluatedModel.CANDIDATE: [],
            EvaluatedModel.BARE: [],
        }
        self.levels = policy.levels(suites)
        margin = policy.margin_points / 100

        def betting_test(threshold: float, alpha: float, effect: float = margin) -> BettingTest:
            return BettingTest(
                threshold,
                items=self.clusters.count,
                alpha=alpha,
                effect=effect * self.clusters.mean_weight,
                unit_steps=self.clusters.are_single,
            )

        self.non_inferior = betting_test(-margin, self.levels.alpha)
        self.inferior = betting_test(margin, self.levels.inferiority)
        self.superior = betting_test(0.0, self.levels.alpha)
        self.baseline_non_inferior = betting_test(-margin, self.levels.alpha)
        self.few_flips = self.many_flips = None
        if policy.max_negative_flip_points is not None:
            limit = policy.max_negative_flip_points / 100
            self.few_flips = betting_test(-limit, self.levels.alpha, limit)
            self.many_flips = betting_test(limit, self.levels.inferiority, limit)

    @property
    def inferiority_tests(self) -> list[BettingTest]:
        """The tests of which one significant result leads to `needs-retuning`."""
        return [self.inferior, *filter(None, [self.many_flips])]

    def pass_tests(self, *, must_beat_bare: bool) -> list[BettingTest]:
        """Return the tests that must all be significant for `passed`."""
        superior = [self.superior] if must_beat_bare else []
        return [self.non_inferior, *filter(None, [self.few_flips]), *superior]

    def observed_count(self, model: EvaluatedModel) -> int:
        """Return the number of items observed for one model."""
        return len(self._correct[model])

    def score(self, model: EvaluatedModel) -> float:
        """Return the share of correct answers of one model, in points, on its observed items."""
        return 100 * sum(self._correct[model]) / self.observed_count(model)

    @property
    def reference_score(self) -> float:
        """Share of correct answers on the old base, in points, on the items of `changes`."""
        return 100 * sum(self.old[: len(self.changes)]) / len(self.changes)

    def next_ids(self, model: EvaluatedModel) -> tuple[str, ...]:
        """Return the ids of the next batch of one model."""
        done = self.observed_count(model)
        end = next(end for end in self.batch_ends if end > done)
        return self.order[done:end]

    def observe(self, model: EvaluatedModel, correct: Mapping[str, bool]) -> None:
        """Add results of the next items of one model, and update the tests that they allow.

        Raises:
            InvalidSpecError: the items are not the next ones in `order`.
        """
        done = self.observed_count(model)
        expected = self.order[done : done + len(correct)]
        if set(expected) != set(correct):
            raise InvalidSpecError(
                f"suite {self.suite!r}: results of other items than the next ones",
                expected=expected[:5],
                found=tuple(correct)[:5],
                do="evaluate the items that SequentialGate.next_request returns",
            )
        self._correct[model] += [correct[id_] for id_ in expected]
        new, bare = self._correct[EvaluatedModel.CANDIDATE], self._correct[EvaluatedModel.BARE]
        start = len(self.changes)
        for change, weight in self._extended(self.changes, new, self.old):
            self.non_inferior.observe(change, weight)
            self.inferior.observe(-change, weight)
        if self.few_flips is not None and self.many_flips is not None:
            losses = [int(change < 0) for change in self.changes]
            for loss, weight in self.clusters.bets(losses, start):
                self.few_flips.observe(-loss, weight)
                self.many_flips.observe(loss, weight)
        for difference, weight in self._extended(self.bare_differences, new, bare):
            self.superior.observe(difference, weight)
            self.baseline_non_inferior.observe(-difference, weight)

    def _extended(
        self, differences: list[int], new: Sequence[bool], other: Sequence[bool]
    ) -> list[tuple[float, float]]:
        """Add the differences of clusters that both sides answered, and return their bets."""
        start = len(differences)
        end = self.clusters.complete(min(len(new), len(other)))
        differences += [int(new[i]) - int(other[i]) for i in range(start, end)]
        return self.clusters.bets(differences, start)

    def next_model(self, betting_test: BettingTest) -> EvaluatedModel:
        """Return the model that has to be evaluated next to update a test."""
        if betting_test not in (self.superior, self.baseline_non_inferior):
            return EvaluatedModel.CANDIDATE
        behind = self.observed_count(EvaluatedModel.BARE) < self.observed_count(
            EvaluatedModel.CANDIDATE
        )
        return EvaluatedModel.BARE if behind else EvaluatedModel.CANDIDATE


class SequentialGate:
    """Requests items until the verdict on one adapter on one new base is known.

    The requests depend on the observed results only, so `replay` reproduces a verdict from stored
    evaluations.

    Args:
        policy: the gate policy.
        reference: complete results of the adapter on the base that it was trained on, by suite.
        base_fingerprint_sha256: fingerprint of the new base.
        bare: whether items of the bare base may be requested.

    Attributes:
        suites: the tests of every required suite, by suite name.

    Example:
        >>> while (request := gate.next_request()) is not None:
        ...     gate.observe(request.suite, request.model, evaluate(request))
        >>> gate.verdict
    """

    def __init__(
        self,
        policy: GatePolicy,
        reference: Mapping[str, Evaluation],
        base_fingerprint_sha256: str,
        *,
        bare: bool = True,
    ) -> None:
        required = policy.requires(reference)
        self.suites = {
            name: SequentialSuiteTest(
                policy,
                reference[name],
                order_seed(reference[name].suite_sha256, base_fingerprint_sha256),
                suites=len(required),
            )
            for name in required
        }
        self._must_beat_bare, self._bare = policy.must_beat_bare, bare

    def observe(self, suite: str, model: EvaluatedModel, items: Sequence[ItemResult]) -> None:
        """Add the results of a request.

        Raises:
            InvalidSpecError: the items are not those of the last request.
        """
        self.suites[suite].observe(model, {item.id: bool(item.correct) for item in items})

    def next_request(self) -> ItemRequest | None:
        """Return the next items to evaluate, or None if the verdict is known.

        Requests serve the tests for `passed` first. Once one of these is futile, they serve the
        inferiority tests, and then the tests for `retire`.
        """
        if _all_significant(self._pass_tests) or _any_significant(self._inferiority_tests):
            return None
        if _none_futile(self._pass_tests):
            return self._request_for(self._pass_tests)
        if any(betting_test.is_undecided for _, betting_test in self._inferiority_tests):
            return self._request_for(self._inferiority_tests)
        if self._bare and _none_futile(self._retire_tests):
            return self._request_for(self._retire_tests)
        return None

    @property
    def verdict(self) -> Verdict:
        """The verdict that follows from the significant tests, in the order of the gate's table."""
        if _all_significant(self._pass_tests):
            return Verdict.PASSED
        if _any_significant(self._inferiority_tests):
            return Verdict.NEEDS_RETUNING
        if _all_significant(self._retire_tests):
            return Verdict.RETIRE
        return Verdict.INCONCLUSIVE

    @property
    def smallest_wealth(self) -> float:
        """Smallest wealth of the tests that `passed` needs. Divided by `alpha`, it is an e-value.

        If one of their hypotheses is true, the wealth of its test has a mean of at most `alpha`.
        """
        return min(float(betting_test.wealth) for _, betting_test in self._pass_tests)

    @property
    def _pass_tests(self) -> list[tuple[SequentialSuiteTest, BettingTest]]:
        return [
            (test, betting_test)
            for test in self.suites.values()
            for betting_test in test.pass_tests(must_beat_bare=self._must_beat_bare)
        ]

    @property
    def _inferiority_tests(self) -> list[tuple[SequentialSuiteTest, BettingTest]]:
        return [
            (test, betting_test)
            for test in self.suites.values()
            for betting_test in test.inferiority_tests
        ]

    @property
    def _retire_tests(self) -> list[tuple[SequentialSuiteTest, BettingTest]]:
        return [(test, test.baseline_non_inferior) for test in self.suites.values()]

    def _request_for(
        self, betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]
    ) -> ItemRequest | None:
        for name, test in self.suites.items():
            for owner, betting_test in betting_tests:
                if owner is test and betting_test.is_undecided:
                    model = test.next_model(betting_test)
                    return ItemRequest(name, model, test.next_ids(model))
        return None


def _all_significant(betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]) -> bool:
    return all(betting_test.is_significant for _, betting_test in betting_tests)


def _any_significant(betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]) -> bool:
    return any(betting_test.is_significant for _, betting_test in betting_tests)


def _none_futile(betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]) -> bool:
    return all(
        betting_test.is_significant or betting_test.is_undecided
        for _, betting_test in betting_tests
    )


def replay(
    policy: GatePolicy,
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
) -> SequentialGate:
    """Return the gate after it observed stored results, up to its verdict.

    Raises:
        InvalidSpecError: the stored results end before the verdict is known.
    """
    (base,) = {result.base_fingerprint_sha256 for result in candidate.values()} or {""}
    gate = SequentialGate(policy, reference, base, bare=bool(bare))
    while (request := gate.next_request()) is not None:
        results = {EvaluatedModel.CANDIDATE: candidate, EvaluatedModel.BARE: bare}[
            request.model
        ].get(request.suite)
        stored = {item.id: item for item in results.items} if results else {}
        missing = [id_ for id_ in request.ids if id_ not in stored]
        if missing:
            raise InvalidSpecError(
                f"suite {request.suite!r}: {request.model} has too few results for a verdict",
                expected=f"{len(missing)} more items, starting with {missing[0]}",
                found=f"results of {len(stored)} items",
                do="evaluate the items that SequentialGate.next_request returns",
            )
        gate.observe(request.suite, request.model, [stored[id_] for id_ in request.ids])
    return gate
