"""The plan and the aliases that follow from the state of the registry."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.states import Failed

from tasks.retries import RETRIES, is_infrastructure_failure
from tests.lifecycle.fleet import FAMILY, POLICY, SUITE, MemoryFleet, evaluation
from trans_peft.domain.evaluation import GatePolicy, Verdict
from trans_peft.domain.outcome import Plan, Reason
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryPolicy, RecoveryStrategy, StrategyAttempt
from trans_peft.errors import BaseUnreadableError, NotFoundError, NotServedError, WorkerError
from trans_peft.lifecycle.reconcile import (
    MAX_ATTEMPTS,
    MAX_ESTIMATES,
    observe,
    observe_adapter,
    plan,
    with_cost_estimates,
)
from trans_peft.lifecycle.resolve import resolve
from trans_peft.lifecycle.transfer import TransferInputs, record_failure, transfer


def lines(tasks):
    return [(item.adapter, item.base.version, item.reason, item.attempt) for item in tasks]


def test_every_live_adapter_is_planned_on_a_new_base_before_promotion(fleet, two_bases):
    assert lines(fleet.tasks()) == [
        ("chat", "v2", Reason.NO_VERDICT, 1),
        ("code", "v2", Reason.NO_VERDICT, 1),
    ]


def test_a_pending_retraining_is_planned_until_it_was_tried(fleet, two_bases):
    recipe = TrainingRecipe("chat", FAMILY, SUITE.data, (SUITE,), base_version="v2")
    chat, code = fleet.tasks()
    judged = fleet.judge(chat, Verdict.NEEDS_RETUNING)
    fleet.judge(code)
    for left in (recipe, None):
        fleet.platform.registry.record(replace(judged, training=left))
        seen = observe(FAMILY, fleet.platform)
        assert plan(seen, POLICY).trainings == ((recipe,) if left else ())
        assert (
            plan(seen, replace(POLICY, margin_points=1.0)).trainings == ()
        )  # evaluated again first


def test_a_promotion_is_awaited_until_the_base_serves(fleet):
    v1, v2 = fleet.add_base("v1"), fleet.add_base("v2")
    fleet.add_adapter("chat", v1)

    def awaited():
        return plan(observe(FAMILY, fleet.platform), POLICY).awaited

    assert awaited() is None  # no champion
    fleet.promote(v1)
    assert awaited() == v1.ref
    fleet.apply_verdicts()
    assert awaited() is None  # v2 is an upload
    fleet.promote(v2)
    assert awaited() == v2.ref
    fleet.complete_tasks()
    fleet.apply_verdicts()
    assert awaited() is None


@pytest.mark.parametrize(
    ("name", "value"), [("_DECODING_REVISION", 2), ("_SCORING_REVISIONS", {"exact_match": 2})]
)
def test_a_worker_whose_code_scores_in_another_way_does_nothing(
    fleet, two_bases, monkeypatch, name, value
):
    planned = fleet.tasks()
    seen = observe(FAMILY, fleet.platform)
    assert TransferInputs.of(planned[0], seen).task == planned[0]
    monkeypatch.setattr(f"trans_peft.domain.evaluation.{name}", value)
    with pytest.raises(WorkerError, match="the code of this worker scores the suites of chat"):
        transfer(planned[0], seen, POLICY, fleet.platform)
    assert lines(fleet.tasks()) == lines(planned)
    by_older_code = replace(planned[0], suites_sha256="")
    assert TransferInputs.of(by_older_code, seen).task == by_older_code


def test_a_second_run_plans_nothing(fleet, two_bases):
    fleet.complete_tasks()
    fleet.apply_verdicts()
    assert fleet.tasks() == ()
    assert fleet.apply_verdicts().aliases == ()


def test_nothing_is_planned_on_a_base_that_is_not_ready(fleet, two_bases):
    fleet.complete_tasks()
    fleet.platform.catalog.register_manually(FAMILY, "memory://bases/v3")
    assert fleet.tasks() == ()


def test_nothing_is_planned_on_a_base_older_than_serving(fleet):
    v1, v2 = fleet.add_base("v1"), fleet.add_base("v2")
    fleet.promote(v2)
    fleet.apply_verdicts()
    fleet.add_adapter("new", v2)
    assert fleet.tasks() == ()
    fleet.promote(v1)  # until a person wants it back
    assert lines(fleet.tasks()) == [("new", "v1", Reason.NO_VERDICT, 1)]


def test_each_adapter_is_planned_on_each_newer_base_after_failures(fleet, two_bases):
    fleet.complete_tasks(Verdict.NEEDS_RETUNING)
    fleet.add_base("v3")
    assert {(w.adapter, w.base.version, w.source_number) for w in fleet.tasks()} == {
        ("chat", "v3", 1),
        ("code", "v3", 1),
    }


def test_the_newest_base_is_planned_first(fleet, two_bases):
    fleet.add_base("v3")
    assert [w.base.version for w in fleet.tasks()] == ["v3", "v3", "v2", "v2"]


def test_the_champion_is_planned_before_newer_bases(fleet, two_bases):
    _, v2 = two_bases
    fleet.add_base("v3")
    fleet.promote(v2)
    assert [w.base.version for w in fleet.tasks()] == ["v2", "v2", "v3", "v3"]


def test_nothing_is_planned_on_bases_older_than_champion(fleet, two_bases):
    v3 = fleet.add_base("v3")
    fleet.promote(v3)
    assert {w.base.version for w in fleet.tasks()} == {"v3"}
    fleet.promote(None)  # paused: any of them may yet be wanted
    assert {w.base.version for w in fleet.tasks()} == {"v2", "v3"}


@pytest.mark.parametrize(
    "meanwhile", ["judged", "failed", "retired", "retuned", "passed over", "another policy"]
)
def test_a_task_is_not_needed_after_it_was_done_or_became_obsolete(fleet, two_bases, meanwhile):
    v1, _ = two_bases
    task = fleet.tasks()[0]
    assert fleet.needs(task)
    policy = POLICY
    match meanwhile:
        case "judged":
            fleet.judge(task)
        case "failed":  # the attempt is counted: it is other work now
            fleet.judge(task, Verdict.FAILED)
        case "retired":
            fleet.platform.registry.retire_manually(task.adapter)
        case "retuned":
            fleet.add_adapter(task.adapter, v1, weights="retuned")
        case "passed over":
            fleet.promote(fleet.add_base("v3"))
        case "another policy":
            fleet.judge(task)
            policy = GatePolicy(margin_points=1.0)
            (again,) = [w for w in fleet.tasks(policy) if w.adapter == task.adapter]
            assert fleet.needs(again, policy)
            return
    assert not fleet.needs(task, policy)


def test_a_task_is_for_the_files_of_a_base_and_not_for_its_label(fleet, two_bases):
    """The label may be that of another base by the time the task starts."""
    task = fleet.tasks()[0]
    other = replace(task, base=replace(task.base, fingerprint_sha256="f" * 64))
    assert fleet.needs(task) and not fleet.needs(other)
    seen = observe_adapter(task.adapter, FAMILY, fleet.platform)
    with pytest.raises(NotFoundError, match="base version 'v2' with the fingerprint ffffffffffff"):
        record_failure(other, seen, POLICY, fleet.platform, reason="given by the test")


def test_a_changed_policy_is_planned_with_zero_cost(fleet, two_bases):
    fleet.complete_tasks()
    stricter = GatePolicy(margin_points=1.0)
    again = fleet.tasks(stricter)
    assert [w.reason for w in again] == [Reason.POLICY_CHANGED] * 2
    assert [w.estimated_seconds for w in again] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("verdict", "recovery", "seconds"),
    [
        (Verdict.PASSED, RecoveryPolicy(scales=(2.0,)), 0.0),
        (Verdict.NEEDS_RETUNING, RecoveryPolicy(), 0.0),
        (Verdict.NEEDS_RETUNING, RecoveryPolicy(scales=(2.0,)), None),
    ],
)
def test_a_recovery_under_a_changed_policy_has_a_cost(fleet, two_bases, verdict, recovery, seconds):
    fleet.complete_tasks(verdict)
    again = fleet.tasks(GatePolicy(margin_points=1.0, recovery=recovery))
    assert [w.estimated_seconds for w in again] == [seconds] * 2


def test_the_plan_names_the_cost_of_recoveries(fleet, two_bases):
    policy = GatePolicy(recovery=RecoveryPolicy(scales=(2.0,)))

    def cost(policy):
        seen = observe(FAMILY, fleet.platform)
        return with_cost_estimates(plan(seen, policy), seen, fleet.platform).recovery_cost

    assert cost(POLICY) == ""
    assert cost(policy).startswith("the estimates do not include the recovery (rescaled)")
    for task, seconds in zip(fleet.tasks(), (30.0, 50.0), strict=True):
        tried = (
            StrategyAttempt(RecoveryStrategy.DIRECT, "needs-retuning", "given", 9.0),
            StrategyAttempt(RecoveryStrategy.COMPENSATED, "", "no prompts", 1.0),
            StrategyAttempt(RecoveryStrategy.RESCALED, "passed", "given", seconds),
        )
        fleet.platform.registry.record(replace(fleet.judge(task), tried=tried))
    fleet.add_base("v3")
    assert "takes about 40 s more, the median recovery of this family" in cost(policy)
    others = replace(POLICY, recovery=RecoveryPolicy(retune_steps=20))
    assert cost(others).startswith("the estimates do not include the recovery (re-tuned)")


@pytest.mark.parametrize(
    ("estimates", "total"),
    [
        ((), ""),
        ((None, None), ""),
        ((30.0, 60.0), "about 1.5 minutes on one GPU slot"),
        ((3600.0, None, 7200.0), "about 4.5 hours on one GPU slot, by the mean of 2 estimates"),
    ],
)
def test_a_plan_states_how_long_its_transfers_take_together(fleet, two_bases, estimates, total):
    task, _ = fleet.tasks()
    tasks = tuple(replace(task, estimated_seconds=seconds) for seconds in estimates)
    found = Plan(FAMILY, tasks).total_cost
    assert found == (f"all transfers together take {total}" if total else "")


def test_a_changed_policy_does_not_repeat_incompatible_transfers(fleet, two_bases):
    fleet.complete_tasks(Verdict.INCOMPATIBLE)
    assert fleet.tasks(GatePolicy(margin_points=1.0)) == ()


def test_the_estimate_is_the_duration_of_the_reference_evaluation(fleet, two_bases):
    v1, _ = two_bases
    (chat,) = fleet.platform.registry.versions("chat")
    fleet.platform.evaluations.put(evaluation(chat.weights_sha256, v1, 8, 10, seconds=42.0))
    seen = observe(FAMILY, fleet.platform)
    found = with_cost_estimates(plan(seen, POLICY), seen, fleet.platform)
    estimates = {w.adapter: w.estimated_seconds for w in found.tasks}
    assert estimates == {"chat": 42.0, "code": None}


def test_the_estimate_is_the_longest_transfer_so_far(fleet, two_bases):
    task = fleet.tasks()[0]
    outcome = fleet.judge(task)
    fleet.platform.registry.record(replace(outcome, seconds=17.0))
    fleet.add_base("v3")
    seen = observe(FAMILY, fleet.platform)
    found = with_cost_estimates(plan(seen, POLICY), seen, fleet.platform)
    estimates = {w.adapter: w.estimated_seconds for w in found.tasks}
    assert estimates == {"chat": None, "code": None} | {task.adapter: 17.0}


def test_a_large_plan_reads_few_evaluations(fleet, two_bases):
    for number in range(MAX_ESTIMATES + 5):
        fleet.add_adapter(f"more-{number}", two_bases[0])
    reads = []
    store = SimpleNamespace(summary=reads.append)
    seen = observe(FAMILY, fleet.platform)
    with_cost_estimates(plan(seen, POLICY), seen, replace(fleet.platform, evaluations=store))
    assert len(reads) == MAX_ESTIMATES


def test_a_task_is_parked_after_three_failures(fleet, two_bases):
    for attempt in range(1, MAX_ATTEMPTS + 1):
        tasks = [w for w in fleet.tasks() if w.adapter == "chat"]
        assert [w.attempt for w in tasks] == [attempt]
        fleet.judge(tasks[0], Verdict.FAILED)
    found = plan(observe(FAMILY, fleet.platform), POLICY)
    assert [w.adapter for w in found.tasks] == ["code"]
    assert [w.adapter for w in found.parked] == ["chat"]


def test_a_new_policy_starts_a_parked_task_at_its_first_attempt(fleet, two_bases):
    """Attempts count for each policy, in the plan as in `TransferOutcome.counted_after`."""
    stricter = GatePolicy(margin_points=1.0)
    for policy in (POLICY, stricter):
        for attempt in range(1, MAX_ATTEMPTS + 1):
            (task,) = (w for w in fleet.tasks(policy) if w.adapter == "chat")
            assert (task.attempt, task.estimated_seconds) == (attempt, None)
            fleet.judge(task, Verdict.FAILED, policy)
        found = plan(observe(FAMILY, fleet.platform), policy)
        assert [w.adapter for w in found.parked] == ["chat"]


def test_a_retrained_adapter_is_planned_with_its_new_weights(fleet, two_bases):
    v1, _ = two_bases
    fleet.complete_tasks()
    fleet.add_adapter("chat", v1, weights="retuned")
    assert lines(fleet.tasks()) == [("chat", "v2", Reason.NO_VERDICT, 1)]


@pytest.mark.parametrize(
    ("verdict", "serves"),
    [
        (Verdict.PASSED, True),
        (Verdict.NEEDS_RETUNING, False),
        (Verdict.INCONCLUSIVE, False),
        (Verdict.RETIRE, False),
        (Verdict.INCOMPATIBLE, False),
    ],
)
def test_the_verdict_decides_the_alias(fleet, two_bases, verdict, serves):
    _, v2 = two_bases
    fleet.complete_tasks(verdict)
    fleet.apply_verdicts()
    assert (fleet.platform.registry.alias("chat", v2.alias) is not None) is serves


def test_a_failure_does_not_remove_the_alias(fleet, two_bases):
    _, v2 = two_bases
    fleet.complete_tasks()
    fleet.apply_verdicts()
    again = next(w for w in fleet.tasks(GatePolicy(margin_points=1.0)) if w.adapter == "chat")
    fleet.judge(again, Verdict.FAILED, GatePolicy(margin_points=1.0))
    fleet.apply_verdicts()
    assert fleet.platform.registry.alias("chat", v2.alias) == 2


def test_an_unreadable_adapter_does_not_affect_others(fleet, two_bases):
    v1, _ = two_bases
    other = replace(v1.ref, fingerprint_sha256="f" * 64)
    orphan = replace(fleet.add_adapter("orphan", v1), adapter="stray", base=other)
    fleet.platform.registry.register(orphan, fleet.work_dir / "peft")
    found = plan(observe(FAMILY, fleet.platform), POLICY)
    assert {w.adapter for w in found.tasks} == {"chat", "code", "orphan"}
    (reason,) = found.unreadable
    assert reason.startswith("stray: the adapter has no trained version")


def test_a_base_that_cannot_be_read_charges_no_adapter_and_parks_none(fleet, two_bases):
    v1, v2 = two_bases
    for base in (v2, v1):
        lost = fleet.platform.catalog._fingerprints.pop(base.fingerprint_sha256)
        for task in fleet.tasks():
            seen = observe_adapter(task.adapter, FAMILY, fleet.platform)
            with pytest.raises(
                BaseUnreadableError, match=f"the base small/{base.version}"
            ) as caught:
                transfer(task, seen, POLICY, fleet.platform)
            assert is_infrastructure_failure(Failed(data=caught.value))
            assert not RETRIES["retry_condition_fn"](None, None, Failed(data=caught.value))
        fleet.platform.catalog._fingerprints[base.fingerprint_sha256] = lost
    assert {task.attempt for task in fleet.tasks()} == {1}


def test_a_retired_adapter_is_not_planned(fleet, two_bases):
    fleet.platform.registry.retire_manually("chat")
    assert {w.adapter for w in fleet.tasks()} == {"code"}


def test_resolve_raises_the_verdict_instead_of_another_version(fleet, two_bases):
    fleet.complete_tasks(Verdict.NEEDS_RETUNING)
    fleet.apply_verdicts()
    with pytest.raises(NotServedError, match=r"needs-retuning: given by the test"):
        resolve("chat", fleet.platform, base="v2")
    with pytest.raises(NotFoundError, match="no ready base version 'v9'"):
        resolve("chat", fleet.platform, base="v9")


def test_the_hash_of_a_suite_does_not_depend_on_its_uri():
    moved = replace(SUITE, data=replace(SUITE.data, uri="s3://elsewhere/exam.jsonl"))
    assert moved.suite_sha256 == SUITE.suite_sha256


EVENTS = st.lists(
    st.sampled_from(["base", "adapter", "promote first", "promote last", "work", "settle", "fail"]),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_completing_the_plan_reaches_the_desired_state_after_any_events(tmp_path_factory, events):
    fleet = MemoryFleet(tmp_path_factory.mktemp("fleet"))
    bases = [fleet.add_base("v1")]
    for event in events:
        match event:
            case "base":
                bases.append(fleet.add_base(f"v{len(bases) + 1}"))
            case "adapter":
                name = f"a{len(fleet.platform.registry.adapters(FAMILY))}"
                fleet.add_adapter(name, bases[-1])
            case "promote first":
                fleet.promote(bases[0])
            case "promote last":
                fleet.promote(bases[-1])
            case "work":
                for task in fleet.tasks()[:1]:
                    fleet.judge(task)
            case "fail":
                for task in fleet.tasks()[:1]:
                    fleet.judge(task, Verdict.FAILED)
            case "settle":
                fleet.apply_verdicts()
    while fleet.tasks():
        fleet.complete_tasks()
    fleet.apply_verdicts()
    fleet.complete_tasks()  # moving `serving` to an older base may ask for verdicts there
    fleet.apply_verdicts()

    seen = observe(FAMILY, fleet.platform)
    parked = {(w.adapter, w.base.version) for w in plan(seen, POLICY).parked}
    assert plan(seen, POLICY).tasks == ()
    assert seen.champion is None or seen.serving == seen.champion
    for adapter in seen.adapters:
        keys = [(v.weights_sha256, v.base.fingerprint_sha256) for v in adapter.versions]
        assert len(set(keys)) == len(keys)  # one version per base
        for base in seen.desired_bases:
            judged = adapter.outcome_on(base) is not None
            trained = adapter.versions[0].base.fingerprint_sha256 == base.fingerprint_sha256
            assert judged or trained or (adapter.name, base.version) in parked
