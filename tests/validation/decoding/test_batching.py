import pytest
import torch

from trans_peft.errors import EvaluationError
from trans_peft.validation.decoding.batching import in_batches, is_out_of_memory

CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), CPU, MemoryError()]


class LimitedMemory:
    """Answers with the items' squares; raises `error` for more than `capacity` of them."""

    def __init__(self, capacity, error):
        self.capacity, self.error, self.sizes = capacity, error, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.capacity:
            raise self.error
        return [item**2 for item in batch]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [(100, [8, 3]), (8, [8, 3]), (5, [8, 4, 4, 3]), (1, [8, 4, 2] + [1] * 11)],
)
def test_a_batch_that_does_not_fit_is_halved_and_every_item_answered_once(error, capacity, sizes):
    answer, progress = LimitedMemory(capacity, error), []
    found = in_batches(
        range(11), answer, size=8, describe=str, on_progress=lambda *done: progress.append(done)
    )
    assert found == [item**2 for item in range(11)]
    assert answer.sizes == sizes
    assert progress[-1] == (11, 11)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_a_batch_ends_where_keep_together_ends_it():
    answer = LimitedMemory(3, ERRORS[0])
    found = in_batches(
        range(11),
        answer,
        size=8,
        describe=str,
        keep_together=lambda batch: 5 if batch[0] == 2 else 2,
    )
    assert found == [item**2 for item in range(11)]
    assert answer.sizes == [2, 5, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_item_that_does_not_fit_alone_is_named(error):
    with pytest.raises(EvaluationError, match="item seven"):
        in_batches([7], LimitedMemory(0, error), size=None, describe=lambda item: "item seven")


def test_another_error_is_not_treated_as_out_of_memory():
    answer = LimitedMemory(0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        in_batches([1, 2], answer, size=None, describe=str)
    assert answer.sizes == [2]


def test_torchs_messages_for_out_of_memory_are_recognized():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
