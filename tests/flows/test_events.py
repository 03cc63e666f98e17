"""The events that people hang automations on: their names, and the labels that they match."""

import pytest

from tasks import events
from tests.edges.nouns import draft, outcome, peft_folder
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Verdict


@pytest.fixture
def told(monkeypatch):
    sent = []
    monkeypatch.setattr(events, "emit_event", lambda event, **rest: sent.append((event, rest)))
    return sent


def test_a_base_that_is_ready_is_told_by_family_and_version(told):
    events.base_ready(BaseVersion("smol", "v2", "s3://bases/smol/v2", 2, "f" * 64, ready=True))
    assert told == [
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


def test_a_verdict_is_told_with_labels_to_match(told, tmp_path):
    source = draft("chat", "smol", peft_folder(tmp_path / "peft"))
    events.adapter_judged(outcome(source, Verdict.NEEDS_RETUNING, new_number=2))
    ((event, rest),) = told
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
    ("tell", "event", "resource", "payload"),
    [
        (
            lambda: events.base_refused("smol/3", "s3://b/x", "config.json is missing"),
            "trans-peft.base.refused",
            "trans-peft.upload.s3://b/x",
            {"upload": "smol/3", "why": "config.json is missing"},
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
def test_what_happens_to_a_family_is_told(told, tell, event, resource, payload):
    tell()
    assert told == [(event, {"resource": {"prefect.resource.id": resource}, "payload": payload})]


def test_the_table_of_events_is_whole():
    table = [line.split()[0] for line in events.__doc__.splitlines() if "trans-peft." in line[:16]]
    told = {"trans-peft." + name.replace("_", ".") for name in events.__all__}
    assert {name for name in table if name.startswith("trans-peft.")} == told
