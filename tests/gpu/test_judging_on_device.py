"""Mixed batches, and batches that do not fit, on each device."""

from contextlib import contextmanager

import pytest
import torch

from tests.gpu.devices import DEVICES, fill_reserved_memory, more_gpu_memory
from tests.tiny import tiny_model, tiny_tokenizer
from tests.validation.test_mixed_batches import MIXED, ids, one_by_one, save_adapters, texts_of
from trans_peft.errors import EvaluationError
from trans_peft.transfer.mixed_adapters import attached_together
from trans_peft.validation.decoding.generation import generate

BATCH = 32
CONFIGS = {name: MIXED[name] for name in ("lora r 8", "dora")}  # all: tests/validation


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_batches_give_the_tokens_of_each_adapter_alone(device, tmp_path):
    """In float32."""
    folders, tokenizer = save_adapters(tiny_model, CONFIGS, tmp_path), tiny_tokenizer()
    expected = one_by_one(lambda: tiny_model().to(device), folders, tokenizer)
    asked = [(name, text) for name in folders for text in texts_of(name)]
    with attached_together(tiny_model().to(device).eval(), folders) as mixed:
        found = generate(
            mixed,
            tokenizer,
            ids(tokenizer, [text for _, text in asked]),
            max_new_tokens=6,
            adapters=[name for name, _ in asked],
        )
    assert not any(found.near_ties_of)
    assert found.ids == [answer for name in folders for answer in expected[name].ids]


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_share_batches_in_bfloat16(device, tmp_path):
    """`attached_together` leaves out an adapter whose logits differ by more than rounding."""
    folders = save_adapters(tiny_model, CONFIGS, tmp_path)
    with attached_together(tiny_model().to(device, torch.bfloat16).eval(), folders) as mixed:
        assert (mixed.adapters, mixed.left_out) == (tuple(CONFIGS), {})


@contextmanager
def little_memory(model, device, room, batch_bytes):
    """Leave memory for a share of a batch; on a CPU, for that share of its rows."""

    def check_rows(_module, _args, inputs):
        if len(inputs["input_ids"]) > BATCH * room:
            raise torch.OutOfMemoryError("no room")

    if device == "cpu":
        hook = model.register_forward_pre_hook(check_rows, with_kwargs=True)
        yield
        hook.remove()
        return
    with more_gpu_memory(int(room * batch_bytes)):
        _filled = [] if room else fill_reserved_memory()
        yield


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_that_does_not_fit_is_halved_and_a_single_item_is_named(device):
    # On a GPU a batch has to be large compared with the blocks that the allocator reserves.
    hidden, tokens = (32, 20) if device == "cpu" else (256, 450)
    model, tokenizer = tiny_model(hidden=hidden).to(device).eval(), tiny_tokenizer()
    prompts = [[(i + j) % 250 for j in range(tokens)] for i in range(BATCH)]
    rows = []
    model.register_forward_pre_hook(
        lambda _module, _args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    expected = generate(model, tokenizer, prompts, max_new_tokens=2)
    assert max(rows) == BATCH
    batch_bytes = 0
    if device == "cuda":
        batch_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    rows.clear()
    with little_memory(model, device, 0.5, batch_bytes):
        found = generate(model, tokenizer, prompts, max_new_tokens=2)
    assert found.ids == expected.ids
    assert max(rows) == BATCH  # the batch that failed
    assert rows[-1] <= BATCH // 2
    with (
        little_memory(model, device, 0, batch_bytes),
        pytest.raises(EvaluationError, match="out of memory with a single item"),
    ):
        generate(model, tokenizer, prompts, max_new_tokens=2)
