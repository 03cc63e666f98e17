import fcntl
import threading
import time

import pytest
import torch

from tests.tiny import tiny_tokenizer
from tests.training.conftest import EXAMPLES
from trans_peft.data import Example
from trans_peft.errors import DataError, TrainingError
from trans_peft.training import worker
from trans_peft.training.events import Failed
from trans_peft.training.job_rows import check_tokens

TOKENIZER = tiny_tokenizer()
LONGEST = max(len(example.full_ids(TOKENIZER)) for example in EXAMPLES)


def test_rows_that_are_cut_are_counted():
    assert check_tokens(EXAMPLES, TOKENIZER, LONGEST) == 0
    cut = [e for e in EXAMPLES if len(e.full_ids(TOKENIZER)) == LONGEST]
    assert check_tokens(EXAMPLES, TOKENIZER, LONGEST - 1) == len(cut) > 0


def test_all_rows_without_an_answer_within_max_length_are_reported():
    long = [Example(f"long{i}", "x" * 60, "y") for i in range(2)]
    assert check_tokens((long[0], *EXAMPLES), TOKENIZER, 61) >= 1
    with pytest.raises(DataError, match="2 of 3 rows") as caught:
        check_tokens((*long, Example("short", "x", "y")), TOKENIZER, 60)
    assert "id long0: its prompt of 60 tokens fills max_length=60" in str(caught.value)
    assert "id long1" in str(caught.value)


def test_a_prompt_that_fills_max_length_is_cut_if_the_loss_counts_prompts():
    rows = (Example("long", "x" * 60, "y"), Example("short", "x", "y"))
    assert check_tokens(rows, TOKENIZER, 60, with_prompt=True) == 1


def test_a_prompt_that_the_answer_would_change_is_refused():
    merging = tiny_tokenizer()
    merging.add_tokens(["=4"])
    with pytest.raises(DataError, match="id 1: the prompt ends in other tokens if the answer"):
        check_tokens((Example("1", "2+2=", "4"), Example("2", "2+2=", " 4")), merging, 60)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (DataError("no rows"), "DataError"),
        (MemoryError(), "OutOfMemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "OutOfMemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "OutOfMemoryError"),
        (RuntimeError("size mismatch"), "TrainingError"),
    ],
)
def test_an_error_is_sent_by_its_class_name(error, name):
    failure = worker._failure(error)
    assert isinstance(failure, Failed)
    assert failure.error == name
    assert (str(error) or "MemoryError") in failure.message


def test_one_process_at_a_time_locks_a_work_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_LOCK_WAIT_S", 0.1)
    with worker.exclusive_work_dir(tmp_path, held=True):
        with (
            pytest.raises(TrainingError, match="another training process"),
            worker.exclusive_work_dir(tmp_path, held=True),
        ):
            pass
        with worker.exclusive_work_dir(tmp_path, held=False):
            pass
    with worker.exclusive_work_dir(tmp_path, held=True):
        pass


def test_the_lock_waits_for_a_process_that_is_ending(tmp_path):
    file = (tmp_path / "lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    threading.Timer(0.3, file.close).start()
    started_s = time.monotonic()
    with worker.exclusive_work_dir(tmp_path, held=True):
        assert time.monotonic() - started_s >= 0.3
