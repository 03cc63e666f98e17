"""When a run starts the process that builds the models of uploads."""

from datetime import UTC, datetime

import pytest

from infra.bridge.notifications import NotificationKind
from tasks import ingestion
from tasks.origin import Origin
from trans_peft.bases.model_check import IMPORTS


@pytest.mark.parametrize(
    ("kind", "prepared"),
    [
        *(
            (kind, [IMPORTS] if kind == NotificationKind.UPLOAD else [])
            for kind in NotificationKind
        ),
        (None, []),
    ],
)
def test_only_a_run_that_an_upload_caused_starts_it_before_it_reads_the_registry(
    kind, prepared, monkeypatch
):
    cause = Origin("delivery-1", kind, datetime(2026, 1, 1, tzinfo=UTC)) if kind else None
    monkeypatch.setattr(ingestion, "origin", lambda: cause)
    seen = []
    monkeypatch.setattr(ingestion, "prepare", seen.append)
    ingestion.prepare_for_upload()
    assert seen == prepared
