"""The loss against plain restatements of it, and the callback's promises."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.training.conftest import EXAMPLES
from trans_peft.data import ChatMessage, Example
from trans_peft.errors import TrainingError
from trans_peft.training.events import CheckpointSaved, TrainingMetrics
from trans_peft.training.job_rows import token_rows
from trans_peft.training.trainer import AnswerTrainer, EventCallback, last_checkpoint

CHATS = tuple(
    Example(
        e.id,
        "",
        e.completion,
        (ChatMessage("user", e.prompt), ChatMessage("assistant", e.completion)),
    )
    for e in EXAMPLES[:6]
)


def trainer(folder, examples=EXAMPLES[:6], tokenizer=None, rows=None, **settings):
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        completion_only_loss=True,
        max_length=512,
        **settings,
    )
    return AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows or [example.trl_row() for example in examples]),
        processing_class=tokenizer or tiny_tokenizer(),
    )


def restated(model: torch.nn.Module, examples: tuple[Example, ...]) -> torch.Tensor:
    """Mean negative log-likelihood of the answers, one row at a time: no padding, no mask."""
    tokenizer = tiny_tokenizer()
    total, tokens = torch.zeros(()), 0
    for example in examples:
        prompt, whole = example.prompt_ids(tokenizer), example.full_ids(tokenizer)
        ids = torch.tensor([whole])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total = total + cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        tokens += len(whole) - len(prompt)
    return total / tokens


def loss_and_gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("examples", [EXAMPLES[:6], CHATS], ids=["plain", "chat"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_loss_covers_the_answers_only(tmp_path, examples, packing):
    ours = trainer(tmp_path, examples, packing=packing)
    batch = ours.data_collator([dict(row) for row in ours.train_dataset])
    items = (batch["labels"] != -100).sum()
    assert packing == (batch["input_ids"].shape[0] == 1)
    model = ours.model.train()
    loss = ours.compute_loss(model, dict(batch), num_items_in_batch=items)
    expected = restated(model, examples)
    torch.testing.assert_close(
        loss_and_gradients(loss, model), loss_and_gradients(expected, model), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_attend_to_each_other(tmp_path, attention):
    ours = trainer(tmp_path, packing=True)
    ours.model.get_base_model().set_attn_implementation(attention)
    batch = ours.data_collator([dict(row) for row in ours.train_dataset])
    assert batch["input_ids"].shape[0] == 1
    loss = ours.compute_loss(ours.model.train(), dict(batch))
    torch.testing.assert_close(loss, restated(ours.model, EXAMPLES[:6]), rtol=1e-4, atol=1e-6)


def test_the_loss_equals_trls(tmp_path):
    ours = trainer(tmp_path)
    batch = ours.data_collator([dict(row) for row in ours.train_dataset])
    model = ours.model.train()
    torch.testing.assert_close(
        loss_and_gradients(ours.compute_loss(model, dict(batch)), model),
        loss_and_gradients(SFTTrainer.compute_loss(ours, model, dict(batch)), model),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_output_embedding_gets_only_positions_with_labels(tmp_path):
    ours = trainer(tmp_path)
    batch = ours.data_collator([dict(row) for row in ours.train_dataset])
    seen = []
    ours.model.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[2].shape))
    labels = int((batch["labels"] != -100).sum())
    ours.compute_loss(ours.model, dict(batch))
    assert seen == [(labels, 258)]
    ours.model(input_ids=batch["input_ids"])
    assert seen[1] == (*batch["input_ids"].shape, 258)


def test_training_and_evaluation_use_the_same_prompts(tmp_path):
    tokenizer = tiny_tokenizer()
    for examples in (EXAMPLES[:6], CHATS):
        prepared = trainer(tmp_path, examples).train_dataset
        for example, ids, labels in zip(
            examples, prepared["input_ids"], prepared["labels"], strict=True
        ):
            prompt = example.prompt_ids(tokenizer)
            assert ids == example.full_ids(tokenizer)
            assert labels == [-100] * len(prompt) + ids[len(prompt) :]


ODD = "{% for m in messages %}{{ '<last>' if loop.last }}{{ m.content }}{% endfor %}!"


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ODD], ids=["plain", "prompt is no prefix"])
@pytest.mark.parametrize("examples", [EXAMPLES[:6], CHATS], ids=["text", "chat"])
def test_token_rows_equal_those_of_trl(tmp_path, examples, template, packing):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    theirs = trainer(tmp_path, examples, tokenizer, packing=packing).train_dataset
    rows = token_rows(examples, tokenizer)
    ours = trainer(tmp_path, examples, tokenizer, rows=rows, packing=packing).train_dataset
    for column in ("input_ids", "labels"):
        assert ours[column] == theirs[column]


def test_the_end_token_is_trained_even_if_it_is_the_padding_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ours = trainer(tmp_path, tokenizer=tokenizer)
    labels = ours.data_collator([dict(row) for row in ours.train_dataset])["labels"]
    assert (labels == tokenizer.eos_token_id).sum(dim=1).tolist() == [1] * len(labels)
    assert (labels[:, -1] == -100).any(), "some rows are padded"


def state(step: int, max_steps: int = 8) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=True)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(loss):
    callback = EventCallback([].append, [10] * 8)
    with pytest.raises(TrainingError, match="at step 3"):
        callback.on_log(SimpleNamespace(), state(3), TrainerControl(), {"loss": loss})


def test_metrics_count_from_the_step_at_which_training_resumed():
    sent: list[TrainingMetrics] = []
    callback = EventCallback(sent.append, [10, 20, 30, 40, 50, 60, 70, 80])
    callback.on_train_begin(SimpleNamespace(), state(2), TrainerControl())
    logs = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0}
    callback.on_log(SimpleNamespace(), state(4), TrainerControl(), logs)
    callback.on_log(SimpleNamespace(), state(4), TrainerControl(), {"train_runtime": 1.0})
    (progress,) = sent
    assert (progress.step, progress.total_steps, progress.loss) == (4, 8, 1.0)
    # 70 tokens and 2 steps in the same seconds, 4 steps to come
    assert progress.tokens_per_s * progress.eta_s == pytest.approx(70 * 4 / 2)


def test_the_remaining_time_is_shown_after_a_tenth_of_the_steps():
    sent: list[TrainingMetrics] = []
    callback = EventCallback(sent.append, [10] * 20)
    callback.on_train_begin(SimpleNamespace(), state(0, 20), TrainerControl())
    for step in (1, 2, 20):
        logs = {"loss": 1.0, "learning_rate": 0.1}
        callback.on_log(SimpleNamespace(), state(step, 20), TrainerControl(), logs)
    assert ["s left" in str(metrics) for metrics in sent] == [False, True, True]
    assert sent[2].eta_s == 0


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    assert last_checkpoint(tmp_path) is None
    sent = []
    callback = EventCallback(sent.append, [])
    for step in (3, 6, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (3, 6):
        callback.on_save(SimpleNamespace(output_dir=tmp_path), state(step), TrainerControl())
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert sent == [CheckpointSaved(3), CheckpointSaved(6)]
