"""Ingestion records how far a base version moved from its predecessor, and where."""

from dataclasses import replace

import torch

from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.bases import drift
from trans_peft.bases.publish import publish
from trans_peft.domain.base import Upload
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import IsolationError
from trans_peft.lifecycle.bases import ingest


def test_a_version_records_its_drift_from_its_predecessor(tmp_path, monkeypatch):
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore())

    def ingested(version, parent=None, scale=1.0, layers=2):
        folder = tmp_path / "files" / version
        model = tiny_model(layers=layers)
        with torch.no_grad():
            for weight in model.model.layers[-1].mlp.parameters():
                weight *= scale
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        uri = str(tmp_path / "bases" / version)
        publish(folder, uri, family="tiny", version=version, parent=parent, store=platform.store)
        return ingest(Upload(uri), platform)

    assert ingested("v1").drift == ""
    moved = ingested("v2", parent="v1", scale=1.25).drift
    assert moved.startswith("from v1, estimated: FFN ")
    assert "attention 0.00%, other weights 0.00%" in moved
    assert moved.endswith("; largest changes of an FFN: layer 1 25.00%")
    assert ingested("v2b", parent="v0").drift == ""
    other = ingested("v3", layers=1).drift
    assert other.startswith("from v2b: not estimated: tiny/v2b and tiny/v3 contain different")
    assert len(other) < 400

    def no_process(*_, **__):
        raise IsolationError("no process could be started")

    drift._isolated_sublayers.cache_clear()
    monkeypatch.setattr(drift, "call_isolated", no_process)
    assert ingested("v4", parent="v1").drift == (
        "from v1: not estimated: no process could be started"
    )
    ready = platform.catalog.versions("tiny")
    assert [base.version for base in ready if base.ready] == ["v1", "v2", "v2b", "v3", "v4"]
