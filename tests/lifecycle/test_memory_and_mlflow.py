"""What a person does, and what comes of it, in memory and in MLflow: the same."""

import itertools

import pytest

from tests.lifecycle.fleet import POLICY, MemoryFleet
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.reconcile import observe
from trans_peft.lifecycle.report import report
from trans_peft.lifecycle.resolve import resolve

ALL = PromotionPolicy(min_serving_share=1.0)


class Upgrade:
    """v1 serves two adapters, `good` and `bad`; v2 is ready, and both are judged there."""

    def __init__(self, fleet):
        self.fleet, self.registry = fleet, fleet.platform.registry
        self.good, self.bad = f"{fleet.family}-good", f"{fleet.family}-bad"
        self.v1 = fleet.add_base("v1")
        fleet.add_adapter(self.good, self.v1)
        fleet.add_adapter(self.bad, self.v1)
        fleet.promote(self.v1)
        fleet.apply_verdicts()
        self.v2 = fleet.add_base("v2")
        for work in fleet.work():
            good = work.adapter == self.good
            fleet.judge(work, Verdict.PASSED if good else Verdict.INCONCLUSIVE)

    def click(self, adapter, number):
        self.fleet.person.sets_on_an_adapter(adapter, self.v2.alias, number)

    def apply_verdicts(self, promotion=ALL):
        seen = observe(self.fleet.family, self.fleet.platform)
        return apply_verdicts(seen, POLICY, promotion, self.fleet.platform)

    @property
    def state(self):
        """What people and consumers find, without names that differ from test to test."""
        seen = observe(self.fleet.family, self.fleet.platform)
        return seen.serving, set(seen.notes), [
            {
                base.version: (state.number, state.manual, state.unfinished, bool(state.recorded))
                for base in seen.bases
                for state in [adapter.alias_on(base)]
            }
            for adapter in seen.adapters
        ]  # fmt: skip


@pytest.fixture(params=["memory", pytest.param("mlflow", marks=pytest.mark.servers)])
def upgrade(request, unique, tmp_path):
    if request.param == "memory":
        return Upgrade(MemoryFleet(tmp_path, unique))
    servers = request.getfixturevalue("servers")
    return Upgrade(MemoryFleet.on_mlflow(tmp_path, unique, servers.mlflow_url))


def test_a_promotion_is_refused_approved_by_hand_rolled_back_and_paused(upgrade):
    fleet = upgrade.fleet
    fleet.promote(upgrade.v2)
    refused = upgrade.apply_verdicts().refused
    assert f"1 of 2 live adapters serve there, not {upgrade.bad} (inconclusive)" in refused
    notes = fleet.platform.catalog.promotion_notes(fleet.family)
    assert notes == {upgrade.v2.number: f"refused: {refused}"}
    assert refused in report(fleet.family, fleet.platform).markdown()

    upgrade.click(upgrade.bad, 2)
    changes = upgrade.apply_verdicts()
    assert changes.promoted == f"{fleet.family}/v2"
    assert "set on version 2 by hand" in changes.manual_overrides[0]
    assert fleet.platform.catalog.promotion_notes(fleet.family) == {}
    assert resolve(upgrade.bad, fleet.platform).base_version == "v2"

    fleet.promote(upgrade.v1)
    assert upgrade.apply_verdicts().promoted == f"{fleet.family}/v1"
    assert resolve(upgrade.bad, fleet.platform).base_version == "v1"

    fleet.promote(upgrade.v2)
    fleet.promote(None)
    assert upgrade.apply_verdicts().promoted is None
    assert fleet.serving == upgrade.v1.number


def test_a_block_stays_and_is_recorded_until_it_is_given_back(upgrade):
    upgrade.apply_verdicts()
    upgrade.click(upgrade.good, None)
    for _ in range(3):
        (told,) = upgrade.apply_verdicts().manual_overrides
        assert f"{upgrade.good} on v2: taken away by hand" in told
        assert upgrade.registry.alias(upgrade.good, upgrade.v2.alias) is None
    upgrade.fleet.add_adapter(upgrade.good, upgrade.v2, weights="trained there")
    assert upgrade.registry.alias(upgrade.good, upgrade.v2.alias) is None
    upgrade.click(upgrade.good, 2)
    upgrade.apply_verdicts()
    assert upgrade.registry.aliases(upgrade.good)[upgrade.v2.alias].recorded is None


@pytest.mark.servers
def test_killed_after_any_request_that_writes_the_next_look_ends_the_same(
    servers, unique, tmp_path, monkeypatch
):
    from mlflow import MlflowClient

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
