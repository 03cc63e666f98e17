"""A run judges only by the policies of reconcile's deployment."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prefect.exceptions import ObjectNotFound

from tasks import deployed_policies, transfer
from tests.flows.test_shards import A
from tests.lifecycle.fleet import POLICY
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.identity import json_value
from trans_peft.domain.promotion import PromotionPolicy

PROMOTION = PromotionPolicy(min_serving_share=0.5)
OURS = {"policy": json_value(POLICY), "promotion": json_value(PROMOTION)}


@pytest.fixture
def deploy(monkeypatch):
    """Set the parameters of the deployment; None: there is no deployment."""

    def parameters(found):
        def read(name):
            assert name == "reconcile/default"
            if found is None:
                raise ObjectNotFound(Exception())
            return SimpleNamespace(parameters=found)

        client = nullcontext(SimpleNamespace(read_deployment_by_name=read))
        monkeypatch.setattr(deployed_policies, "get_client", lambda sync_client: client)

    return parameters


@pytest.mark.parametrize(
    ("found", "changed"),
    [
        (OURS, ""),
        ({"policy": OURS["policy"], "family": None}, ""),  # the promotion policy is the run's own
        (None, ""),
        (OURS | {"policy": json_value(replace(POLICY, label="june"))}, "gate policy"),
        (OURS | {"policy": {"margin": 1}}, "gate policy"),
        (OURS | {"promotion": {}}, "promotion policy"),
        ({"policy": {"label": "june"}, "promotion": None}, "gate policy and promotion policy"),
    ],
)
def test_a_run_is_compared_with_the_deployment(deploy, found, changed):
    deploy(found)
    assert deployed_policies.changed_policies.fn(POLICY, PROMOTION) == changed
    assert deployed_policies.is_deployed(POLICY) is ("gate" not in changed)


def test_omitted_fields_have_their_defaults(deploy):
    deploy({"policy": {}, "promotion": {}})
    assert not deployed_policies.changed_policies.fn(GatePolicy(), PromotionPolicy())


@pytest.fixture
def judged(monkeypatch):
    """The transfers that a shard computes. All are missing by any policy."""
    computed = []
    monkeypatch.setattr(transfer, "platform", lambda: None)
    monkeypatch.setattr(transfer, "adapter_lock", lambda adapter: nullcontext())
    monkeypatch.setattr(transfer, "observe_adapter", lambda *given: None)
    monkeypatch.setattr(transfer, "is_still_needed", lambda *given: True)
    monkeypatch.setattr(transfer, "work_progress", lambda: None)

    def compute(task, *given, **options):
        computed.append(task)
        return SimpleNamespace()

    monkeypatch.setattr("trans_peft.lifecycle.transfer.transfer", compute)
    monkeypatch.setattr("trans_peft.lifecycle.transfer.record_failure", compute)
    monkeypatch.setattr(
        "trans_peft.lifecycle.mixed_evaluation.evaluate_shard",
        lambda needed, *given, **options: computed.extend(task for task, _ in needed) or {},
    )
    for module, name in (
        *((transfer.events, "adapter_judged"), (transfer.metrics, "adapter_judged")),
        (transfer.lineage, "adapter_transferred"),
    ):
        monkeypatch.setattr(module, name, lambda outcome: None)
    return computed


@pytest.mark.parametrize(("found", "count"), [(OURS, 1), ({"policy": {"label": "june"}}, 0)])
def test_a_shard_skips_transfers_of_another_policy(deploy, judged, found, count):
    deploy(found)
    for judge in (
        lambda: transfer.evaluate_together.fn((A,), POLICY),
        lambda: transfer.transfer_adapter.fn(A, POLICY),
        lambda: transfer.record_failure.fn(A, POLICY, "its process was killed"),
    ):
        judge()
        assert judged == [A] * count
        judged.clear()


def test_the_next_run_is_no_child_of_the_run_that_ends(monkeypatch):
    """Prefect cancels the children of a cancelled run."""
    started = []

    def run_deployment(name, **given):
        started.append((name, given))
        return SimpleNamespace(name="loose-dog")

    monkeypatch.setattr(deployed_policies, "run_deployment", run_deployment)
    monkeypatch.setattr(deployed_policies, "current_run", SimpleNamespace(id="7"))
    monkeypatch.setattr(deployed_policies, "inherited_tags", lambda: ["notification:n"])
    assert deployed_policies.start_successor("small", wait=True) == "loose-dog"
    ((name, given),) = started
    assert name == "reconcile/default"
    assert given["parameters"] == {"family": "small", "wait": True}
    assert (given["as_subflow"], given["idempotency_key"]) == (False, "successor of 7")
    assert given["tags"] == ["notification:n"]
