"""The number of port calls of one transfer: each of them is at least one request to MLflow."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.lifecycle.test_recovery import FAMILY, POLICY, TransferSetup
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.lifecycle.reconcile import is_still_needed, observe_adapter
from trans_peft.lifecycle.transfer import record_failure, transfer

READ_BEFORE_A_TASK = {
    "catalog.versions": 1,
    "catalog.alias": 2,  # `serving` and `champion`
    "registry.adapter": 1,
}


class CountingPort:
    """Wraps a port and counts the calls of each of its methods."""

    def __init__(self, port, name, calls):
        self._port, self._name, self._calls = port, name, calls

    def __getattr__(self, method):
        found = getattr(self._port, method)

        def call(*args, **kwargs):
            self._calls[f"{self._name}.{method}"] += 1
            return found(*args, **kwargs)

        return call


@pytest.fixture
def counted(tmp_path):
    """A platform with one adapter to transfer to v2, the task, and the counted calls."""
    setup, calls = TransferSetup(tmp_path), Counter()
    for number in range(3):  # other live adapters must not cost any call
        setup.platform.registry.register(
            replace(setup.source, adapter=f"other-{number}"), setup.peft
        )
    ports = {
        name: CountingPort(getattr(setup.platform, name), name, calls)
        for name in ("catalog", "registry", "evaluations")
    }
    task = TransferTask("parity", setup.source.number, setup.bases[1].ref, Reason.NO_VERDICT)
    return replace(setup.platform, **ports), task, calls


def test_a_transfer_reads_the_registry_once(counted):
    platform, task, calls = counted
    fleet = observe_adapter("parity", FAMILY, platform)
    assert is_still_needed(task, fleet, POLICY)
    assert calls == READ_BEFORE_A_TASK
    outcome = transfer(task, fleet, POLICY, platform)
    assert outcome.verdict is Verdict.NEEDS_RETUNING
    fingerprints = calls.pop("catalog.fingerprint")  # kept in memory by the catalog
    assert fingerprints == 5
    assert calls == READ_BEFORE_A_TASK | {
        "registry.download": 1,
        "registry.register": 1,
        "registry.record": 1,
        "evaluations.get": 3,  # the adapter on v1 and on v2, the bare base on v2
        "evaluations.put": 2,
    }


def test_a_transfer_from_stored_results_downloads_and_registers_nothing(counted):
    platform, task, calls = counted
    transfer(task, observe_adapter("parity", FAMILY, platform), POLICY, platform)
    calls.clear()
    fleet = observe_adapter("parity", FAMILY, platform)
    stricter = replace(POLICY, margin_points=5.0)
    assert is_still_needed(replace(task, reason=Reason.POLICY_CHANGED), fleet, stricter)
    transfer(task, fleet, stricter, platform)
    assert calls == READ_BEFORE_A_TASK | {"registry.record": 1, "evaluations.get": 3}


def test_recording_a_failure_reads_the_registry_once(counted):
    platform, task, calls = counted
    fleet = observe_adapter("parity", FAMILY, platform)
    record_failure(task, fleet, POLICY, platform, reason="the process was killed")
    assert calls == READ_BEFORE_A_TASK | {"registry.record": 1}
