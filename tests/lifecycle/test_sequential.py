"""Transfers with sequential tests, with a tiny model and ports in memory."""

import gc
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from tests.lifecycle.test_life import add_base, write_update
from tests.tiny import tiny_model, write_tiny_base
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import BARE, GatePolicy, Suite, Verdict
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle import sequential
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.engines import Engines
from trans_peft.lifecycle.evaluation import BARE_BASE
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.transfer import transfer
from trans_peft.validation import evaluate

ITEMS, FAMILY = 96, "tiny"
EARLY = GatePolicy(margin_points=20.0, must_beat_bare=False, sequential=True)


@pytest.fixture
def fleet(tmp_path):
    """v1, v2 and an adapter that answers every item wrongly on both, so that nothing is lost."""
    platform = replace(memory_platform(tmp_path / "work"), store=FileStore())
    add_base(platform, write_tiny_base(tmp_path / "v1"))
    add_base(platform, write_update(tmp_path / "v2"))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "peft")
    rows = [{"id": f"{i}", "prompt": f"{i} is", "completion": " odd"} for i in range(ITEMS)]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = Suite("parity", DataSource(str(tmp_path / "eval.jsonl")), max_new_tokens=4)
    adopted = adopt("parity", str(tmp_path / "peft"), FAMILY, (suite,), platform, base_version="v1")
    return platform, adopted


def judged(platform, policy):
    """Return the outcome on v2 and the number of items that each subject answered there."""
    answered = {}
    outcome = transfer(
        TransferTask("parity", 1, find_base(FAMILY, "v2", platform).ref, Reason.NO_VERDICT),
        observe_adapter("parity", FAMILY, platform),
        policy,
        platform,
        on_progress=lambda progress: answered.update(
            {progress.description: (progress.done, progress.total)}
        ),
    )
    return outcome, {what: done for what, done in answered.items() if what.endswith("v2")}


def test_a_part_of_a_suite_decides_and_is_stored_as_a_part(fleet):
    platform, adapter = fleet
    outcome, answered = judged(platform, EARLY)
    assert answered == {"parity: parity on v2": (32, ITEMS)}
    assert outcome.verdict is Verdict.PASSED
    (figures,) = outcome.judgment.suites
    assert (figures.items, figures.prefix.suite_items) == (32, ITEMS)
    assert "32 of 96 items" in outcome.judgment.reason
    reference, part = outcome.evaluations
    assert (len(reference.items), reference.prefix) == (ITEMS, None)
    assert (len(part.items), part.prefix) == (32, figures.prefix)
    assert platform.evaluations.get(part.key) == part
    whole = adapter.suites[0].evaluation_key(
        adapter.weights_sha256, outcome.base.fingerprint_sha256
    )
    assert platform.evaluations.get(whole) is None

    again, answered = judged(platform, EARLY)
    assert (again.judgment, answered) == (outcome.judgment, {})
    stricter, answered = judged(platform, replace(EARLY, margin_points=5.0))
    assert answered == {"parity: parity on v2": (96, ITEMS)}  # it went on after the first 32
    assert stricter.verdict is Verdict.PASSED

    fixed, answered = judged(platform, replace(EARLY, sequential=False))
    assert fixed.judgment.suites[0].items == ITEMS
    assert "sequential" not in fixed.judgment.reason
    assert answered["bare base: parity on v2"] == (ITEMS, ITEMS)
    from_whole, answered = judged(platform, EARLY)
    assert (from_whole.judgment, answered) == (outcome.judgment, {})


def test_adapter_and_bare_base_are_evaluated_in_the_same_order(fleet):
    platform, _ = fleet
    outcome, answered = judged(platform, replace(EARLY, must_beat_bare=True))
    assert outcome.verdict is Verdict.RETIRE
    assert answered["bare base: parity on v2"] == answered["parity: parity on v2"]
    _, candidate, bare = outcome.evaluations
    assert bare.weights_sha256 == BARE
    assert [item.id for item in candidate.items] == [item.id for item in bare.items]


def test_a_suite_that_is_not_required_is_evaluated_as_a_whole(fleet, tmp_path):
    platform, adapter = fleet
    second = replace(adapter.suites[0], name="also")
    adopted = adopt(
        "both",
        str(tmp_path / "peft"),
        FAMILY,
        (adapter.suites[0], second),
        platform,
        base_version="v1",
    )
    outcome = transfer(
        TransferTask(
            "both", adopted.number, find_base(FAMILY, "v2", platform).ref, Reason.NO_VERDICT
        ),
        observe_adapter("both", FAMILY, platform),
        replace(EARLY, required_suites=("parity",)),
        platform,
    )
    found = {suite.suite: suite.items for suite in outcome.judgment.suites}
    assert found == {"parity": 32, "also": ITEMS}


def test_parts_use_old_answers_as_drafts_and_sum_near_ties(fleet, tmp_path, monkeypatch):
    platform, adapter = fleet
    suite = replace(adapter.suites[0], name="kept", keep_answers=True)
    peft = str(tmp_path / "peft")
    adopted = adopt("kept", peft, FAMILY, (suite,), platform, base_version="v1")
    on_v1 = suite.evaluation_key(adopted.weights_sha256, adopted.base.fingerprint_sha256)
    expected = platform.evaluations.get(on_v1).kept_answers
    drafts, answer_with = [], evaluate.answer_with

    def undecided(engine, questions, **options):
        drafts.append(options["drafts"])
        return replace(answer_with(engine, questions, **options), near_ties=2)

    monkeypatch.setattr(evaluate, "answer_with", undecided)
    policy = replace(EARLY, margin_points=5.0)
    v2 = find_base(FAMILY, "v2", platform).ref
    task = TransferTask("kept", adopted.number, v2, Reason.NO_VERDICT)
    outcome = transfer(task, observe_adapter("kept", FAMILY, platform), policy, platform)
    assert drafts == [expected] * 3 and len(expected) == ITEMS
    assert outcome.evaluations[1].near_ties == 6


def test_a_base_is_released_before_another_engine_starts(monkeypatch):
    """vLLM takes the memory that the base of the default engine had."""
    bases = []

    class Base:
        pass

    @contextmanager
    def opened(*_):
        gc.collect()
        assert not any(base() for base in bases)
        base = Base()
        bases.append(weakref.ref(base))
        yield base, None

    monkeypatch.setattr(sequential, "opened", opened)
    monkeypatch.setattr(sequential, "base_folder", lambda *_: None)
    subject = replace(BARE_BASE, engines=Engines("vllm", "vllm 1", (("pick", "choices"),)))
    with sequential._BatchEvaluator(None, None, None) as evaluator:
        for name in ("pick", "words", "pick"):
            evaluator._load(subject, SimpleNamespace(name=name, dtype="float32"))
    assert len(bases) == 3
