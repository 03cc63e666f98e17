"""The recovery strategy `compensated` in a transfer: it reads prompts, and no training row."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from tests.lifecycle.test_distillation import PROMPTS, Setup
from tests.lifecycle.test_recovery import ITEMS, POLICY, strategies
from tests.tiny import tiny_model, tiny_tokenizer
from trans_peft.data import Example
from trans_peft.domain.recovery import (
    CompensationPolicy,
    DistillationPolicy,
    RecoveryPolicy,
    RecoveryStrategy,
)
from trans_peft.edges.stores import SchemeStore
from trans_peft.errors import AdapterError, EvaluationError, InvalidSpecError
from trans_peft.lifecycle.recovery import evaluator
from trans_peft.lifecycle.recovery.compensation import answering_inputs
from trans_peft.methods.bottleneck import BottleneckConfig
from trans_peft.models import adapter_weights_sha256
from trans_peft.transfer import module_inputs
from trans_peft.validation.decoding import generation

FULL = 64
"""No module of the tiny model has a smaller side than this rank."""


@pytest.fixture
def setup(tmp_path, monkeypatch):
    return Setup(tmp_path, monkeypatch)


def compensated(setup, rows=None, **settings):
    """Return the outcome, and the attempt of the strategy."""
    rows = [{"prompt": text} for text in PROMPTS] if rows is None else rows
    uri = setup.write(rows).replace("parity", "{adapter}")
    policy = CompensationPolicy(**{"prompts_uri": uri, "rank": 4} | settings)
    outcome = setup.transfer(compensation=policy)
    assert strategies(outcome)[0] == ("direct", "needs-retuning")
    return outcome, outcome.tried[1]


def test_the_compensated_weights_are_judged_and_registered(setup):
    outcome, tried = compensated(setup)
    assert (tried.strategy, tried.verdict) == ("compensated", "needs-retuning")
    assert tried.note.startswith("45 prompts of ")
    assert ", 45 of them answered; rank 4; " in tried.note
    # The same weights again: the result is stored under their hash.
    (known,) = {
        found.weights_sha256
        for found in setup.platform.evaluations._evaluations.values()
        if found.base_fingerprint_sha256 == setup.bases[1].fingerprint_sha256
    } - {setup.source.weights_sha256, "bare"}
    setup.forget(known, setup.bases[1])
    setup.answered(known, setup.bases[1], right=ITEMS)
    outcome, tried = compensated(setup)
    assert (outcome.verdict, outcome.strategy) == ("passed", "compensated")
    assert "level 2.5 %" in outcome.judgment.reason  # one of two strategies
    version = setup.version(outcome)
    assert version.made_by is RecoveryStrategy.COMPENSATED
    assert version.trained_on.version == "v1"
    folder = setup.platform.registry.download(version, setup.folder / "downloaded")
    assert adapter_weights_sha256(folder) == known
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 6
    assert "absent.jsonl" not in {uri.rpartition("/")[2] for uri in setup.read}


def test_at_full_rank_the_linear_modules_are_compensated_and_not_the_norms(setup):
    _, tried = compensated(setup, rank=FULL)
    assert "100 % of the change of 15 linear modules compensated" in tried.note


def test_the_output_layer_can_be_left_out(setup):
    _, tried = compensated(setup, rank=FULL, output_layer=False)
    assert "100 % of the change of 14 linear modules compensated" in tried.note


def test_answers_and_matrices_are_reported_as_progress(setup):
    compensated(setup)
    shown = [str(step) for step in setup.progress if "items" not in step.unit]
    assert shown[0] == "parity: needs-retuning (direct) on v2: 1 of 2 strategies"
    assert "parity: answers for compensation on v1: 45 of 45 prompts" in shown
    assert "parity: inputs for compensation on v1: 45 of 45 prompts" in shown
    assert shown[-1] == "parity: matrices for compensation on v2: 15 of 15 modules"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": text} for text in PROMPTS[:10]], "at least 32"),
        ([{"prompt": f"{i}  IS"} for i in range(ITEMS)], "at least 32"),  # the suite's items
    ],
    ids=["few", "of the suite"],
)
def test_unusable_prompts_leave_the_direct_verdict(setup, rows, reason):
    outcome, tried = compensated(setup, rows)
    assert (tried.verdict, outcome.strategy) == ("", "direct")
    assert reason in tried.reason


def test_prompts_in_an_unsupported_store_leave_the_direct_verdict(setup):
    setup.platform = replace(setup.platform, store=SchemeStore())
    outcome, tried = compensated(setup, prompts_uri="gs://traffic/{adapter}.jsonl")
    assert (tried.verdict, outcome.strategy) == ("", "direct")
    assert "there is no store for the URI scheme 'gs'" in tried.reason


def test_an_adapter_without_prompts_keeps_the_whole_level(setup):
    outcome, tried = compensated(setup, prompts_uri="")
    assert "(synthetic_prompts) gives prompts" in str(tried)
    assert "level 5 %" in outcome.judgment.reason


def write_bottleneck(folder):
    config = BottleneckConfig(
        bottleneck_dim=4, init_bottleneck_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(tiny_model(), config).save_pretrained(folder)


def test_a_bottleneck_adapter_is_compensated_at_its_share_of_the_level(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, recipe=False, edit=write_bottleneck)
    outcome, tried = compensated(setup)
    assert (tried.strategy, tried.verdict) == ("compensated", "needs-retuning")
    assert "level 2.5 %" in outcome.judgment.reason  # one of two strategies


@pytest.mark.parametrize(("method", "strategies"), [("LORA", 2), ("BOTTLENECK", 2), ("IA3", 1)])
def test_the_level_is_shared_with_the_types_that_can_be_compensated(setup, method, strategies):
    policy = replace(POLICY, recovery=RecoveryPolicy(compensation=CompensationPolicy("x.jsonl")))
    found = evaluator.policy_per_strategy(policy, replace(setup.source, method=method))
    assert found.alpha == policy.alpha / strategies


def test_an_adapter_without_a_recipe_is_compensated_and_not_distilled(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch, recipe=False)
    uri = setup.write([{"prompt": text} for text in PROMPTS])
    outcome = setup.transfer(
        compensation=CompensationPolicy(prompts_uri=uri, rank=4),
        distillation=DistillationPolicy(prompts_uri=uri),
    )
    assert [strategy for strategy, verdict in strategies(outcome) if verdict] == [
        "direct", "compensated",
    ]  # fmt: skip
    assert "level 2.5 %" in outcome.judgment.reason


@pytest.mark.parametrize(
    ("module", "function", "error", "reason"),
    [
        (
            generation,
            "generate",
            EvaluationError("the logits are not finite"),
            "compensation failed: the logits are not finite",
        ),
        (
            generation,
            "generate",
            InvalidSpecError("prompt 3 is empty"),
            "compensation failed: prompt 3 is empty",
        ),
        (
            module_inputs,
            "module_inputs",
            torch.OutOfMemoryError("CUDA out of memory"),
            "compensation failed: out of memory: CUDA out of memory",
        ),
    ],
)
def test_a_failure_leaves_the_direct_verdict(setup, monkeypatch, module, function, error, reason):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, function, fail)
    outcome, tried = compensated(setup)
    assert (tried.verdict, outcome.strategy) == ("", "direct")
    assert tried.reason == reason


def test_a_result_that_cannot_be_loaded_leaves_the_direct_verdict(setup, monkeypatch):
    def fail(folder, *_: object) -> None:
        raise AdapterError(f"{folder} does not fit this base")

    probe = evaluator.probe
    monkeypatch.setattr(
        evaluator, "probe", lambda *args: (fail if "compensated" in args[0].name else probe)(*args)
    )
    outcome, tried = compensated(setup)
    assert (tried.verdict, outcome.strategy) == ("", "direct")
    assert tried.reason == f"its result cannot be used: {setup.source} does not fit this base"


def test_a_prompt_that_is_longer_than_all_that_is_read_does_not_displace_the_others(
    setup, monkeypatch
):
    texts = PROMPTS[:3]
    lengths = [len(ids) for ids in tiny_tokenizer()(texts)["input_ids"]]
    monkeypatch.setattr(module_inputs, "MAX_TOKENS", sum(lengths[:2]))
    prompts = [Example(text, text, " ") for text in ("x y " * sum(lengths), *texts)]
    suite = setup.source.suites[0]
    _, answered = answering_inputs(setup.peft, setup.folder / "v1", suite, prompts)
    assert answered == 2
    _, answered = answering_inputs(setup.peft, setup.folder / "v1", suite, prompts[:1])
    assert answered == 1


def test_prompts_that_do_not_fit_into_the_context_are_not_answered(setup):
    long = [{"prompt": f"{text} {'x' * 600}"} for text in PROMPTS]
    outcome, tried = compensated(setup, long)
    assert (tried.verdict, outcome.strategy) == ("", "direct")
    assert "no prompt fits into the context of the old base" in tried.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"prompts": 8}, "prompts must be at least 32, not 8"),
        ({"prompts_uri": "s3://x/{name}.jsonl"}, "may contain {adapter} only"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(InvalidSpecError, match=f"the compensation policy is invalid: .*{message}"):
        CompensationPolicy(**settings)
