"""Direct Preference Optimization: against TRL's own trainer, and with masks against equations."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.tiny import tiny_tokenizer
from tests.training.conftest import recipe
from tests.training.short_runs import result
from trans_peft.data import ChatMessage, Example, write_examples
from trans_peft.domain.compute import ComputeSettings
from trans_peft.methods.specs import attach, to_config
from trans_peft.perturbation import perturbed
from trans_peft.training import finetune as finetune_module
from trans_peft.training.batches import training_order
from trans_peft.training.events import CheckpointSaved, TrainingMetrics
from trans_peft.training.finetune import _fix_order, _trainer, finetune
from trans_peft.training.job import TrainingResult
from trans_peft.training.job_rows import read_job_rows, token_count

PLAIN = ComputeSettings()
TEXTS = tuple(
    Example(str(i), f"What is {i} plus {i}? ", f"It is {2 * i}.", rejected="None. " * (1 + i % 3))
    for i in range(12)
)
CHATS = tuple(
    replace(
        example,
        prompt="",
        messages=(
            ChatMessage("user", example.prompt),
            ChatMessage("assistant", example.completion),
        ),
    )
    for example in TEXTS
)


@pytest.fixture(autouse=True)
def _without_the_check(monkeypatch):
    monkeypatch.setattr(finetune_module, "check_adapter_is_trainable", lambda *_: None)


@pytest.fixture
def job(make_job, tmp_path):
    def make(name, examples=TEXTS, *, compute=PLAIN, beta=0.1, **fields):
        settings = replace(
            recipe(**{"steps": 3, "warmup_steps": 1} | fields),
            objective="dpo",
            dpo_beta=beta,
            compute=compute,
        )
        data = write_examples(examples, tmp_path / f"{name}.jsonl")
        return replace(make_job(tmp_path / name, settings), data_file=data)

    return make


def ours(job):
    job.check()
    rows = read_job_rows(job, tiny_tokenizer(), None)
    trainer = _trainer(job, rows, "cpu")
    _fix_order(trainer, job, 1)
    with perturbed(trainer.model.train(), job.recipe.perturbation, seed=job.recipe.seed):
        return result(trainer)


def theirs(job, base, examples, **arguments):
    """TRL's trainer on texts and messages, which it tokenizes itself."""
    settings = job.recipe
    set_seed(settings.seed)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    rows = read_job_rows(job, tiny_tokenizer(), None).training
    order = training_order([*map(token_count, rows)], 2, 3, settings.seed)
    config = DPOConfig(
        output_dir=str(job.work_dir),
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        per_device_train_batch_size=2,
        beta=settings.dpo_beta,
        max_length=512,
        **{"gradient_checkpointing": False} | arguments,
        train_sampling_strategy="sequential",
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=loaded,
        args=config,
        train_dataset=Dataset.from_list([examples[row].trl_row() for row in order]),
        processing_class=tiny_tokenizer(),
        peft_config=to_config(settings.spec),
    )
    return result(trainer)


@pytest.mark.parametrize(
    ("examples", "compute", "beta"),
    [
        (TEXTS, PLAIN, 0.1),
        (CHATS, ComputeSettings(gradient_checkpointing=True), 0.5),
    ],
    ids=["texts", "chats, checkpointing"],
)
def test_preferences_train_as_in_trl(job, tiny_base, examples, compute, beta):
    made = job("ours", examples, compute=compute, beta=beta)
    found = ours(made)
    reference = theirs(
        made, tiny_base, examples, gradient_checkpointing=compute.gradient_checkpointing
    )
    assert found[0][0] == pytest.approx(math.log(2)), "a new adapter prefers neither answer"
    assert found[0][2] < math.log(2) - 0.005
    torch.testing.assert_close(found, reference, rtol=2e-4, atol=2e-5)


def log_likelihood(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    log_p = model(ids).logits[0, :-1].log_softmax(-1)
    return log_p[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum()


@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(False, marks=pytest.mark.slow, id="kept"),
        pytest.param(True, id="checkpointing"),
    ],
)  # 4 seconds each
def test_masks_are_drawn_for_the_policy_and_are_the_same_for_both_answers(
    job, tiny_base, checkpointing
):
    """The reference is a plain loop over single answers: nothing of TRL, and no padding."""
    compute = ComputeSettings(gradient_checkpointing=checkpointing)
    made = job(
        "ours", masking_p=0.3, dropping_p=0.3, compute=compute, gradient_accumulation=2, steps=3
    )
    losses, weights = ours(made)
    settings = made.recipe
    rows = read_job_rows(made, tiny_tokenizer(), None).training
    order = training_order([*map(token_count, rows)], 4, 3, settings.seed)
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    set_seed(settings.seed)
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_base), settings.spec).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    rates = [0.0, 1e-2, 5e-3]  # one step of warm-up, then a cosine over two steps
    expected = []
    with perturbed(model, settings.perturbation, seed=settings.seed) as handle:
        counter = handle._step_counter
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            total = 0.0
            for micro in range(2):
                for number in order[4 * step + 2 * micro : 4 * step + 2 * micro + 2]:
                    row, margin = rows[number], 0.0
                    for sign, answer in ((1, row["chosen_ids"]), (-1, row["rejected_ids"])):
                        counter._passes = micro
                        policy = log_likelihood(model, row["prompt_ids"], answer)
                        with torch.no_grad():
                            reference = log_likelihood(base, row["prompt_ids"], answer)
                        margin = margin + sign * (policy - reference)
                    total = total - torch.nn.functional.logsigmoid(0.1 * margin) / 4
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            expected.append(total.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weights[name], weight.detach(), rtol=1e-3, atol=1e-5)


def trained(job, send=lambda message: None):
    job.check()
    finetune(job, PartialState(cpu=True), send)
    return TrainingResult.read(job.result_file)


def test_a_run_resumes_to_the_same_weights(job):
    """Masks, dropout and the order of rows are those of the uninterrupted run."""
    made = job("run", masking_p=0.2, dropping_p=0.2, dropout=0.1, steps=4, checkpoint_steps=2)
    losses: dict[str, list[float]] = {"first": [], "again": []}

    def keep(message):
        if message == CheckpointSaved(2):
            shutil.copytree(made.checkpoint_folder, made.work_dir / "kept")
        if isinstance(message, TrainingMetrics):
            losses["first"].append(message.loss)

    first = trained(made, keep)
    (made.work_dir / "kept").rename(made.checkpoint_folder)
    made.result_file.unlink()
    again = trained(
        made,
        lambda m: losses["again"].append(m.loss) if isinstance(m, TrainingMetrics) else None,
    )
    assert again.weights_sha256 == first.weights_sha256
    assert losses["again"] == losses["first"][2:]
    started = replace(made, start=first.folder, work_dir=made.work_dir / "next")
    next_losses = []
    trained(
        started,
        lambda m: next_losses.append(m.loss) if isinstance(m, TrainingMetrics) else None,
    )
    assert next_losses[0] != pytest.approx(math.log(2), abs=1e-4), (
        "the reference is the base, not the adapter at the start"
    )


def test_dropout_of_the_adapter_is_not_switched_off(job):
    assert ours(job("with", dropout=0.5))[0][2] != ours(job("without"))[0][2]
