"""The same manual changes have the same results in memory and in MLflow."""

import itertools
import re
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from tasks.reporting import parked_text
from tests.lifecycle.fleet import POLICY, MemoryFleet, obstacle_text
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.outcome import Reason
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.errors import BaseUnreadableError, NotFoundError, NotServedError
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.base_files import base_folder, named_fingerprint, tokenizer_folder
from trans_peft.lifecycle.reconcile import MAX_ATTEMPTS, observe, observe_adapter, plan
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import find_base, resolve
from trans_peft.lifecycle.transfer import record_failure

ALL = PromotionPolicy(min_serving_share=1.0)


class Upgrade:
    """v1 serves two adapters, `good` and `bad`; v2 is ready, and both have a verdict there."""

    def __init__(self, fleet):
        self.fleet, self.registry = fleet, fleet.platform.registry
        self.good, self.bad = f"{fleet.family}-good", f"{fleet.family}-bad"
        self.v1 = fleet.add_base("v1")
        fleet.add_adapter(self.good, self.v1)
        fleet.add_adapter(self.bad, self.v1)
        fleet.promote(self.v1)
        fleet.apply_verdicts()
        self.v2 = fleet.add_base("v2")
        for task in fleet.tasks():
            good = task.adapter == self.good
            fleet.judge(task, Verdict.PASSED if good else Verdict.INCONCLUSIVE)

    def click(self, adapter, number):
        self.fleet.person.sets_on_an_adapter(adapter, self.v2.alias, number)

    def registers_manually(self, uri):
        if hasattr(self.fleet.platform.catalog, "register_manually"):
            return self.fleet.platform.catalog.register_manually(self.fleet.family, uri)
        tracking_uri = self.fleet.platform.catalog._tracking.uri
        return int(MlflowClient(tracking_uri).create_model_version(self.fleet.family, uri).version)

    def loses_fingerprint(self, base):
        """Return a platform on which the base's stored fingerprint is gone."""
        platform = self.fleet.platform
        if hasattr(platform.catalog, "_tracking"):
            catalog = type(platform.catalog)(platform.catalog._tracking.uri)
            catalog._tracking.tag_version(base.family, base.number, {"fingerprint_run": "0" * 32})
            return replace(platform, catalog=catalog)
        del platform.catalog._fingerprints[base.fingerprint_sha256]
        return platform

    def apply_verdicts(self, promotion=ALL):
        seen = observe(self.fleet.family, self.fleet.platform)
        return apply_verdicts(seen, POLICY, promotion, self.fleet.platform)[1]

    @property
    def state(self):
        """The state of the registry without names that differ from test to test."""
        seen = observe(self.fleet.family, self.fleet.platform)
        return seen.serving, set(seen.notes), [
            {
                base.version: (
                    state.number, state.is_manual, state.is_unfinished, bool(state.recorded)
                )
                for base in seen.bases
                for state in [adapter.alias_on(base)]
            }
            for adapter in seen.adapters
        ]  # fmt: skip


@pytest.fixture(
    params=["memory", pytest.param("mlflow", marks=[pytest.mark.servers, pytest.mark.slow])]
)
def upgrade(request, unique, tmp_path):
    if request.param == "memory":
        return Upgrade(MemoryFleet(tmp_path, unique))
    servers = request.getfixturevalue("servers")
    return Upgrade(MemoryFleet.on_mlflow(tmp_path, unique, servers.mlflow_url))


def test_a_promotion_is_refused_approved_manually_rolled_back_and_paused(upgrade):
    fleet = upgrade.fleet
    fleet.promote(upgrade.v2)
    refused = obstacle_text(upgrade.apply_verdicts())
    assert f"1 of 2 live adapters serve there, not {upgrade.bad} (inconclusive)" in refused
    notes = fleet.platform.catalog.promotion_notes(fleet.family)
    assert notes == {upgrade.v2.number: f"refused: {refused}"}
    assert refused in report(fleet.family, fleet.platform).markdown()

    upgrade.click(upgrade.bad, 2)
    changes = upgrade.apply_verdicts()
    assert str(changes.promoted) == f"{fleet.family}/v2"
    assert [found.override.number for found in changes.manual_overrides] == [2]
    assert fleet.platform.catalog.promotion_notes(fleet.family) == {}
    assert resolve(upgrade.bad, fleet.platform).base.version == "v2"

    fleet.promote(upgrade.v1)
    assert str(upgrade.apply_verdicts().promoted) == f"{fleet.family}/v1"
    assert resolve(upgrade.bad, fleet.platform).base.version == "v1"

    fleet.promote(upgrade.v2)
    fleet.promote(None)
    assert upgrade.apply_verdicts().promoted is None
    assert fleet.serving == upgrade.v1.number


def test_a_manual_block_is_recorded_until_it_is_reverted(upgrade):
    upgrade.apply_verdicts()
    upgrade.click(upgrade.good, None)
    for _ in range(3):
        (found,) = upgrade.apply_verdicts().manual_overrides
        assert (found.adapter, found.base.version) == (upgrade.good, "v2")
        assert found.override.number is None
        assert upgrade.registry.alias(upgrade.good, upgrade.v2.alias) is None
    upgrade.fleet.add_adapter(upgrade.good, upgrade.v2, weights="trained there")
    assert upgrade.registry.alias(upgrade.good, upgrade.v2.alias) is None
    upgrade.click(upgrade.good, 2)
    upgrade.apply_verdicts()
    assert upgrade.registry.aliases(upgrade.good)[upgrade.v2.alias].recorded is None


@pytest.mark.parametrize("alias", ["2026-02", "staging", "v2-rc"])
def test_an_alias_that_is_spelled_like_a_label_is_ignored(upgrade, alias):
    fleet, platform = upgrade.fleet, upgrade.fleet.platform
    fleet.person.sets_on_a_base(fleet.family, alias, upgrade.v1.number)
    with pytest.raises(NotFoundError):
        find_base(fleet.family, alias, platform)
    version = fleet.add_base(alias)
    assert find_base(fleet.family, alias, platform).number == version.number
    with pytest.raises(NotServedError):
        resolve(upgrade.good, platform, base=alias)
    task = next(task for task in fleet.tasks() if task.adapter == upgrade.good)
    seen = observe_adapter(task.adapter, fleet.family, platform)
    record_failure(task, seen, POLICY, platform, reason="given by the test")
    outcomes = {o.base.version: o.verdict for o in platform.registry.outcomes(upgrade.good)}
    assert outcomes == {"v2": Verdict.PASSED, alias: Verdict.FAILED}


def test_an_alias_on_a_version_that_is_not_ready_does_not_affect_tasks(upgrade):
    fleet = upgrade.fleet
    number = upgrade.registers_manually("s3://bases/waiting")
    fleet.add_base("2026-02")
    fleet.person.sets_on_a_base(fleet.family, "2026-02", number)
    for task in fleet.tasks():
        seen = observe_adapter(task.adapter, fleet.family, fleet.platform)
        record_failure(task, seen, POLICY, fleet.platform, reason="given by the test")
        fleet.judge(replace(task, attempt=2))
    assert fleet.tasks() == ()


def test_an_unreadable_base_is_no_failure_of_the_adapter(upgrade, tmp_path):
    platform = upgrade.loses_fingerprint(upgrade.v2)
    for read in (
        lambda: base_folder(upgrade.v2, platform),
        lambda: named_fingerprint(upgrade.v2, platform),
        lambda: tokenizer_folder(upgrade.v2, platform, tmp_path / "tokenizer"),
    ):
        with pytest.raises(BaseUnreadableError, match=r"the base .*/v2 cannot be read"):
            read()


def test_an_adapter_that_cannot_be_read_blocks_the_promotion(upgrade):
    upgrade.fleet.promote(upgrade.v2)
    seen = observe(upgrade.fleet.family, upgrade.fleet.platform)
    seen = replace(seen, unreadable=("x: the tag cannot be read",))
    any_share = PromotionPolicy(min_serving_share=0.0)
    _, changes = apply_verdicts(seen, POLICY, any_share, upgrade.fleet.platform)
    assert changes.promoted is None
    assert changes.obstacle.unreadable == ("x: the tag cannot be read",)
    text = obstacle_text(changes)
    assert "adapters that cannot be read: x: the tag cannot be read" in text
    promoted = upgrade.apply_verdicts(any_share).promoted
    assert str(promoted) == f"{upgrade.fleet.family}/v2"


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.parametrize("kind", ["Adapter", "base", None])
def test_a_wrong_kind_on_a_real_server_blocks_the_promotion(servers, unique, tmp_path, kind):
    from mlflow import MlflowClient

    upgrade = Upgrade(MemoryFleet.on_mlflow(tmp_path, unique, servers.mlflow_url))
    client = MlflowClient(servers.mlflow_url)
    upgrade.fleet.promote(upgrade.v2)
    if kind is None:
        client.delete_registered_model_tag(upgrade.bad, "trans_peft.kind")
    else:
        client.set_registered_model_tag(upgrade.bad, "trans_peft.kind", kind)
    changes = upgrade.apply_verdicts(PromotionPolicy(min_serving_share=0.0))
    assert changes.promoted is None
    assert f"{upgrade.bad}: the tag trans_peft.kind must be adapter" in obstacle_text(changes)
    client.set_registered_model_tag(upgrade.bad, "trans_peft.kind", "adapter")
    client.delete_registered_model_tag(unique, "trans_peft.kind")
    assert unique not in upgrade.fleet.platform.catalog.families()
    assert any(repr(unique) in line for line in upgrade.fleet.platform.catalog.set_aside())


@pytest.mark.slow
@pytest.mark.servers
def test_after_a_kill_at_any_write_the_next_run_reaches_the_same_state(
    servers, unique, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

    from trans_peft.edges.mlflow_client import Tracking

    writes = [name for name in vars(MlflowClient) if name.startswith(("set_", "delete_"))]
    left = None

    def counted(write):
        def call(*arguments, **options):
            nonlocal left
            result = write(*arguments, **options)
            if left is not None:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return result

        return call

    for name in writes:
        monkeypatch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    monkeypatch.setattr(Tracking, "_set_tag", counted(Tracking._set_tag))
    one_by_one = "trans_peft.lifecycle.apply_verdicts.in_parallel"
    monkeypatch.setattr(one_by_one, lambda function, items: [*map(function, items)])
    ends = []
    for position in itertools.count(1):
        fleet = MemoryFleet.on_mlflow(tmp_path, f"{unique}-{position}", servers.mlflow_url)
        upgrade = Upgrade(fleet)
        upgrade.click(upgrade.bad, 2)
        fleet.promote(upgrade.v2)
        left = position
        try:
            upgrade.apply_verdicts()
        except KeyboardInterrupt:
            left = None
            upgrade.apply_verdicts()
            ends.append(upgrade.state)
        else:
            left = None
            break
    assert len(ends) > 5
    assert ends == [upgrade.state] * len(ends)


@pytest.mark.slow
@pytest.mark.servers
def test_a_parked_task_starts_again_when_the_reported_tag_is_removed(servers, unique, tmp_path):
    fleet = MemoryFleet.on_mlflow(tmp_path, unique, servers.mlflow_url)
    fleet.add_adapter(f"{unique}-chat", fleet.add_base("v1"))
    fleet.promote(fleet.add_base("v2"))
    for _ in range(MAX_ATTEMPTS):
        fleet.judge(fleet.tasks()[0], Verdict.FAILED)
    assert fleet.tasks() == ()
    (parked,) = plan(observe(unique, fleet.platform), POLICY).parked
    name, number, adapter = re.search(
        r"remove the tag (\S+) of version (\d+) of (\S+)$", parked_text(parked)
    ).groups()
    MlflowClient(servers.mlflow_url).delete_model_version_tag(adapter, number, name)
    (task,) = fleet.tasks()
    assert (task.attempt, task.reason) == (1, Reason.NO_VERDICT)
