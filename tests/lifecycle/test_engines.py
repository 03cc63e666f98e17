"""The engine of a gate policy answers all sides of a comparison, or the default engine does."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model

from tests.lifecycle.test_life import add_base, write_update
from tests.tiny import tiny_model, write_tiny_base
from trans_peft import models
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import DEFAULT_ENGINE, GatePolicy, Suite, engine_lines
from trans_peft.domain.outcome import Reason, TransferTask
from trans_peft.domain.recovery import RecoveryStrategy
from trans_peft.edges.file_store import FileStore
from trans_peft.edges.memory import memory_platform
from trans_peft.errors import InvalidSpecError, WorkerError
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.engines import ONLY_DEFAULT, choose_engines
from trans_peft.lifecycle.mixed_evaluation import evaluate_shard
from trans_peft.lifecycle.reconcile import observe_adapter
from trans_peft.lifecycle.recovery.candidates import Candidate
from trans_peft.lifecycle.recovery.evaluator import CandidateEvaluator
from trans_peft.lifecycle.resolve import find_base
from trans_peft.lifecycle.transfer import transfer
from trans_peft.ui.verdict import suites_of
from trans_peft.validation import continuous_batching
from trans_peft.validation.engine import LoopEngine

FAMILY, ITEMS = "tiny", 12
LOOP = GatePolicy(margin_points=20.0)
POLICY = replace(LOOP, engine="continuous-batching")
LM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
ADAPTERS = {
    "lora": LoraConfig(r=2, init_lora_weights=False, **LM),
    "loha": LoHaConfig(r=2, init_weights=False, **LM),
}
OTHER = "other 1"


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    """v1, v2, and two adapters of v1 with one suite of generated answers and one of choices."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("engines")
    platform = replace(memory_platform(root / "work"), store=FileStore())
    add_base(platform, write_tiny_base(root / "v1"))
    add_base(platform, write_update(root / "v2"))
    rows = [
        {"id": f"{i}", "prompt": f"{i} is", "completion": " odd", "choices": [" odd", " even"]}
        for i in range(ITEMS)
    ]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataSource(str(root / "items.jsonl"))
    suites = (Suite("words", data, max_new_tokens=4), Suite("pick", data, scoring="choice"))
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        get_peft_model(tiny_model(), config).save_pretrained(root / name)
        adopt(name, str(root / name), FAMILY, suites, platform, base_version="v1")
    return platform


@pytest.fixture
def tiny(with_adapters, tmp_path):
    """The same without stored evaluations."""
    return replace(with_adapters, evaluations=memory_platform(tmp_path).evaluations)


@pytest.fixture
def other(monkeypatch):
    """Another engine, which answers as the default engine does; the prompts of each call."""
    calls = []

    class Other(LoopEngine):
        name = OTHER

        def answers(self, prompts, **options):
            calls.append(len(prompts))
            return super().answers(prompts, **options)

        def likelihoods(self, questions, **options):
            raise AssertionError

    monkeypatch.setattr(continuous_batching, "ContinuousBatchingEngine", Other)
    return calls


def parts(name, platform):
    base = find_base(FAMILY, "v2", platform)
    return TransferTask(name, 1, base.ref, Reason.NO_VERDICT), observe_adapter(
        name, FAMILY, platform
    )


def judged(name, policy, platform, **options):
    return transfer(*parts(name, platform), policy, platform, **options)


def engines_of(outcome, suite):
    return {found.engine for found in outcome.evaluations if found.suite == suite}


@pytest.mark.parametrize("policy", [POLICY, replace(POLICY, sequential=True)], ids=["all", "parts"])
def test_one_engine_answers_all_sides_and_the_loop_what_it_cannot(tiny, other, policy):
    expected = judged("lora", replace(policy, engine=DEFAULT_ENGINE), tiny)
    outcome = judged("lora", policy, tiny)
    assert sum(other) >= 2 * ITEMS  # the old base and the new one
    assert engines_of(outcome, "words") == {OTHER}
    assert engines_of(outcome, "pick") == {DEFAULT_ENGINE} == engines_of(expected, "words")
    pick, words = outcome.judgment.suites
    assert (words.engine, words.engine_note) == (OTHER, "")
    assert pick.engine == DEFAULT_ENGINE and "likelihoods of choices" in pick.engine_note
    assert outcome.verdict is expected.verdict
    assert [replace(s, engine=DEFAULT_ENGINE, engine_note="") for s in (pick, words)] == list(
        expected.judgment.suites
    )
    assert outcome.verdict_key != expected.verdict_key
    assert len(engine_lines(outcome.judgment.suites)) == 2
    other.clear()
    assert judged("lora", policy, tiny).judgment == outcome.judgment
    assert other == []  # stored answers are used again


def test_the_page_finds_the_evaluations_of_the_engine(tiny, other):
    outcome = judged("lora", POLICY, tiny)
    adapter, base = tiny.registry.adapter("lora"), find_base(FAMILY, "v2", tiny)
    pick, words = suites_of(adapter, base, outcome, tiny.evaluations)
    assert (words.engine, words.flips.compared, words.flips.problem) == (OTHER, ITEMS, "")
    assert (pick.engine, pick.flips.compared) == (DEFAULT_ENGINE, ITEMS)


def test_the_loop_answers_all_sides_for_an_adapter_that_the_engine_does_not_serve(tiny, other):
    outcome = judged("loha", POLICY, tiny)
    assert {found.engine for found in outcome.evaluations} == {DEFAULT_ENGINE}
    assert other == []
    for suite in outcome.judgment.suites:
        assert "does not serve adapters of the type LOHA" in suite.engine_note


def test_a_candidate_that_the_engine_does_not_serve_is_compared_by_the_loop(tiny, other, tmp_path):
    lora, loha = (tiny.registry.adapter(name).source for name in ADAPTERS)
    folders = {one: tiny.registry.download(one, tmp_path / one.adapter) for one in (lora, loha)}
    evaluator = CandidateEvaluator(
        lora,
        lambda: folders[lora],
        find_base(FAMILY, "v1", tiny),
        find_base(FAMILY, "v2", tiny),
        POLICY,
        tiny,
    )
    assert {name: one.engine for name, one in evaluator.reference().items()} == {
        "words": OTHER,
        "pick": DEFAULT_ENGINE,
    }
    for source, engine in ((lora, OTHER), (loha, DEFAULT_ENGINE)):
        candidate = Candidate(
            RecoveryStrategy.DISTILLED, partial(folders.get, source), source.weights_sha256
        )
        judgment, evaluations = evaluator.judge(candidate)
        sides = [found for found in evaluations if found.suite == "words"]
        assert [found.engine for found in sides] == [engine] * 3
        assert judgment.suites[1].engine == engine


def test_a_shard_is_answered_by_the_engine_before_the_transfers(tiny, other):
    left_out = evaluate_shard([parts(name, tiny) for name in ADAPTERS], POLICY, tiny)
    assert left_out.keys() == {"loha"}  # the loop mixes no batches with it
    assert other == [ITEMS] * 3  # the adapter on v1 and v2, and the bare base
    other.clear()
    outcomes = [judged(name, POLICY, tiny) for name in ADAPTERS]
    assert other == []
    assert [one.judgment.suites[1].engine for one in outcomes] == [OTHER, DEFAULT_ENGINE]


def test_an_engine_that_this_worker_lacks_is_an_error_before_a_model_is_loaded(tiny, monkeypatch):
    monkeypatch.delattr(continuous_batching, "ContinuousBatchingEngine")
    monkeypatch.setattr(models, "load_base", lambda *_, **__: pytest.fail("loaded a model"))
    for policy in (POLICY, replace(POLICY, sequential=True)):
        with pytest.raises(WorkerError, match=r"continuous batching\n  expected: "):
            judged("lora", policy, tiny)
        with pytest.raises(WorkerError):
            evaluate_shard([parts("lora", tiny)], policy, tiny)


def test_the_engine_is_chosen_without_weights(tiny, other, tmp_path, monkeypatch):
    source = tiny.registry.adapter("lora").source
    base = find_base(FAMILY, "v1", tiny)
    suites = (*source.suites, replace(source.suites[0], name="drawn", temperature=1.0))
    nothing = pytest.fail

    assert choose_engines(DEFAULT_ENGINE, suites, [(base, nothing)], tiny) is ONLY_DEFAULT
    folder = tiny.registry.download(source, tmp_path / "chosen")
    found = choose_engines("continuous-batching", suites, [(base, lambda: folder)], tiny)
    assert [found.name_for(suite) for suite in suites] == [OTHER, DEFAULT_ENGINE, DEFAULT_ENGINE]
    old = replace(tiny.catalog.fingerprint(base), config="")
    monkeypatch.setattr(tiny.catalog, "fingerprint", lambda _: old)
    without = choose_engines("continuous-batching", suites, [(base, lambda: folder)], tiny)
    assert set(map(without.kind_for, suites)) == {DEFAULT_ENGINE}
    assert "before it contained config.json" in without.notes[0][1]


def test_the_engine_is_part_of_a_policy_unless_it_is_the_default():
    # A hash that was stored before there were engines.
    assert GatePolicy().sha256 == "4c4a73e348cccc60615f829a4310c6481d5cf10c0b997f673bf975c3f611eeb6"
    assert POLICY.sha256 != LOOP.sha256
    assert POLICY.per_strategy.engine == POLICY.engine
    with pytest.raises(InvalidSpecError, match="engine must be one of loop, continuous-batching"):
        GatePolicy(engine="tgi")
