"""Estimated memory against the allocations that PyTorch's profiler counts on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model, write_tiny_base
from tests.training.conftest import recipe
from tests.training.test_finetune import trained
from trans_peft.domain.compute import ComputeSettings
from trans_peft.errors import InvalidSpecError
from trans_peft.methods.specs import attach
from trans_peft.training import finetune as finetune_module
from trans_peft.training import memory
from trans_peft.training.events import MemoryEstimated
from trans_peft.training.memory import StepShape, check_memory, estimate_memory

SHAPE = StepShape(rows=4, tokens=192, answer_tokens=24)


def step(model, optimizer):
    ids = torch.zeros(SHAPE.rows, SHAPE.tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # one row is shorter
    stack = model.base_model.model.model
    hidden = stack(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, -SHAPE.answer_tokens :]).flatten(0, 1)
    targets = ids[:, -SHAPE.answer_tokens :].flatten()
    torch.nn.functional.cross_entropy(logits.float(), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def measured(base, settings) -> int:
    """The largest sum of the bytes of tensors that are alive in a second step."""
    attention = settings.compute.attention
    options = {} if attention == "auto" else {"attn_implementation": attention}
    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, settings.dtype), **options
    )
    model = attach(loaded, settings.spec).train()
    if settings.compute.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    step(model, optimizer)
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(model, optimizer)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return held + peak


@pytest.fixture(scope="module")
def larger_base(tmp_path_factory):
    """10 MiB of weights."""
    return write_tiny_base(tmp_path_factory.mktemp("larger"), layers=4, hidden=384, vocabulary=8000)


@pytest.mark.parametrize(
    ("size", "dtype", "compute"),
    [
        ("tiny", "float32", {"gradient_checkpointing": True}),
        # each of the others needs seconds on fake tensors
        pytest.param("tiny", "float32", {}, marks=pytest.mark.slow),
        pytest.param("tiny", "bfloat16", {}, marks=pytest.mark.slow),
        pytest.param("tiny", "float32", {"attention": "eager"}, marks=pytest.mark.slow),
        pytest.param("larger", "float32", {}, marks=pytest.mark.slow),
        pytest.param("larger", "float32", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_estimate_is_within_5_percent_of_the_allocations(
    tiny_base, larger_base, size, dtype, compute
):
    base = tiny_base if size == "tiny" else larger_base
    settings = replace(recipe(), dtype=dtype, compute=ComputeSettings(**compute))
    found = estimate_memory(settings, base, SHAPE).peak_bytes
    expected = measured(base, settings)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.slow  # several passes on fake tensors
def test_the_parts_follow_from_the_number_of_weights(tiny_base):
    settings = replace(recipe(gradient_accumulation=2), processes=2)
    found = estimate_memory(settings, tiny_base, SHAPE)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    base_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    trained_weights = sum(
        p.numel() for p in attach(model, settings.spec).parameters() if p.requires_grad
    )
    assert found.base_bytes == base_bytes
    assert found.adapter_bytes == 4 * trained_weights
    assert found.optimizer_bytes == (8 + 4 + 4) * trained_weights
    in_8_bits = replace(settings, optimizer=replace(settings.optimizer, name="adamw_8bit"))
    found = estimate_memory(in_8_bits, tiny_base, SHAPE)
    assert found.optimizer_bytes == (2 + 4 + 4) * trained_weights


@pytest.mark.slow  # several passes on fake tensors
def test_nf4_needs_a_quarter_of_the_linear_layers(tiny_base):
    sixteen, four = (
        estimate_memory(replace(recipe(), dtype=dtype), tiny_base, SHAPE)
        for dtype in ("bfloat16", "nf4")
    )
    # 2 layers: q and o 32 x 32, k and v 16 x 32, three of the FFN 32 x 64
    linear, largest = 2 * (2 * 1024 + 2 * 512 + 3 * 2048), 2048
    saved = sixteen.base_bytes - four.base_bytes
    assert saved == pytest.approx(linear * (2 - 0.516) - 2 * largest, abs=20)


def test_a_sharded_base_gathers_two_layers_and_what_is_outside_of_them():
    model = tiny_model(layers=3)
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    outside = sum(weight.nbytes for weight in model.parameters()) - 3 * layer
    adapted = attach(model, recipe().spec)
    assert memory._gathered(adapted) == outside + 2 * layer


@pytest.mark.slow  # several passes on fake tensors
def test_a_recipe_that_does_not_fit_is_refused_with_what_to_change(tiny_base):
    settings = replace(recipe(), compute=ComputeSettings(memory_gib=1e-5))
    with pytest.raises(InvalidSpecError) as caught:
        check_memory(settings, tiny_base, SHAPE)
    text = str(caught.value)
    assert "at most 1e-05 GiB for each process" in text
    assert "estimated memory 0.00" in text
    assert "compute.gradient_checkpointing: 0.00 GiB" in text
    assert "half of optimizer.batch_size, with twice the gradient_accumulation: 0.00 GiB" in text


def test_a_training_states_its_estimate_before_the_base_is_loaded(make_job, tmp_path, monkeypatch):
    settings = replace(
        recipe(steps=1, warmup_steps=0, max_length=70), compute=ComputeSettings(memory_gib=1)
    )
    shapes, sent = [], []
    estimate = MemoryEstimated(1, 2, 3, 4)

    def estimated(recipe, base, shape):
        shapes.append(shape)
        return estimate

    monkeypatch.setattr(memory, "estimate_memory", estimated)
    monkeypatch.setattr(finetune_module, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        trained(make_job(tmp_path, settings), sent.append)
    assert sent == [estimate]
    assert shapes == [StepShape(rows=2, tokens=70, answer_tokens=10)]


def test_an_architecture_that_cannot_be_estimated_is_named(tiny_base, monkeypatch):
    def fail(*_):
        raise NotImplementedError("aten::custom has no fake implementation")

    monkeypatch.setattr(memory, "_forward_and_backward", fail)
    with pytest.raises(InvalidSpecError, match=r"(?s)cannot be estimated.*aten::custom"):
        estimate_memory(recipe(), tiny_base, SHAPE)
