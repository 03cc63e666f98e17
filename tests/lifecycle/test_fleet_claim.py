"""An FDR target in the promotion policy: which adapters that passed may serve."""

from dataclasses import replace

import pytest

from tests.lifecycle.fleet import FAMILY, POLICY, MemoryFleet, obstacle_text
from trans_peft.domain.evaluation import Judgment, Verdict
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.fleet_claim import of_all_strategies
from trans_peft.lifecycle.reconcile import observe

EARLY = replace(POLICY, sequential=True)
TARGET = PromotionPolicy(min_serving_share=0.5, fdr=0.1)


@pytest.fixture
def fleet(tmp_path):
    fleet = MemoryFleet(tmp_path)
    fleet.v1, fleet.v2 = fleet.add_base("v1"), None
    for number in range(4):
        fleet.add_adapter(f"a{number}", fleet.v1)
    fleet.promote(fleet.v1)
    apply_verdicts(observe(FAMILY, fleet.platform), EARLY, PromotionPolicy(), fleet.platform)
    fleet.v2 = fleet.add_base("v2")
    fleet.promote(fleet.v2)
    return fleet


def judge(fleet, e_values):
    """Record `passed` with each e-value; None is `needs-retuning`."""
    tasks = [task for task in fleet.tasks(EARLY) if task.base == fleet.v2.ref]
    for task, e_value in zip(sorted(tasks, key=lambda task: task.adapter), e_values, strict=True):
        verdict = Verdict.NEEDS_RETUNING if e_value is None else Verdict.PASSED
        outcome = fleet.judge(task, verdict, EARLY)
        judgment = replace(outcome.judgment, e_value=e_value, alpha=0.05)
        fleet.platform.registry.record(replace(outcome, judgment=judgment))


def serving(fleet, promotion=TARGET):
    """Apply the verdicts. Returns the changes and the adapters that serve on v2."""
    _, changes = apply_verdicts(observe(FAMILY, fleet.platform), EARLY, promotion, fleet.platform)
    seen = observe(FAMILY, fleet.platform)
    return changes, {a.name for a in seen.adapters if a.serving_on(fleet.v2) is not None}


def test_enough_evidence_serves(fleet):
    judge(fleet, [20.0, 20.0, 20.0, None])  # 4 / (0.1 * 3) = 13.3
    changes, names = serving(fleet)
    assert names == {"a0", "a1", "a2"}
    assert changes.promoted == fleet.v2


def test_too_few_that_passed_do_not_serve_and_the_promotion_says_why(fleet):
    judge(fleet, [20.0, None, None, None])  # 4 / (0.1 * 1) = 40
    changes, names = serving(fleet)
    assert names == set() and changes.promoted is None
    assert "1 adapters passed, but not within the FDR target 0.1" in obstacle_text(changes)
    assert serving(fleet, PromotionPolicy(fdr=0.2))[1] == {"a0"}  # 4 / 0.2 = 20
    assert serving(fleet, TARGET)[1] == set()  # a stricter target takes the alias back


def test_an_adapter_that_is_trained_on_the_base_after_its_verdict_stays_a_hypothesis(fleet):
    judge(fleet, [20.0, None, None, None])
    target = PromotionPolicy(fdr=0.15)  # 4 / 0.15 = 26.7, but 2 / 0.15 = 13.3
    assert serving(fleet, target)[1] == set()
    fleet.add_adapter("a1", fleet.v2, weights="trained on v2")
    fleet.add_adapter("a2", fleet.v2, weights="trained on v2")
    assert serving(fleet, target)[1] == {"a1", "a2"}


def test_an_adapter_that_was_only_trained_on_the_base_is_no_hypothesis(fleet):
    fleet.add_adapter("new", fleet.v2)
    judge(fleet, [20.0, None, None, None])
    assert serving(fleet, PromotionPolicy(fdr=0.2))[1] == {"a0", "new"}  # 4 / 0.2 = 20


def retrained(fleet, name, e_value):
    """Register a version that the last strategy made after `needs-retuning`, as `retrain` does."""
    registry = fleet.platform.registry
    adapter = registry.adapter(name)
    earlier = adapter.outcome_on(fleet.v2)
    version = registry.register(
        replace(
            adapter.source,
            base=fleet.v2.ref,
            trained_on=fleet.v2.ref,
            weights_sha256=f"retrained {name}",
            made_by=RecoveryStrategy.RETRAINED,
        ),
        fleet.work_dir / "peft",
    )
    judgment = Judgment(Verdict.PASSED, "", alpha=0.05, e_value=e_value)
    made_by = {"new_number": version.number, "strategy": RecoveryStrategy.RETRAINED}
    registry.record(replace(earlier, judgment=judgment, **made_by))
    return version


def test_a_retrained_adapter_is_selected_by_the_e_value_of_its_strategy(fleet):
    judge(fleet, [None, None, None, None])
    retrained(fleet, "a0", 20.0)
    version = retrained(fleet, "a1", 20.0)
    changes, names = serving(fleet)  # 4 / (0.1 * 2) = 20
    assert names == {"a0", "a1"} and changes.promoted == fleet.v2
    assert fleet.platform.registry.alias("a1", fleet.v2.alias) == version.number


@pytest.mark.parametrize("e_value", [19.0, None])
def test_a_retrained_adapter_without_enough_evidence_does_not_serve(fleet, e_value):
    judge(fleet, [20.0, None, None, None])
    retrained(fleet, "a1", e_value)
    changes, names = serving(fleet)
    assert names == set() and changes.promoted is None
    assert "2 adapters passed, but not within the FDR target 0.1" in obstacle_text(changes)
    assert serving(fleet, PromotionPolicy())[1] == {"a0", "a1"}  # without a target, both do


def test_a_version_that_a_person_trained_after_it_is_outside_the_claim(fleet):
    judge(fleet, [None, None, None, None])
    retrained(fleet, "a1", 1.0)
    fleet.add_adapter("a1", fleet.v2, weights="trained on v2")
    assert serving(fleet)[1] == {"a1"}


def test_without_a_target_every_adapter_that_passed_serves(fleet):
    judge(fleet, [None, None, None, 20.0])
    assert serving(fleet, PromotionPolicy())[1] == {"a3"}


def test_a_verdict_without_an_e_value_does_not_count(fleet):
    judge(fleet, [20.0, 20.0, 20.0, 0.0])
    assert serving(fleet)[1] == {"a0", "a1", "a2"}


def test_adapters_without_a_verdict_are_hypotheses(fleet):
    tasks = [task for task in fleet.tasks(EARLY) if task.base == fleet.v2.ref]
    outcome = fleet.judge(tasks[0], Verdict.PASSED, EARLY)
    fleet.platform.registry.record(
        replace(outcome, judgment=replace(outcome.judgment, e_value=39.0))
    )
    assert serving(fleet)[1] == set()


def test_a_fixed_size_policy_gives_no_e_values(fleet):
    with pytest.raises(InvalidSpecError, match="the gate policy gives no e-values"):
        apply_verdicts(observe(FAMILY, fleet.platform), POLICY, TARGET, fleet.platform)


@pytest.mark.parametrize("fdr", [0.0, 1.0])
def test_an_impossible_target_is_an_error(fdr):
    with pytest.raises(InvalidSpecError, match="fdr must lie in"):
        PromotionPolicy(fdr=fdr)


def test_a_strategy_has_its_share_of_the_evidence():
    judgment = Judgment(Verdict.PASSED, "", alpha=0.0125, e_value=80.0)
    assert of_all_strategies(judgment, EARLY).e_value == pytest.approx(80 * 0.0125 / EARLY.alpha)
    assert of_all_strategies(replace(judgment, e_value=None), EARLY).e_value is None
