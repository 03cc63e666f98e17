"""Answers from another base that are used as drafts when an adapter is evaluated."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.lifecycle.fleet import SUITE, MemoryFleet, evaluation
from trans_peft.lifecycle.evaluation import EvaluationSubject, evaluate_on


@pytest.fixture
def used_drafts(monkeypatch):
    """The drafts of each evaluation that is computed; no model is loaded for it."""
    drafts = []

    def answer_with(engine, suite, *, weights_sha256, drafts: dict, **_):
        seen.append(drafts)
        return replace(evaluation(weights_sha256, base, 1, 2), base_fingerprint_sha256="new")

    @contextmanager
    def opened(kind, base_folder, dtype, folder, platform):
        yield SimpleNamespace(tokenizer=None), None

    seen, base = drafts, SimpleNamespace(fingerprint_sha256="new")
    monkeypatch.setattr("trans_peft.validation.evaluate.answer_with", answer_with)
    monkeypatch.setattr("trans_peft.lifecycle.evaluation.opened", opened)
    monkeypatch.setattr("trans_peft.lifecycle.evaluation.base_folder", lambda *_: None)
    monkeypatch.setattr(
        "trans_peft.lifecycle.evaluation.tokenized_suite_for",
        lambda *_: SimpleNamespace(examples=()),
    )
    monkeypatch.setattr("trans_peft.lifecycle.evaluation.with_groups", lambda found, _: found)
    return drafts


def test_only_kept_answers_are_used_as_drafts(used_drafts, tmp_path):
    fleet = MemoryFleet(tmp_path)
    old, new = fleet.add_base("1"), fleet.add_base("2")
    private = evaluation("a", old, 1, 2)
    first, second = private.items
    kept = replace(private, items=(replace(first, answer="yes"), second))
    for reference in ({}, {"other suite": kept}, {SUITE.name: private}, {SUITE.name: kept}):
        subject = EvaluationSubject("chat", "a", lambda: tmp_path, reference)
        evaluate_on(new, (SUITE,), MemoryFleet(tmp_path).platform, subject)  # an empty store
    assert used_drafts == [{}, {}, {}, {"q0": "yes"}]
