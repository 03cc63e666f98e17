"""The loss and the targets of distillation, against restatements over the whole vocabulary."""

from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.conftest import recipe
from trans_peft.models import load_base
from trans_peft.training.distillation import DistillationTrainer, TeacherTargets, amplified
from trans_peft.training.finetune import finetune
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.transfer.load_adapter import attached
from trans_peft.validation.decoding.generation import generate
from trans_peft.validation.decoding.next_tokens import NextTokens, divergences

PROMPTS = [list(range(40, 40 + n)) for n in (3, 9, 4, 9, 17, 2)]


def peft_model(seed=0):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=64)
    model = get_peft_model(tiny_model(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def teacher():
    return peft_model()


def targets_of(model, **options):
    answers = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=5, top=64, **options)
    return TeacherTargets.of(PROMPTS, answers)


@pytest.fixture(scope="module")
def targets(teacher):
    return targets_of(teacher)


def whole_log_p(model, targets):
    """Each answer's log-probabilities over the vocabulary, one row at a time."""
    model.eval()
    found = []
    for prompt, answer in zip(targets.prompts, targets.answers, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        found.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return found


def restated_kl(model, targets):
    """The mean divergence per answer token, from the probabilities of merged outcomes."""
    total = torch.zeros(())
    for teacher, whole in zip(targets.next_tokens, whole_log_p(model, targets), strict=True):
        p, q = teacher.log_p.double().exp(), whole.gather(-1, teacher.tokens).double().exp()
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        total = total + (p * (p / q).log()).sum()
    return total / sum(map(len, targets.answers))


@pytest.mark.parametrize("drafts", [None, [[99] * 4] * 6], ids=["none", "wrong ones"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_targets_are_the_likeliest_tokens_of_the_greedy_answers(teacher, drafts, batch_size):
    targets = targets_of(teacher, drafts=drafts, batch_size=batch_size)
    for answer, found, whole in zip(
        targets.answers, targets.next_tokens, whole_log_p(teacher, targets), strict=True
    ):
        assert found.tokens.shape == (len(answer), 64)
        assert found.tokens[:, 0].tolist() == answer
        likeliest = whole.topk(64).values
        torch.testing.assert_close(found.log_p, likeliest, rtol=1e-4, atol=1e-5)
        rest = (1 - likeliest.exp().sum(-1)).log()
        torch.testing.assert_close(found.rest, rest, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_is_certain_gives_finite_gradients():
    logits = torch.randn(2, 3, requires_grad=True)
    tokens = torch.tensor([[1, 2, 0]] * 2)
    certain = NextTokens(
        tokens, torch.tensor([[0.0, -40.0, -50.0]] * 2), torch.tensor([-torch.inf] * 2)
    )
    divergences(certain, NextTokens.of(logits, tokens)).sum().backward()
    cross_entropy = torch.nn.functional.cross_entropy(logits, tokens[:, 0], reduction="sum")
    (expected,) = torch.autograd.grad(cross_entropy, logits)
    torch.testing.assert_close(logits.grad, expected)


def test_the_divergence_of_a_model(teacher, targets):
    assert targets.divergence(teacher) == pytest.approx(0, abs=1e-6)
    other = peft_model(seed=5)
    assert targets.divergence(other) == pytest.approx(restated_kl(other, targets).item(), rel=1e-4)


def test_targets_are_stored_exactly(targets, tmp_path):
    read = TeacherTargets.read(targets.write(tmp_path / "new" / "targets.safetensors"))
    assert (read.prompts, read.answers) == (targets.prompts, targets.answers)
    for found, expected in zip(read.next_tokens, targets.next_tokens, strict=True):
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(found, name), tensor)
    assert [len(prompt) for prompt in read.at_most(13).prompts] == [3, 4, 2]
    assert read.select([4, 0]).answers == [targets.answers[4], targets.answers[0]]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_and_its_gradients(targets, tmp_path, batch_size):
    student = peft_model(seed=5)
    trainer = DistillationTrainer(
        targets,
        model=student,
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            completion_only_loss=True,
        ),
        train_dataset=Dataset.from_list(targets.training_rows()),
        processing_class=tiny_tokenizer(),
    )
    order = [5, 2, 4, 1, 0, 3]
    trainer.train_dataset = trainer.train_dataset.select(order)
    trainer.args.train_sampling_strategy = "sequential"
    items = sum(map(len, targets.answers))
    parameters = [p for p in student.parameters() if p.requires_grad]
    student.eval()
    batches = list(trainer.get_train_dataloader())
    loss = sum(
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        for batch in batches
    )
    assert len(batches) == -(-6 // batch_size)
    expected = restated_kl(student, targets)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip


def test_an_amplified_change_moves_the_new_base_as_the_adapter_moved_the_old_one(targets):
    old, new, adapter = tiny_model(), tiny_model(seed=9), peft_model()
    before, after, taught = (whole_log_p(model, targets) for model in (old, new, adapter))
    # With all tokens, so that no outcomes are merged.
    parts = [NextTokens.of(log_p.detach(), 258) for log_p in taught]
    everything = TeacherTargets(targets.prompts, targets.answers, parts)
    found = amplified(everything, everything.along(old), everything.along(new), beta=0.7)
    for part, *log_p in zip(found.next_tokens, before, after, taught, strict=True):
        old_log_p, new_log_p, teacher = (p.gather(-1, part.tokens) for p in log_p)
        expected = (new_log_p + 0.7 * (teacher - old_log_p)).log_softmax(-1)
        torch.testing.assert_close(part.log_p, expected, rtol=1e-3, atol=1e-3)


def test_without_an_update_an_amplified_change_is_the_teacher(targets):
    base = targets.along(tiny_model())
    found = amplified(targets, base, base, beta=1.0)
    for part, expected in zip(found.next_tokens, targets.next_tokens, strict=True):
        for name, tensor in vars(expected).items():
            torch.testing.assert_close(getattr(part, name), tensor, rtol=1e-4, atol=1e-4)


def test_training_reduces_the_divergence_from_the_start_weights(tmp_path, tiny_base, data_file):
    base = load_base(tiny_base, "float32")
    spec = recipe(steps=30, learning_rate=2e-2).spec
    from trans_peft.methods.specs import attach

    torch.manual_seed(1)
    start, taught = tmp_path / "start", tmp_path / "taught"
    model = attach(tiny_model(), spec)
    model.save_pretrained(start)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(taught)
    with attached(base.model, taught) as teacher:
        targets = targets_of(teacher)
    with attached(base.model, start) as student:
        before = targets.divergence(student)
    job = TrainingJob(
        recipe(steps=30, learning_rate=2e-2, masking_p=0.1),
        tiny_base, "s3://bases/tiny/v1", "f00d",
        data_file, tmp_path / "work", start=start,
        targets=targets.write(tmp_path / "targets.safetensors"),
    )  # fmt: skip
    job.check()
    finetune(job, PartialState(cpu=True), lambda event: None)
    result = TrainingResult.read(job.result_file)
    # The training attached its adapter to the model that this process holds.
    with attached(load_base(tiny_base, "float32").model, result.folder) as student:
        after = targets.divergence(student)
    assert before > 1e-3
    assert after < 0.8 * before
    assert job.identity() != replace(job, targets=None).identity()
