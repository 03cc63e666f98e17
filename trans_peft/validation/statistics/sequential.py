"""Early decisions: ask a suite's items in a seeded order, and stop once the verdict is known.

The verdicts and their claims are the gate's (docs/verdicts.md), each shown by betting
(`trans_peft.validation.statistics.betting`) instead of by a bound on all items. Every item is drawn
from the population before anything is known of it, so a prefix of an order that the results did not
choose is as good a sample as the whole suite.

How the claims combine. A wrong pass needs a wrong claim on some suite to be shown at some time:
its chance is at most `alpha`, whatever the other suites do and whenever one stops. The same holds
for `retire`; `needs-retuning` shares `alpha` among the suites. Stopping early without a claim,
because none has much of a chance any more, shows nothing and therefore costs power only.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from hashlib import sha256
from typing import NamedTuple

from trans_peft.domain.evaluation import Evaluation, GatePolicy, ItemResult, Verdict
from trans_peft.domain.identity import content_sha256
from trans_peft.errors import InvalidSpecError
from trans_peft.validation.statistics.betting import BettingTest

__all__ = [
    "Arm",
    "ItemRequest",
    "SequentialGate",
    "SequentialSuiteTest",
    "batch_ends",
    "order",
    "order_seed",
    "replay",
]

_SMALLEST_BATCH = 32
_MOST_BATCHES = 16


class Arm(StrEnum):
    """Who answers on the new base."""

    CANDIDATE = "candidate"
    BARE = "bare"


class ItemRequest(NamedTuple):
    """The items to be answered next, in this order: by whom, of which suite."""

    suite: str
    arm: Arm
    ids: tuple[str, ...]


def order_seed(suite_sha256: str, base_fingerprint_sha256: str) -> str:
    """Return the seed of a suite's order on a base.

    Nobody can choose it, every adapter on that base (and the bare base) has the same, so that
    answers can be shared, and the next base has another.
    """
    return content_sha256(["order", suite_sha256, base_fingerprint_sha256])


def order(ids: Iterable[str], seed: str) -> tuple[str, ...]:
    """Return the ids in an order that looks random and depends on nothing but them and the seed."""
    return tuple(sorted(ids, key=lambda id_: (sha256(f"{seed} {id_}".encode()).digest(), id_)))


def batch_ends(items: int) -> range:
    """Return after how many items one looks (the last end may lie beyond the last item)."""
    size = max(_SMALLEST_BATCH, -(-items // _MOST_BATCHES))
    return range(size, items + size, size)


class SequentialSuiteTest:
    """The four betting tests of one required suite, and the results observed so far.

    Attributes:
        suite: name of the suite.
        seed: seed of the order.
        order: all item ids, in the order in which they are evaluated.
        levels: significance levels of the tests.
        changes: new base minus old base for each item, in this order; each -1, 0 or 1.
        bare_differences: adapter minus bare base for each item, likewise.
        non_inferior: test that the loss against the old base is smaller than the margin.
        inferior: test that the loss against the old base is larger than the margin.
        superior: test that the adapter is better than the bare base.
        baseline_non_inferior: test that the bare base is less than the margin worse.
    """

    def __init__(
        self, policy: GatePolicy, reference: Evaluation, seed: str, *, suites: int
    ) -> None:
        self.suite, self.seed = reference.suite, seed
        self.order = order([item.id for item in reference.items], seed)
        self.changes: list[int] = []
        self.bare_differences: list[int] = []
        self._old = {item.id: item.correct for item in reference.items}
        self._answers: dict[Arm, list[bool]] = {Arm.CANDIDATE: [], Arm.BARE: []}
        self.levels = policy.levels(suites)
        margin = policy.margin_points / 100

        def betting_test(threshold: float, alpha: float) -> BettingTest:
            return BettingTest(threshold, items=len(self.order), alpha=alpha, effect=margin)

        self.non_inferior = betting_test(-margin, self.levels.alpha)
        self.inferior = betting_test(margin, self.levels.inferiority)
        self.superior = betting_test(0.0, self.levels.alpha)
        self.baseline_non_inferior = betting_test(-margin, self.levels.alpha)

    def asked(self, arm: Arm) -> int:
        """How many items that side has answered."""
        return len(self._answers[arm])

    def score(self, arm: Arm) -> float:
        """Return the share of right answers of one side, in points."""
        return 100 * sum(self._answers[arm]) / self.asked(arm)

    @property
    def reference_score(self) -> float:
        """The share of right answers on the old base, in points, of the items asked."""
        asked = self.order[: len(self.changes)]
        return 100 * sum(self._old[id_] for id_ in asked) / len(asked)

    def next_ids(self, arm: Arm) -> tuple[str, ...]:
        """Return the next batch for one side."""
        done = self.asked(arm)
        end = next(end for end in batch_ends(len(self.order)) if end > done)
        return self.order[done:end]

    def observe(self, arm: Arm, correct: Mapping[str, bool]) -> None:
        """Take answers to the next items; both sides' claims advance as far as both answered."""
        done = self.asked(arm)
        expected = self.order[done : done + len(correct)]
        if set(expected) != set(correct):
            raise InvalidSpecError(
                "these are not the items whose turn it is",
                expected=expected[:5],
                found=tuple(correct)[:5],
                do="answer the items in the order that SequentialGate.wants gives",
            )
        self._answers[arm] += [correct[id_] for id_ in expected]
        new, bare = self._answers[Arm.CANDIDATE], self._answers[Arm.BARE]
        for i in range(len(self.changes), len(new)):
            change = int(new[i]) - int(self._old[self.order[i]])
            self.changes.append(change)
            self.non_inferior.observe(change)
            self.inferior.observe(-change)
        for i in range(len(self.bare_differences), min(len(new), len(bare))):
            over = int(new[i]) - int(bare[i])
            self.bare_differences.append(over)
            self.superior.observe(over)
            self.baseline_non_inferior.observe(-over)

    def arm_of(self, betting_test: BettingTest) -> Arm:
        """Who has to answer next for a claim to advance."""
        if betting_test in (self.non_inferior, self.inferior):
            return Arm.CANDIDATE
        behind = self.asked(Arm.BARE) < self.asked(Arm.CANDIDATE)
        return Arm.BARE if behind else Arm.CANDIDATE


class SequentialGate:
    """Says what to ask next, until the verdict on one adapter on one base is known.

    `reference` is the adapter's whole result on the base it was trained on, for every suite;
    `bare` whether the bare base may be asked at all. The same answers lead to the same questions,
    so that a verdict can be told again from what was stored.
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

    def observe(self, suite: str, arm: Arm, items: Sequence[ItemResult]) -> None:
        """Take answers to the items that were wanted. InvalidSpecError for any others."""
        self.suites[suite].observe(arm, {item.id: item.correct for item in items})

    def next_request(self) -> ItemRequest | None:
        """Return what to ask next; None where the verdict is known.

        First whatever a pass still needs; once it is out of reach, whether something was lost;
        then whether the bare base is as good.
        """
        tests = self.suites.values()
        if _all_shown(self._to_pass) or any(test.inferior.is_significant for test in tests):
            return None
        if _in_reach(self._to_pass):
            return self._next(self._to_pass)
        if losing := [(test, test.inferior) for test in tests if test.inferior.open]:
            return self._next(losing)
        if self._bare and _in_reach(self._to_retire):
            return self._next(self._to_retire)
        return None

    @property
    def verdict(self) -> Verdict:
        """What the claims shown so far say, in the order of the gate's table."""
        if _all_shown(self._to_pass):
            return Verdict.PASSED
        if any(test.inferior.is_significant for test in self.suites.values()):
            return Verdict.NEEDS_RETUNING
        if _all_shown(self._to_retire):
            return Verdict.RETIRE
        return Verdict.INCONCLUSIVE

    @property
    def _to_pass(self) -> list[tuple[SequentialSuiteTest, BettingTest]]:
        tests = self.suites.values()
        needed = [
            (test, betting_test)
            for test in tests
            for betting_test in (test.non_inferior, test.superior)
        ]
        return [
            (test, betting_test)
            for test, betting_test in needed
            if self._must_beat_bare or betting_test is test.non_inferior
        ]

    @property
    def _to_retire(self) -> list[tuple[SequentialSuiteTest, BettingTest]]:
        return [(test, test.baseline_non_inferior) for test in self.suites.values()]

    def _next(
        self, betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]
    ) -> ItemRequest | None:
        for name, test in self.suites.items():
            for owner, betting_test in betting_tests:
                if owner is test and betting_test.open:
                    arm = test.arm_of(betting_test)
                    return ItemRequest(name, arm, test.next_ids(arm))
        return None


def _all_shown(betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]) -> bool:
    return all(betting_test.is_significant for _, betting_test in betting_tests)


def _in_reach(betting_tests: Sequence[tuple[SequentialSuiteTest, BettingTest]]) -> bool:
    return all(
        betting_test.is_significant or betting_test.open for _, betting_test in betting_tests
    )


def replay(
    policy: GatePolicy,
    reference: Mapping[str, Evaluation],
    candidate: Mapping[str, Evaluation],
    bare: Mapping[str, Evaluation],
) -> SequentialGate:
    """Return the gate after it was given stored answers, as far as it wanted them.

    InvalidSpecError where they end before the verdict is known.
    """
    (base,) = {result.base_fingerprint_sha256 for result in candidate.values()} or {""}
    gate = SequentialGate(policy, reference, base, bare=bool(bare))
    while (request := gate.next_request()) is not None:
        results = {Arm.CANDIDATE: candidate, Arm.BARE: bare}[request.arm].get(request.suite)
        known = {item.id: item for item in results.items} if results else {}
        missing = [id_ for id_ in request.ids if id_ not in known]
        if missing:
            raise InvalidSpecError(
                f"suite {request.suite!r}: {request.arm} has too few answers for a verdict",
                expected=f"{len(missing)} more items, the first of them {missing[0]}",
                found=f"{len(known)} answers",
                do="answer what SequentialGate.wants asks for",
            )
        gate.observe(request.suite, request.arm, [known[id_] for id_ in request.ids])
    return gate
