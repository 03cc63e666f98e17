import pytest

from trans_peft.training.events import (
    CheckpointSaved,
    Failed,
    Finished,
    LogLine,
    ProcessStarted,
    TrainingMetrics,
    TrainingStarted,
    decode,
    encode,
)

MESSAGES = [
    TrainingStarted(0, 8, 100, "cpu", 1, 3.2),
    TrainingMetrics(3, 8, 1.5, 1e-3, 0.1, 100.0, 5.0),
    CheckpointSaved(3),
    ProcessStarted(17),
    Failed("DataError", "line 1\nline 2"),
    Finished(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_is_one_line_that_reads_back(message):
    line = encode(message)
    assert "\n" not in line
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    ["", "hello", "3", "null", "[]", '{"loss": 1}', '{"event": "Nope"}', '{"event": "Progress"}'],
)
def test_any_other_line_is_log(line):
    assert decode(line) == LogLine(line)


def test_the_start_states_steps_and_epochs():
    assert str(TrainingStarted(0, 8, 1000, "cpu", 2, 3.2)) == (
        "training starts: 8 steps (3.2 epochs), 1,000 trainable parameters, 2 process(es) on cpu"
    )


def test_metrics_have_a_text_and_names():
    progress = TrainingMetrics(3, 8, 1.5, 1e-3, 0.1, 1234.5, 5.0)
    assert progress.summary == "loss 1.5000  lr 1.00e-03  1,234 tokens/s  5 s left"
    assert str(progress) == f"step 3/8  {progress.summary}"
    assert progress.metrics == {
        "loss": 1.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.1,
        "tokens_per_s": 1234.5,
    }
