"""Prefect events for automations: their names, resources, labels and payloads."""

from dataclasses import replace

import pytest

from tasks import events, reconciliation
from tests.edges.examples import draft, outcome, peft_folder
from tests.lifecycle.fleet import ANY, FAMILY, POLICY, MemoryFleet
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Verdict
from trans_peft.domain.fleet import AliasChange


@pytest.fixture
def sent(monkeypatch):
    found = []
    monkeypatch.setattr(events, "emit_event", lambda event, **rest: found.append((event, rest)))
    return found


def test_a_ready_base_is_sent_with_family_and_version(sent):
    events.base_ready(BaseVersion("smol", "v2", "s3://bases/smol/v2", 2, "f" * 64, ready=True))
    assert sent == [
        (
            "trans-peft.base.ready",
            {
                "resource": {
                    "prefect.resource.id": "trans-peft.base.smol.v2",
                    "trans-peft.family": "smol",
                    "trans-peft.version": "v2",
                },
                "payload": {
                    "family": "smol",
                    "version": "v2",
                    "uri": "s3://bases/smol/v2",
                    "fingerprint": "f" * 64,
                },
            },
        )
    ]


def test_a_verdict_is_sent_with_labels(sent, tmp_path):
    source = draft("chat", "smol", peft_folder(tmp_path / "peft"))
    events.adapter_judged(outcome(source, Verdict.NEEDS_RETUNING, new_number=2))
    ((event, rest),) = sent
    assert event == "trans-peft.adapter.judged"
    assert rest["resource"] == {
        "prefect.resource.id": "trans-peft.adapter.chat",
        "trans-peft.family": "smol",
        "trans-peft.base": "v2",
        "trans-peft.verdict": "needs-retuning",
    }
    assert rest["payload"] == {
        "adapter": "chat",
        "family": "smol",
        "base": "v2",
        "verdict": "needs-retuning",
        "reason": "because",
        "version": 2,
        "attempts": 1,
    }


@pytest.mark.parametrize(
    ("emit", "event", "resource", "payload"),
    [
        (
            lambda: events.base_refused("smol/3", "s3://b/x", "config.json is missing"),
            "trans-peft.base.refused",
            "trans-peft.upload.s3://b/x",
            {"upload": "smol/3", "why": "config.json is missing"},
        ),
        (
            lambda: events.adapters_withdrawn(
                "smol", [AliasChange("chat", "on-v2", None), AliasChange("code", "on-v1", None)]
            ),
            "trans-peft.adapters.withdrawn",
            "trans-peft.family.smol",
            {"family": "smol", "count": 2, "adapters": "chat (on-v2), code (on-v1)"},
        ),
        (
            lambda: events.fleet_promoted("smol", "smol/v2"),
            "trans-peft.fleet.promoted",
            "trans-peft.family.smol",
            {"family": "smol", "base": "smol/v2"},
        ),
        (
            lambda: events.promotion_refused("smol", "too few"),
            "trans-peft.promotion.refused",
            "trans-peft.family.smol",
            {"family": "smol", "why": "too few"},
        ),
    ],
)
def test_changes_of_a_family_are_sent(sent, emit, event, resource, payload):
    emit()
    assert sent == [(event, {"resource": {"prefect.resource.id": resource}, "payload": payload})]


def test_the_table_of_events_is_complete():
    table = [line.split()[0] for line in events.__doc__.splitlines() if "trans-peft." in line[:16]]
    sent = {"trans-peft." + name.replace("_", ".") for name in events.__all__}
    assert {name for name in table if name.startswith("trans-peft.")} == sent


def test_a_new_policy_that_takes_an_adapter_out_of_service_sends_an_event(
    sent, tmp_path, monkeypatch
):
    fleet = MemoryFleet(tmp_path)
    v1 = fleet.add_base("v1")
    fleet.add_adapter("chat", v1)
    fleet.promote(v1)
    v2 = fleet.add_base("v2")
    (task,) = fleet.tasks()
    fleet.judge(task)
    monkeypatch.setattr(reconciliation, "platform", lambda: fleet.platform)
    apply = reconciliation.apply_fleet_verdicts.fn
    apply(FAMILY, POLICY, ANY)
    assert [event for event, _ in sent] == ["trans-peft.fleet.promoted"]
    stricter = replace(POLICY, margin_points=1.0)
    (again,) = fleet.tasks(stricter)
    fleet.judge(again, Verdict.NEEDS_RETUNING, stricter)
    apply(FAMILY, stricter, ANY)
    _, (event, rest) = sent
    assert event == "trans-peft.adapters.withdrawn"
    assert rest["payload"] == {"family": FAMILY, "count": 1, "adapters": f"chat ({v2.alias})"}
