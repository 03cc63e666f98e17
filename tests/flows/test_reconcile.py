"""Reconcile runs that are killed, run twice, or meet manual changes end like an undisturbed run."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prefect.states import Completed, Failed

from tasks import shards
from tasks.recovery import start_training
from tests.flows.fleet_with_runs import FleetWithRuns, Killed
from tests.lifecycle.fleet import FAMILY, POLICY, SUITE
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import CompensationPolicy, RecoveryPolicy
from trans_peft.errors import StoreError

HALF = PromotionPolicy(min_serving_share=0.5)


def upgrade(folder, *, promotion=HALF) -> FleetWithRuns:
    """v1 serves five adapters, one of them blocked manually; v2 is ready and is the champion.

    On v2, one adapter needs re-tuning, and one is approved manually in spite of its verdict.
    """
    folder.mkdir()
    verdicts = {"b": Verdict.NEEDS_RETUNING, "d": Verdict.INCONCLUSIVE}
    upgraded = FleetWithRuns(folder, verdicts, promotion)
    fleet = upgraded.fleet
    v1 = fleet.add_base("v1")
    for name in "abcde":
        fleet.add_adapter(name, v1)
    fleet.promote(v1)
    fleet.apply_verdicts()
    v2 = fleet.add_base("v2")
    fleet.platform.registry.set_alias_manually("e", v1.alias, None)
    fleet.platform.registry.set_alias_manually("d", v2.alias, 2)
    fleet.promote(v2)
    return upgraded


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    upgraded = upgrade(tmp_path / "undisturbed")
    upgraded.reconcile(monkeypatch)
    return upgraded


class TestOneRun:
    def test_judges_in_shards_and_moves_the_fleet(self, undisturbed):
        assert [len(run.tasks) for run in undisturbed.runs] == [2, 2, 1]
        assert undisturbed.fleet.serving == 2
        alias = alias_on(undisturbed, "v2")
        aliases = [undisturbed.fleet.platform.registry.alias(name, alias) for name in "abcde"]
        assert aliases == [2, None, 2, 2, 2]

    def test_twice_changes_nothing(self, undisturbed, monkeypatch):
        before = undisturbed.final_state
        state = undisturbed.reconcile(monkeypatch)
        assert (state.name, state.message) == ("Completed", "no verdict is missing")
        assert undisturbed.final_state == before
        assert len(undisturbed.runs) == 3

    def test_a_dry_run_changes_nothing(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "dry")
        before = upgraded.final_state
        assert upgraded.reconcile(monkeypatch, dry_run=True).name == "Completed"
        assert (upgraded.final_state, upgraded.runs, upgraded.moments) == (before, [], 0)

    def test_a_dry_run_names_the_adapters_without_prompts(self, tmp_path, monkeypatch):
        recovery = RecoveryPolicy(compensation=CompensationPolicy())
        upgraded = upgrade(tmp_path / "prompts")
        upgraded.reconcile(monkeypatch, policy=replace(POLICY, recovery=recovery), dry_run=True)
        ((plan, unprepared),) = upgraded.plans
        assert {task.adapter for task in plan.tasks} <= {*unprepared} == {*"abcde"}

    def test_starts_a_bounded_number_of_shards_at_a_time(self, undisturbed, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "max_active", lambda slots: 2 * slots)
        monkeypatch.setattr(shards, "enough_ended", lambda slots: slots)
        upgraded = upgrade(tmp_path / "bounded")
        upgraded.shard_size = 1
        active = []
        monkeypatch.setattr(
            FleetWithRuns,
            "work_one_shard",
            lambda self, plain=FleetWithRuns.work_one_shard: (
                active.append(sum(run.state == "Scheduled" for run in self.runs)),
                plain(self),
            ),
        )
        upgraded.reconcile(monkeypatch)
        assert [len(run.tasks) for run in upgraded.runs] == [1] * 5
        assert active == [2, 2, 2, 2, 1]
        assert upgraded.final_state == undisturbed.final_state

    def test_a_shard_that_ends_while_the_fleet_is_read_is_not_started_again(
        self, undisturbed, tmp_path, monkeypatch
    ):
        upgraded = upgrade(tmp_path / "read")
        read = upgraded._read

        def slow_read(family):
            fleet = read(family)
            upgraded.work_one_shard()
            return fleet

        monkeypatch.setattr(upgraded, "_read", slow_read)
        monkeypatch.setattr(shards, "enough_ended", lambda slots: 1)
        upgraded.reconcile(monkeypatch)
        started = [task.adapter for run in upgraded.runs for task in run.tasks]
        assert sorted(started) == [*"abcde"]
        assert upgraded.final_state == undisturbed.final_state

    def test_shards_of_a_promotion_go_ahead_of_those_that_wait(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "urgent")
        fleet = upgraded.fleet
        fleet.promote(fleet.platform.catalog.versions(FAMILY)[0])  # v2 is an upload, no promotion
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(FleetWithRuns, "_wait", killed)
            upgraded.reconcile(monkeypatch)
        assert [(run.state, run.is_urgent) for run in upgraded.runs] == [("Scheduled", False)] * 3
        fleet.promote(fleet.platform.catalog.versions(FAMILY)[1])
        assert upgraded.reconcile(monkeypatch).name == "Completed"
        assert [(run.state, run.is_urgent) for run in upgraded.runs] == [
            *[("Withdrawn", False)] * 3, *[("Completed", True)] * 3,
        ]  # fmt: skip
        assert fleet.serving == 2

    def test_a_base_that_fails_withdraws_no_shard_on_another(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "enough_ended", lambda slots: slots)
        upgraded = upgrade(tmp_path / "failing")
        fleet = upgraded.fleet
        fleet.promote(fleet.platform.catalog.versions(FAMILY)[0])
        fleet.add_base("v3")
        plain = upgraded.judge
        monkeypatch.setattr(
            upgraded, "judge", lambda task: task.base.version == "v3" or plain(task)
        )
        assert "ended as Completed" in upgraded.reconcile(monkeypatch).message
        assert [(run.tasks[0].base.version, run.state) for run in upgraded.runs] == [
            *[("v3", "Completed")] * 3, *[("v2", "Completed")] * 3,
        ]  # fmt: skip

    def test_reports_before_an_upload_and_after_its_shards_were_started(
        self, undisturbed, monkeypatch
    ):
        undisturbed.reported.clear()
        monkeypatch.setattr(
            undisturbed,
            "_ingestion",
            SimpleNamespace(
                prepare_for_upload=lambda: None,
                find_pending=lambda return_state: Completed(data=("upload of v3",)),
                ingest_pending=lambda upload, return_state: Completed(
                    data=undisturbed.fleet.add_base("v3")
                ),
            ),
        )
        undisturbed.reconcile(monkeypatch)
        # Before the upload is ingested, after its shards were started, and after they have ended.
        assert undisturbed.reported == [3, 6, 6]

    def test_reports_a_wrong_clock_and_works(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "clock")
        upgraded.clock = "the clock of this worker is wrong"
        state = upgraded.reconcile(monkeypatch)
        assert (state.name, state.message) == ("Failed", "the clock of this worker is wrong")
        assert upgraded.fleet.serving == 2

    def test_reports_an_unknown_family(self, undisturbed, monkeypatch):
        state = undisturbed.reconcile(monkeypatch, family="smal")
        assert state.name == "Failed"
        assert "no base family 'smal'" in state.message

    def test_fails_with_the_reason_if_the_promotion_is_refused(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "strict", promotion=PromotionPolicy(min_serving_share=1.0))
        state = upgraded.reconcile(monkeypatch)
        assert state.name == "Failed"
        assert "4 of 5 live adapters serve there, not b (needs-retuning)" in state.message
        assert upgraded.fleet.serving == 1

    def test_finds_active_shards_and_does_not_start_them_again(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "joined")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(FleetWithRuns, "_wait", killed)
            upgraded.reconcile(monkeypatch)
        assert [run.state for run in upgraded.runs] == ["Scheduled"] * 3
        state = upgraded.reconcile(monkeypatch)
        assert (state.name, state.message) == ("Completed", "other runs work on 5 verdicts")
        upgraded.unserved = "no worker serves the queue gpu"
        state = upgraded.reconcile(monkeypatch)
        assert (state.name, state.message) == ("Failed", "no worker serves the queue gpu")
        assert len(upgraded.runs) == 3
        assert upgraded.reconcile(monkeypatch, wait=True).message == "no verdict is missing"
        assert len(upgraded.runs) == 3
        assert upgraded.fleet.serving == 2


class TestChangedPolicy:
    """A run judges by the policies of its deployment or not at all."""

    STRICTER = replace(POLICY, margin_points=1.0)

    def test_a_run_that_was_created_before_the_change_does_nothing(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "created")
        state = upgraded.reconcile(monkeypatch, policy=self.STRICTER, family=FAMILY, wait=True)
        assert (state.type, state.name) == ("FAILED", "Superseded")
        assert "the gate policy of this run and of the deployment differ" in state.message
        assert "next-run continues" in state.message
        assert upgraded.successors == [(FAMILY, True)]
        assert (upgraded.runs, upgraded.moments) == ([], 0)

    def test_a_dry_run_may_have_any_policy(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "dry")
        state = upgraded.reconcile(monkeypatch, policy=self.STRICTER, dry_run=True)
        assert (state.name, upgraded.successors) == ("Completed", [])

    def test_a_change_during_a_run_ends_it_and_no_adapter_is_judged_by_the_old_policy(
        self, tmp_path, monkeypatch
    ):
        upgraded = upgrade(tmp_path / "during")
        judge = upgraded.judge

        def change_policy_after_the_first_adapter(task):
            judge(task)
            upgraded.policy = self.STRICTER

        upgraded.judge = change_policy_after_the_first_adapter
        monkeypatch.setattr(shards, "enough_ended", lambda slots: 1)
        assert upgraded.reconcile(monkeypatch).name == "Superseded"
        assert upgraded.successors == [(None, False)]
        old = [run for run in upgraded.runs if run.policy == POLICY]
        assert [run.state for run in old] == ["Completed", "Scheduled", "Scheduled"]
        assert [adapter for adapter, *_ in upgraded.records] == ["a"]

        assert upgraded.reconcile(monkeypatch).name == "Completed"
        assert [run.state for run in old] == ["Completed", "Withdrawn", "Withdrawn"]
        assert [adapter for adapter, *_ in upgraded.records] == ["a", *"abcde"]
        assert upgraded.reconcile(monkeypatch).message == "no verdict is missing"

    def test_a_running_shard_of_the_old_policy_takes_no_transfer(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "running")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(FleetWithRuns, "_wait", killed)
            upgraded.reconcile(monkeypatch)
        upgraded.runs[0].state = "Running"
        upgraded.policy = self.STRICTER
        assert upgraded.reconcile(monkeypatch).message == "no verdict is missing"
        assert [adapter for adapter, *_ in upgraded.records] == [*"abcde"]


class TestUnchanged:
    """A scheduled run does not read a fleet again that did not change since nothing was to do."""

    @pytest.fixture
    def settled(self, undisturbed, monkeypatch):
        undisturbed.reconcile(monkeypatch)  # the first look after the promotion
        undisturbed.reads = 0
        return undisturbed

    def again(self, settled, monkeypatch, **parameters):
        state = settled.reconcile(monkeypatch, **{"skip_unchanged_minutes": 60} | parameters)
        reads, settled.reads = settled.reads, 0
        return state.name, reads

    def test_is_not_read(self, settled, monkeypatch):
        assert self.again(settled, monkeypatch) == ("Completed", 0)

    def test_is_read_where_every_fleet_is_to_be_read(self, settled, monkeypatch):
        assert self.again(settled, monkeypatch, skip_unchanged_minutes=0) == ("Completed", 1)

    @pytest.mark.parametrize(
        "change",
        [
            lambda fleet: fleet.add_base("v3"),
            lambda fleet: fleet.promote(fleet.platform.catalog.versions(FAMILY)[0]),
            lambda fleet: fleet.promote(None),
            lambda fleet: fleet.add_adapter("fresh", fleet.platform.catalog.versions(FAMILY)[1]),
        ],
        ids=["new base", "rollback", "no champion", "new adapter"],
    )
    def test_is_read_after_a_change_until_nothing_is_to_do(self, settled, monkeypatch, change):
        change(settled.fleet)
        name, reads = self.again(settled, monkeypatch)
        assert name == "Completed" and reads >= 1
        self.again(settled, monkeypatch)
        assert self.again(settled, monkeypatch) == ("Completed", 0)

    def test_is_read_under_another_policy(self, settled, monkeypatch):
        settled.policy = replace(POLICY, margin_points=1.0)
        assert self.again(settled, monkeypatch)[1] >= 1

    def test_is_read_as_long_as_a_person_has_to_act(self, settled, monkeypatch):
        settled.promotion = replace(
            settled.promotion, required_adapters=("e",), free_rollback=False
        )
        settled.fleet.promote(settled.fleet.platform.catalog.versions(FAMILY)[0])
        for _ in range(2):
            assert self.again(settled, monkeypatch) == ("Failed", 1)


def killed(*_, **__):
    raise Killed


class TestKilled:
    def test_at_any_write_the_next_run_ends_where_an_undisturbed_one_does(
        self, undisturbed, tmp_path, monkeypatch
    ):
        for position in range(1, undisturbed.moments + 1):
            upgraded = upgrade(tmp_path / str(position))
            upgraded.at = kill_at(position)
            try:
                upgraded.reconcile(monkeypatch)
            except Killed:
                upgraded.reconcile(monkeypatch, wait=True)
            assert upgraded.final_state == undisturbed.final_state, position
            assert upgraded.moments >= position
            assert_judged_once(upgraded)

    def test_at_any_two_writes(self, undisturbed, tmp_path, monkeypatch):
        for position in range(1, undisturbed.moments + 1, 3):
            for later in (1, 2, 5, 9):
                upgraded = upgrade(tmp_path / f"{position}+{later}")
                upgraded.at = kill_at(position, position + later)
                for _ in range(3):
                    try:
                        upgraded.reconcile(monkeypatch, wait=True)
                        break
                    except Killed:
                        pass
                assert upgraded.final_state == undisturbed.final_state, (position, later)
                assert_judged_once(upgraded)

    def test_an_adapter_that_kills_every_process_is_parked_and_stops_no_other(
        self, tmp_path, monkeypatch
    ):
        upgraded = upgrade(tmp_path / "killer")
        judge = upgraded.judge
        upgraded.judge = lambda task: killed() if task.adapter == "c" else judge(task)
        state = upgraded.reconcile(monkeypatch)
        assert "parked after three failed attempts: c on small/v2" in state.message
        assert re.search(r"do: .* remove the tag trans_peft\.outcome\.on-\w+ of", state.message)
        assert upgraded.fleet.serving == 2  # 3 of 5 serve there: the policy asks for half
        assert {record[0] for record in upgraded.records} == set("abde")

    def test_an_adapter_that_kills_shared_batches_counts_against_itself_alone(
        self, tmp_path, monkeypatch
    ):
        upgraded = upgrade(tmp_path / "killer-of-batches")
        judge = upgraded.judge
        upgraded.shard_size = 5
        upgraded.judge = lambda task: killed() if task.adapter == "c" else judge(task)
        upgraded.evaluate_together = lambda tasks: (
            killed() if any(task.adapter == "c" for task in tasks) else None
        )
        state = upgraded.reconcile(monkeypatch)
        assert "parked after three failed attempts: c on small/v2" in state.message
        assert state.message.count("parked after three failed attempts") == 1
        assert {record[0] for record in upgraded.records} == set("abde")
        assert [(len(run.tasks), run.one_by_one) for run in upgraded.runs] == [
            (5, False), (5, True), (3, True), (3, True), (2, True),
        ]  # fmt: skip

    def test_is_found_even_if_reconcile_dies_with_each_shard(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "both")
        upgraded.shard_size = 5
        upgraded.evaluate_together = lambda tasks: killed()
        work = upgraded.work_one_shard
        upgraded.work_one_shard = lambda: (work(), killed())
        for _ in range(2):
            with pytest.raises(Killed):
                upgraded.reconcile(monkeypatch)
        assert [(run.state, run.one_by_one) for run in upgraded.runs] == [
            ("Crashed", False), ("Completed", True),
        ]  # fmt: skip
        assert {record[0] for record in upgraded.records} == set("abcde")

    def test_an_attempt_that_cannot_be_recorded_stops_no_other_adapter(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "not-recorded")
        judge = upgraded.judge
        upgraded.judge = lambda task: killed() if task.adapter == "c" else judge(task)

        def record_failure(task, policy, reason, return_state):
            return Failed(message="there is no base v2")

        fake = SimpleNamespace(record_failure=record_failure)
        monkeypatch.setattr(FleetWithRuns, "_transfer", fake)
        state = upgraded.reconcile(monkeypatch)
        assert "this attempt could not be recorded: there is no base v2" in state.message
        assert "cannot be reconciled" not in state.message
        assert {record[0] for record in upgraded.records} == set("abde")

    def test_a_cancelled_shard_is_continued_by_the_next_run(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "cancelled")
        work_one_shard = upgraded.work_one_shard

        def cancel_the_first():
            upgraded.runs[0].state = "Cancelled"
            upgraded.work_one_shard = work_one_shard

        upgraded.work_one_shard = cancel_the_first
        state = upgraded.reconcile(monkeypatch)
        assert (state.name, upgraded.fleet.serving) == ("Failed", 1)
        assert "ended as Cancelled; the next run continues its work" in state.message
        assert "small/v2 waits for 2 verdicts: a, b" in state.message
        assert upgraded.reconcile(monkeypatch).name == "Completed"
        assert upgraded.fleet.serving == 2


class TestTrainings:
    """Each run starts the retraining that an outcome has left, so it is never lost."""

    @pytest.fixture
    def left(self, undisturbed):
        registry = undisturbed.fleet.platform.registry
        recipe = TrainingRecipe("b", FAMILY, SUITE.data, (SUITE,), base_version="v2")
        (outcome,) = (o for o in registry.outcomes("b") if o.verdict is Verdict.NEEDS_RETUNING)
        registry.record(replace(outcome, training=recipe))
        return recipe

    @pytest.mark.parametrize(("starts", "name"), [(True, "Completed"), (False, "Failed")])
    def test_are_started_and_reported_after_three_failures(
        self, undisturbed, left, monkeypatch, starts, name
    ):
        started = []
        monkeypatch.setattr(
            "tasks.recovery.start_training", lambda *given: started.append(given) or starts
        )
        state = undisturbed.reconcile(monkeypatch)
        assert started == [(left, POLICY)]
        assert state.name == name
        assert ("b on v2: retraining failed three times" in state.message) is not starts

    def test_are_tried_three_times(self, left, monkeypatch):
        runs = {}

        def run_deployment(name, *, idempotency_key, **_):
            state = SimpleNamespace(is_final=lambda: idempotency_key in over)
            return runs.setdefault(idempotency_key, SimpleNamespace(state=state))

        monkeypatch.setattr("tasks.recovery.run_deployment", run_deployment)
        over = set()
        for count in (1, 2, 3):
            assert start_training.fn(left, POLICY)
            assert start_training.fn(left, POLICY)
            assert len(runs) == count
            over |= runs.keys()
        assert not start_training.fn(left, POLICY)
        assert len(runs) == 3


def kill_at(*moments):
    def at(number, what):
        if number in moments:
            raise Killed(what)

    return at


def assert_judged_once(upgraded):
    """Check that no verdict was recorded twice."""
    assert len(set(upgraded.records)) == len(upgraded.records)


class TestTwoAtOnce:
    def test_a_second_run_at_any_moment_of_the_first_changes_nothing(
        self, undisturbed, tmp_path, monkeypatch
    ):
        for position in range(1, undisturbed.moments + 1):
            upgraded = upgrade(tmp_path / str(position))
            upgraded.at = once(position, lambda upgraded=upgraded: upgraded.reconcile(monkeypatch))
            upgraded.reconcile(monkeypatch, wait=True)
            assert upgraded.final_state == undisturbed.final_state, position
            assert_judged_once(upgraded)

    def test_a_second_worker_with_the_same_work_judges_nothing_twice(
        self, undisturbed, tmp_path, monkeypatch
    ):
        for position in range(1, undisturbed.moments + 1):
            upgraded = upgrade(tmp_path / str(position))

            def work_elsewhere(upgraded=upgraded):
                for task in [task for run in upgraded.runs for task in run.tasks]:
                    upgraded.judge(task)

            upgraded.at = once(position, work_elsewhere)
            upgraded.reconcile(monkeypatch, wait=True)
            assert upgraded.final_state == undisturbed.final_state, position
            assert_judged_once(upgraded)


class TestOvertaken:
    @pytest.mark.parametrize("number", [1, 3], ids=["rolls back", "promotes a newer one"])
    def test_another_champion_at_any_moment_is_followed(
        self, number, undisturbed, tmp_path, monkeypatch
    ):
        for position in range(1, undisturbed.moments + 1):
            upgraded = upgrade(tmp_path / str(position))
            upgraded.fleet.add_base("v3")
            upgraded.at = once(position, lambda upgraded=upgraded: promote(upgraded.fleet, number))
            upgraded.reconcile(monkeypatch, wait=True)
            upgraded.reconcile(monkeypatch, wait=True)  # the notification's own run
            assert upgraded.fleet.serving == number, position
            assert_judged_once(upgraded)

    def test_removing_champion_at_any_moment_stops_the_promotion(
        self, undisturbed, tmp_path, monkeypatch
    ):
        for position in range(1, undisturbed.moments + 1):
            upgraded = upgrade(tmp_path / str(position))
            upgraded.at = once(position, lambda upgraded=upgraded: promote(upgraded.fleet, None))
            upgraded.reconcile(monkeypatch, wait=True)
            serving = upgraded.fleet.serving
            upgraded.reconcile(monkeypatch, wait=True)
            assert upgraded.fleet.serving == serving, position
            assert upgraded.fleet.platform.catalog.promotion_notes(FAMILY) == {}

    def test_a_manual_block_at_any_moment_is_kept(self, undisturbed, tmp_path, monkeypatch):
        for position in range(1, undisturbed.moments + 1):
            upgraded = upgrade(tmp_path / str(position))
            registry, alias, blocked = (
                upgraded.fleet.platform.registry,
                alias_on(upgraded, "v2"),
                [],
            )

            def block(
                number, what, position=position, registry=registry, alias=alias, blocked=blocked
            ):
                if number >= position and not blocked and registry.alias("a", alias) is not None:
                    registry.set_alias_manually("a", alias, None)
                    blocked.append(number)

            upgraded.at = block
            for _ in range(3):
                upgraded.reconcile(monkeypatch, wait=True)
            assert blocked
            assert registry.alias("a", alias) is None, position

    def test_work_that_is_no_longer_needed_is_withdrawn(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "newer")
        work_one_shard, fleet = upgraded.work_one_shard, upgraded.fleet

        def promote_v3_after_the_first_shard():
            work_one_shard()
            upgraded.work_one_shard = work_one_shard
            fleet.promote(fleet.add_base("v3"))
            upgraded.reconcile(monkeypatch)  # the notification's own run

        upgraded.work_one_shard = promote_v3_after_the_first_shard
        upgraded.reconcile(monkeypatch, wait=True)
        assert [run.state for run in upgraded.runs[:3]] == ["Completed", "Withdrawn", "Withdrawn"]
        judged = [(adapter, base) for adapter, base, _ in upgraded.records]
        assert judged == [("a", "v2"), ("b", "v2"), *((name, "v3") for name in "abcde")]
        assert fleet.serving == 3

    def test_a_running_shard_checks_before_each_adapter(self, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "asks")
        upgraded.shard_size = 5
        judge = upgraded.judge

        def promote_v3_after_the_first_adapter(task):
            judge(task)
            if len(upgraded.records) == 1:
                upgraded.fleet.promote(upgraded.fleet.add_base("v3"))

        upgraded.judge = promote_v3_after_the_first_adapter
        upgraded.reconcile(monkeypatch)
        judged = [(adapter, base) for adapter, base, _ in upgraded.records]
        assert judged == [("a", "v2"), *((name, "v3") for name in "abcde")]
        assert upgraded.fleet.serving == 3


def promote(fleet, number):
    fleet.platform.catalog.set_alias_manually(FAMILY, "champion", number)


def alias_on(upgraded, version):
    bases = upgraded.fleet.platform.catalog.versions(FAMILY)
    return next(base.alias for base in bases if base.version == version)


def once(position, act):
    def at(number, what):
        if number == position:
            act()

    return at


class TestOneFamilyThatFails:
    """The problem is reported with its family, and the others are judged and promoted."""

    @pytest.fixture
    def upgraded(self, tmp_path):
        upgraded = upgrade(tmp_path / "two")
        catalog = upgraded.fleet.platform.catalog
        catalog.register_manually("broken", "s3://bases/broken/v1")
        catalog.register_manually("A's base", "s3://bases/odd/v1")
        return upgraded

    @pytest.mark.parametrize("error", [ValueError("odd"), KeyError("x"), StoreError("away")])
    @pytest.mark.parametrize("step", ["apply_fleet_verdicts", "plan_fleet"])
    def test_in_any_step(self, upgraded, monkeypatch, step, error):
        tasks = upgraded._reconciliation
        plain = getattr(tasks, step)

        def failing(given, *rest):
            if "broken" in (given, getattr(given, "family", "")):
                raise error
            return plain(given, *rest)

        setattr(tasks, step, failing)
        monkeypatch.setattr(FleetWithRuns, "_reconciliation", tasks)
        state = upgraded.reconcile(monkeypatch)
        assert state.name == "Failed"
        assert f"the family broken cannot be reconciled: {type(error).__name__}" in state.message
        assert 'the base family "A\'s base": the name must be 1 to 100' in state.message
        assert upgraded.fleet.serving == 2
        assert {record[0] for record in upgraded.records} == set("abcde")
        if step == "plan_fleet":
            dry = upgraded.reconcile(monkeypatch, dry_run=True)
            assert "the family broken cannot be reconciled" in dry.message

    def test_after_its_shards_have_ended(self, undisturbed, tmp_path, monkeypatch):
        upgraded = upgrade(tmp_path / "late")
        tasks = upgraded._reconciliation
        plain = tasks.apply_fleet_verdicts

        def failing(family, *rest):
            if upgraded.records:
                raise ValueError("damaged meanwhile")
            return plain(family, *rest)

        tasks.apply_fleet_verdicts = failing
        monkeypatch.setattr(FleetWithRuns, "_reconciliation", tasks)
        state = upgraded.reconcile(monkeypatch)  # and it ends
        assert "the family small cannot be reconciled: ValueError" in state.message

    def test_uploads_that_cannot_be_listed_stop_no_family(self, upgraded, monkeypatch):
        away = SimpleNamespace(
            prepare_for_upload=lambda: None,
            find_pending=lambda return_state: Failed(message="no such bucket"),
        )
        monkeypatch.setattr(FleetWithRuns, "_ingestion", away)
        state = upgraded.reconcile(monkeypatch)
        assert "uploads cannot be listed: no such bucket" in state.message
        assert upgraded.fleet.serving == 2
