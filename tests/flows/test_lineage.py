"""Prefect assets: the base version and the source of each adapter version."""

from dataclasses import replace

import prefect.events
import pytest

from tasks import lineage
from tests.edges.examples import draft, outcome, peft_folder
from trans_peft.domain.base import BaseVersion
from trans_peft.domain.evaluation import Verdict

RESULT, REFERENCE = "prefect.asset.materialization.succeeded", "prefect.asset.referenced"


@pytest.fixture
def sent(monkeypatch):
    found = []

    def emit(event, resource, related=(), payload=None):
        resources = [one["prefect.resource.id"] for one in (resource, *related)]
        found.append((event, resource.get("prefect.resource.name"), resources, payload))

    monkeypatch.setattr(prefect.events, "emit_event", emit)
    return found


@pytest.fixture
def trained(tmp_path):
    return replace(draft("chat", "smol", peft_folder(tmp_path / "peft")), number=1)


def base_key(base):
    return f"mlflow://{base.family}/{base.fingerprint_sha256[:12]}"


def test_a_base_version_is_an_asset_by_fingerprint(sent):
    base = BaseVersion("smol", "v2", "s3://bases/smol/v2", 2, "f" * 64, ready=True)
    lineage.base_ready(base.ref)
    asset = "mlflow://smol/ffffffffffff"
    assert sent == [(RESULT, "smol/v2", [asset], {"fingerprint": "f" * 64})]


def test_a_trained_version_depends_on_its_base(sent, trained):
    lineage.adapter_trained(trained)
    base = base_key(trained.base)
    assert [(event, keys) for event, _, keys, _ in sent] == [
        (REFERENCE, [base]),
        (RESULT, ["mlflow://chat/1", base]),
    ]
    assert sent[1][1] == f"chat 1 on {trained.base.version}"
    assert sent[1][3]["weights_sha256"] == trained.weights_sha256


def test_a_transferred_version_depends_on_its_source_and_the_new_base(sent, trained):
    judged = outcome(trained, Verdict.NEEDS_RETUNING, new_number=2)
    lineage.adapter_transferred(judged)
    *references, (event, name, (made, *related), metadata) = sent
    needed = {base_key(judged.base), "mlflow://chat/1"}
    assert {keys[0] for _, _, keys, _ in references} == needed == set(related)
    assert (event, name, made) == (RESULT, f"chat 2 on {judged.base.version}", "mlflow://chat/2")
    assert metadata == {
        "verdict": "needs-retuning",
        "reason": "because",
        "made_by": judged.strategy.value,
    }


def test_a_verdict_without_a_version_is_no_asset(sent, trained):
    lineage.adapter_transferred(outcome(trained, Verdict.INCOMPATIBLE))
    assert sent == []
