"""Promotion and manual overrides: what reconcile does, what it refuses, and what it reports."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lifecycle.fleet import FAMILY, POLICY, obstacle_text
from trans_peft.domain.adapter import ManualOverride
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.fleet import (
    ChampionNotReady,
    IdleAdapter,
    IdleReason,
    ObservedOverride,
    PolicyNotMet,
    VerdictsMissing,
)
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import InvalidSpecError
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import resolve

ALL = PromotionPolicy(min_serving_share=1.0)
HALF = PromotionPolicy(min_serving_share=0.5)


def note_on(fleet, base):
    return fleet.platform.catalog.promotion_notes(FAMILY).get(base.number)


class TestChampion:
    def test_it_waits_for_missing_verdicts_then_moves_the_fleet_and_rolls_it_back(
        self, fleet, two_bases
    ):
        v1, v2 = two_bases
        fleet.promote(v2)
        changes = fleet.apply_verdicts(ALL)
        assert changes.obstacle == VerdictsMissing(v2, ("chat", "code"))
        assert not changes.is_refused
        assert note_on(fleet, v2) == "waits: small/v2 waits for 2 verdicts: chat, code"
        assert fleet.serving == v1.number

        fleet.complete_tasks()
        assert str(fleet.apply_verdicts(ALL).promoted) == "small/v2"
        assert note_on(fleet, v2) is None
        assert resolve("chat", fleet.platform).base.version == "v2"

        fleet.promote(v1)
        assert str(fleet.apply_verdicts(ALL).promoted) == "small/v1"
        assert resolve("chat", fleet.platform).base.version == "v1"
        assert resolve("chat", fleet.platform, base="v2").base.version == "v2"

    def test_without_champion_promotion_is_paused(self, fleet, two_bases):
        v1, v2 = two_bases
        fleet.promote(v2)
        fleet.apply_verdicts()
        fleet.complete_tasks()
        fleet.promote(None)
        changes = fleet.apply_verdicts()
        assert (changes.promoted, changes.obstacle) == (None, None)
        assert fleet.serving == v1.number
        assert note_on(fleet, v2) is None
        page = report(FAMILY, fleet.platform).markdown()
        assert "not set (paused: serving does not change)" in page

    def test_on_a_version_that_is_not_ready_it_is_refused(self, fleet, two_bases):
        number = fleet.platform.catalog.register_manually(FAMILY, "memory://bases/v3")
        fleet.platform.catalog.set_alias_manually(FAMILY, "champion", number)
        changes = fleet.apply_verdicts()
        assert changes.obstacle == ChampionNotReady(FAMILY, number)
        refused = obstacle_text(changes)
        assert "champion is set on version 3 of small, which cannot serve" in refused
        assert fleet.platform.catalog.promotion_notes(FAMILY) == {number: f"refused: {refused}"}

    def test_that_moves_during_reconcile_marks_the_result_as_outdated(self, fleet, two_bases):
        v1, v2 = two_bases
        v3 = fleet.add_base("v3")
        fleet.complete_tasks()
        fleet.promote(v2)
        seen = observe(FAMILY, fleet.platform)
        fleet.promote(v3)
        _, changes = apply_verdicts(seen, POLICY, ALL, fleet.platform)
        assert (changes.is_outdated, changes.promoted, fleet.serving) == (True, None, v1.number)
        fleet.apply_verdicts()
        assert fleet.serving == v3.number

    def test_that_moves_during_the_write_of_serving_marks_the_result_as_outdated(
        self, fleet, two_bases, monkeypatch
    ):
        """The last process that writes `serving` reads `champion` again."""
        _, v2 = two_bases
        v3 = fleet.add_base("v3")
        fleet.complete_tasks()
        fleet.promote(v2)
        catalog, write = fleet.platform.catalog, fleet.platform.catalog.set_serving

        def write_while_another_run_promotes(base):
            fleet.promote(v3)
            write(v3)
            write(base)

        monkeypatch.setattr(catalog, "set_serving", write_while_another_run_promotes)
        assert fleet.apply_verdicts().is_outdated
        monkeypatch.undo()
        assert not fleet.apply_verdicts().is_outdated
        assert fleet.serving == v3.number


class TestPolicy:
    def test_refuses_while_too_few_adapters_serve(self, fleet, two_bases):
        v1, v2 = two_bases
        for task in fleet.tasks():
            passed = task.adapter == "chat"
            fleet.judge(task, Verdict.PASSED if passed else Verdict.NEEDS_RETUNING)
        fleet.promote(v2)
        changes = fleet.apply_verdicts(ALL)
        assert fleet.serving == v1.number
        assert changes.is_refused
        assert isinstance(changes.obstacle, PolicyNotMet)
        assert changes.obstacle.idle == (IdleAdapter("code", Verdict.NEEDS_RETUNING),)
        assert (changes.obstacle.serving, changes.obstacle.live) == (1, 2)
        refused = obstacle_text(changes)
        assert refused.splitlines() == [
            "the fleet may not move to small/v2",
            "  expected: 100 % of the live adapters on it",
            "  found:    1 of 2 live adapters serve there, not code (needs-retuning)",
            f"  do:       retrain or retire those adapters, approve one by setting its alias "
            f"{v2.alias} in MLflow, or change the promotion policy in prefect.yaml",
        ]
        assert note_on(fleet, v2) == f"refused: {refused}"
        assert refused in report(FAMILY, fleet.platform).markdown()
        assert not changes.already_reported
        assert fleet.apply_verdicts(ALL).already_reported
        assert str(fleet.apply_verdicts(HALF).promoted) == "small/v2"
        assert note_on(fleet, v2) is None

    def test_counts_manually_approved_adapters_and_not_blocked_ones(self, fleet, two_bases):
        _, v2 = two_bases
        registry = fleet.platform.registry
        for task in fleet.tasks():
            passed = task.adapter == "chat"
            fleet.judge(task, Verdict.PASSED if passed else Verdict.INCONCLUSIVE)
        fleet.apply_verdicts()
        registry.set_alias_manually("chat", v2.alias, None)
        fleet.promote(v2)
        refused = obstacle_text(fleet.apply_verdicts(HALF))
        assert "0 of 2" in refused
        assert "chat (blocked manually), code (inconclusive)" in refused
        registry.set_alias_manually("code", v2.alias, 2)
        assert str(fleet.apply_verdicts(HALF).promoted) == "small/v2"

    def test_does_not_count_an_alias_on_a_version_for_another_base(self, fleet, two_bases):
        _, v2 = two_bases
        fleet.complete_tasks(Verdict.INCONCLUSIVE)
        fleet.promote(v2)
        fleet.platform.registry.set_alias_manually("chat", v2.alias, 1)  # trained on v1
        idle = fleet.apply_verdicts(ALL).obstacle.idle
        assert IdleAdapter("chat", IdleReason.OTHER_BASE) in idle

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("code", "required: code (needs-retuning)"),
            ("cdoe", "required: cdoe (no such adapter)"),
            ("old", "required: old (retired or unreadable)"),
            ("chat", None),
            ("elsewhere", None),
        ],
    )
    def test_required_adapters_must_serve(self, fleet, two_bases, name, why):
        v1, v2 = two_bases
        fleet.add_adapter("old", v1)
        fleet.platform.registry.retire_manually("old")
        big = replace(v1.ref, family="big")
        chat = fleet.platform.registry.versions("chat")[0]
        other = replace(chat, adapter="elsewhere", base=big, trained_on=big)
        fleet.platform.registry.register(other, fleet.work_dir / "peft")
        for task in fleet.tasks():
            passed = task.adapter == "chat"
            fleet.judge(task, Verdict.PASSED if passed else Verdict.NEEDS_RETUNING)
        fleet.promote(v2)
        changes = fleet.apply_verdicts(PromotionPolicy(0.0, required_adapters=(name,)))
        assert (str(changes.promoted) == "small/v2") is (why is None)
        assert why is None or why in obstacle_text(changes)

    def test_parked_and_unreadable_adapters_do_not_pass(self, fleet, two_bases):
        v1, v2 = two_bases
        other = replace(v1.ref, fingerprint_sha256="f" * 64)
        stray = replace(fleet.add_adapter("x", v1), adapter="stray", base=other)
        fleet.platform.registry.register(stray, fleet.work_dir / "peft")
        while fleet.tasks():
            for task in fleet.tasks():
                fleet.judge(task, Verdict.FAILED if task.adapter == "x" else Verdict.PASSED)
        fleet.promote(v2)
        refused = obstacle_text(fleet.apply_verdicts(ALL))
        assert "2 of 4 live adapters" in refused
        assert "x (failed)" in refused
        assert "stray: the adapter has no trained version" in refused

    def test_lets_an_empty_fleet_move(self, fleet):
        v1 = fleet.add_base("v1")
        fleet.promote(v1)
        assert str(fleet.apply_verdicts(ALL).promoted) == "small/v1"

    def test_a_base_that_served_may_serve_again_at_once(self, fleet, two_bases):
        v1, v2 = two_bases
        fleet.complete_tasks()
        fleet.promote(v2)
        fleet.apply_verdicts(ALL)
        fleet.add_adapter("new", v2)  # never judged on v1
        fleet.promote(v1)
        strict = replace(ALL, free_rollback=False)
        obstacle = fleet.apply_verdicts(strict).obstacle
        assert (str(obstacle.base), obstacle.adapters) == ("small/v1", ("new",))
        assert str(fleet.apply_verdicts(ALL).promoted) == "small/v1"

    def test_a_base_that_is_only_older_is_no_rollback(self, fleet, two_bases):
        _, v2 = two_bases
        v3 = fleet.add_base("v3")
        fleet.complete_tasks(Verdict.INCONCLUSIVE)
        fleet.promote(v3)
        fleet.apply_verdicts()
        fleet.promote(v2)
        assert fleet.apply_verdicts(ALL).obstacle.serving == 0

    @pytest.mark.parametrize("wrong", [{"min_serving_share": 1.5}, {"required_adapters": ("",)}])
    def test_with_invalid_values_is_refused(self, wrong):
        with pytest.raises(InvalidSpecError, match="promotion policy"):
            PromotionPolicy(**wrong)

    @given(live=st.integers(0, 40), passing=st.data(), share=st.floats(0, 1))
    def test_requires_a_share_of_all_live_adapters(self, live, passing, share):
        from tests.lifecycle.fleet import judged_fleet
        from trans_peft.lifecycle.promotion import check_policy

        count = passing.draw(st.integers(0, live))
        fleet, base = judged_fleet(live, count)
        refused = check_policy(fleet, base, PromotionPolicy(share), platform=None)
        assert (refused is None) is (live == 0 or count / live >= share)


class TestManualOverrides:
    SEEN = datetime(2026, 11, 24, tzinfo=UTC)

    def apply_verdicts(self, fleet, **later):
        return apply_verdicts(
            observe(FAMILY, fleet.platform), POLICY, ALL, fleet.platform,
            now=self.SEEN.replace(**later),
        )[1]  # fmt: skip

    def test_a_block_is_recorded_and_kept_by_later_runs(self, fleet, two_bases):
        _, v2 = two_bases
        fleet.complete_tasks()
        fleet.apply_verdicts()
        fleet.platform.registry.set_alias_manually("chat", v2.alias, None)
        for day in (24, 25, 26):
            changes = self.apply_verdicts(fleet, day=day)
            assert fleet.platform.registry.alias("chat", v2.alias) is None
            override = ManualOverride(None, 2, "passed", "2026-11-24T00:00:00+00:00")
            assert changes.manual_overrides == (ObservedOverride("chat", v2.ref, override),)
        page = report(FAMILY, fleet.platform).markdown()
        assert "| chat | trained here, **serves** | passed, blocked manually |" in page
        assert "- **chat** on v2: removed manually (first seen 2026-11-24T00:00:00+00:00)" in page

    def test_a_block_is_kept_for_retrained_versions_and_new_policies(self, fleet, two_bases):
        v1, v2 = two_bases
        fleet.complete_tasks()
        fleet.apply_verdicts()
        fleet.platform.registry.set_alias_manually("chat", v2.alias, None)
        fleet.apply_verdicts()
        fleet.add_adapter("chat", v1, weights="retuned")
        fleet.complete_tasks()
        fleet.apply_verdicts()
        assert fleet.platform.registry.alias("chat", v2.alias) is None
        assert fleet.platform.registry.alias("code", v2.alias) == 2

    def test_an_approval_is_valid_for_one_base(self, fleet, two_bases):
        _, v2 = two_bases
        fleet.complete_tasks(Verdict.INCONCLUSIVE)
        fleet.apply_verdicts()
        fleet.platform.registry.set_alias_manually("chat", v2.alias, 2)
        (found,) = self.apply_verdicts(fleet).manual_overrides
        assert (found.override.number, found.override.wanted) == (2, None)
        assert found.override.why == "inconclusive"
        assert resolve("chat", fleet.platform, base="v2").number == 2
        fleet.add_base("v3")
        fleet.complete_tasks(Verdict.INCONCLUSIVE)
        fleet.apply_verdicts()
        assert {row.base: row.serves for row in report(FAMILY, fleet.platform).rows
                if row.adapter == "chat"} == {"v1": True, "v2": True, "v3": False}  # fmt: skip

    def test_a_changed_override_is_recorded_with_its_own_time(self, fleet, two_bases):
        _, v2 = two_bases
        fleet.complete_tasks(Verdict.INCONCLUSIVE)
        fleet.apply_verdicts()
        fleet.platform.registry.set_alias_manually("chat", v2.alias, 2)
        self.apply_verdicts(fleet, day=24)
        fleet.platform.registry.set_alias_manually("chat", v2.alias, 1)
        (found,) = self.apply_verdicts(fleet, day=25).manual_overrides
        assert (found.override.number, found.override.first_seen[:10]) == (1, "2026-11-25")

    def test_a_reverted_override_is_removed_from_the_record(self, fleet, two_bases):
        _, v2 = two_bases
        registry = fleet.platform.registry
        fleet.complete_tasks()
        fleet.apply_verdicts()
        for number in (None, 2):
            registry.set_alias_manually("chat", v2.alias, number)
            fleet.apply_verdicts()
        state = registry.aliases("chat")[v2.alias]
        assert (state.number, state.is_manual, state.recorded) == (2, False, None)

    def test_an_override_before_any_verdict_is_kept(self, fleet, two_bases):
        v1, _ = two_bases
        fleet.platform.registry.set_alias_manually("chat", v1.alias, None)
        fleet.apply_verdicts()
        assert fleet.platform.registry.alias("chat", v1.alias) is None

    def test_an_override_between_read_and_write_is_kept(self, fleet, two_bases):
        _, v2 = two_bases
        fleet.complete_tasks(Verdict.INCONCLUSIVE)
        fleet.apply_verdicts()
        (again, _) = fleet.tasks(replace(POLICY, alpha=0.1))
        fleet.judge(again, Verdict.PASSED)
        seen = observe(FAMILY, fleet.platform)
        fleet.platform.registry.set_alias_manually("chat", v2.alias, 1)
        (found,) = apply_verdicts(seen, POLICY, ALL, fleet.platform)[1].manual_overrides
        assert found.override.number == 1
        assert fleet.platform.registry.alias("chat", v2.alias) == 1
