"""Manual overrides and reconcile in any order: overrides are kept, no verdict is recorded twice."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.lifecycle.fleet import FAMILY, POLICY, MemoryFleet
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.lifecycle.reconcile import is_still_needed, observe, observe_adapter

HALF = PromotionPolicy(min_serving_share=0.5)
JUDGED = [Verdict.PASSED, Verdict.NEEDS_RETUNING, Verdict.INCONCLUSIVE, Verdict.INCOMPATIBLE]


class FleetAndPeople(RuleBasedStateMachine):
    """`overrides`: the version on which a person set an alias against the verdict."""

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory(prefix="trans-peft-test-")
        self.fleet = MemoryFleet(Path(self.folder.name))
        self.bases = [self.fleet.add_base("v1")]
        self.overrides: dict[tuple[str, str], int | None] = {}
        self.judged: set[tuple] = set()
        self.trained = 0
        self.train()

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @property
    def registry(self):
        return self.fleet.platform.registry

    # Base versions and training

    @precondition(lambda self: len(self.bases) < 4)
    @rule()
    def a_base_becomes_ready(self):
        self.bases.append(self.fleet.add_base(f"v{len(self.bases) + 1}"))

    @rule()
    def train(self):
        self.trained += 1
        self.fleet.add_adapter(f"a{self.trained}", self.bases[-1])

    @rule(data=st.data())
    def retune(self, data):
        self.trained += 1
        name = data.draw(st.sampled_from(self.registry.adapters(FAMILY)))
        self.fleet.add_adapter(name, self.bases[0], weights=f"again-{self.trained}")

    # People

    @rule(data=st.data())
    def promote(self, data):
        self.fleet.promote(data.draw(st.sampled_from([*self.bases, None])))

    @rule(data=st.data())
    def set_an_alias_manually(self, data):
        adapter = data.draw(st.sampled_from(self.registry.adapters(FAMILY)))
        base = data.draw(st.sampled_from(self.bases))
        numbers = [version.number for version in self.registry.versions(adapter)]
        number = data.draw(st.sampled_from([*numbers, None]))
        self.registry.set_alias_manually(adapter, base.alias, number)
        self.overrides.pop((adapter, base.alias), None)
        if not self.registry.owns_alias(adapter, base.alias):
            self.overrides[adapter, base.alias] = number

    @precondition(lambda self: len(self.registry.adapters(FAMILY)) > 1)
    @rule(data=st.data())
    def retire(self, data):
        self.registry.retire_manually(data.draw(st.sampled_from(self.registry.adapters(FAMILY))))

    # Reconcile

    @rule(verdict=st.sampled_from(JUDGED), count=st.integers(1, 4))
    def judge(self, verdict, count):
        for task in self.fleet.tasks()[:count]:
            seen = observe_adapter(task.adapter, FAMILY, self.fleet.platform)
            if is_still_needed(task, seen, POLICY):
                outcome = self.fleet.judge(task, verdict)
                key = (outcome.adapter, outcome.weights_sha256, outcome.base.version)
                assert key not in self.judged
                self.judged.add(key)

    @rule()
    def apply_verdicts(self):
        before = self.fleet.serving
        changes = self.fleet.apply_verdicts(HALF)
        seen = observe(FAMILY, self.fleet.platform)
        assert not changes.is_outdated
        if seen.champion is None:
            assert seen.serving == before
            assert seen.notes == {}
        elif seen.serving == seen.champion:
            assert seen.notes == {}
        else:
            assert set(seen.notes) == {seen.champion}
            assert seen.serving == before
        for adapter in seen.adapters:
            for base in seen.bases:
                state = adapter.alias_on(base)
                assert (state.recorded is not None) is state.is_manual
        again = self.fleet.apply_verdicts(HALF)
        assert (again.aliases, again.promoted) == ((), None)

    # Invariants

    @invariant()
    def manual_overrides_are_kept(self):
        for (adapter, alias), number in getattr(self, "overrides", {}).items():
            assert self.registry.alias(adapter, alias) == number

    @invariant()
    def nothing_is_registered_twice(self):
        for adapter in self.registry.adapters(FAMILY) if hasattr(self, "fleet") else ():
            keys = [(v.weights_sha256, v.base.fingerprint_sha256)
                    for v in self.registry.versions(adapter)]  # fmt: skip
            assert len(set(keys)) == len(keys)


FleetAndPeople.TestCase.settings = settings(
    max_examples=100, stateful_step_count=20, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestFleetAndPeople = pytest.mark.timeout(120)(FleetAndPeople.TestCase)
