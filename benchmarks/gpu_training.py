"""The trainers that `benchmarks.gpu` compares, and the work of a training step in FLOP."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu_shapes import Shape, texts
from trans_peft.data import Example
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.compute import ComputeSettings
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, Perturbation, TrainingRecipe
from trans_peft.methods.specs import to_config
from trans_peft.models import load_tokenizer
from trans_peft.perturbation import perturbed
from trans_peft.training.finetune import _fix_order, _trainer
from trans_peft.training.job import TrainingJob
from trans_peft.training.job_rows import JobRows, token_rows
from trans_peft.training.trainer import EventCallback

PERTURBATION = Perturbation(masking_p=0.2, dropping_p=0.2)
ATTENTION: Final = "sdpa"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def clock() -> float:
    """Return the time in seconds at which the GPU has completed its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch(TrainerCallback):
    """Measures the training loop of a run, without the trainer's preparation."""

    started = seconds = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.started = clock()

    def on_train_end(self, *_: object, **__: object) -> None:
        self.seconds = clock() - self.started


class Arm:
    """A trainer whose run uses every packed sequence once."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.stopwatch = trainer, Stopwatch()
        rows = trainer.train_dataset
        self.tokens = sum(map(len, rows["input_ids"]))
        self.answer_tokens = sum(label != -100 for row in labels(rows) for label in row)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.stopwatch)

    def run(self, perturbation: Perturbation | None = None) -> float:
        """Train; return the seconds per token."""
        model = self.trainer.model.train()
        with perturbed(model, perturbation, seed=0) if perturbation else nullcontext():
            self.trainer.train()
        return self.stopwatch.seconds / self.tokens


def labels(rows: Dataset) -> list[list[int]]:
    """Return the labels of packed rows; -100 for tokens of prompts."""
    if "labels" in rows.column_names:
        return rows["labels"]
    return [
        [i if answer else -100 for i, answer in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)
    ]


def job_and_rows(shape: Shape, base: Path, work: Path) -> tuple[TrainingJob, JobRows]:
    """Return the training of a shape: rows of about a seventh of a sequence, a third the answer."""
    longest = shape.sequence // 8
    count = 12 * shape.steps * shape.batch
    prompts = texts(count, longest // 2, longest - 1, seed=0)
    answers = texts(count, longest // 4, longest // 2, seed=1)
    examples = tuple(
        Example(str(i), prompt, " " + answer)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    )
    rows = token_rows(examples, load_tokenizer(base))
    source = DataSource("rows.jsonl")
    recipe = TrainingRecipe(
        adapter="benchmark",
        family="benchmark",
        data=source,
        suites=(Suite("rows", source),),
        spec=AdapterSpec("LORA", LORA),
        optimizer=OptimizerSettings(
            steps=shape.steps, batch_size=shape.batch, max_length=shape.sequence
        ),
        compute=ComputeSettings(attention=ATTENTION),
        packing=True,
        dtype=shape.dtype,
    )
    job = TrainingJob(recipe, base, "benchmark", "", work / "rows.jsonl", work)
    return job, JobRows(rows, (), len(rows), [])


def only_whole_steps(trainer: Trainer, shape: Shape) -> None:
    """Keep as many packed sequences as the steps of a run use."""
    needed = shape.steps * shape.batch
    assert len(trainer.train_dataset) >= needed, "too few rows"
    trainer.train_dataset = trainer.train_dataset.select(range(needed))


def ours(shape: Shape, base: Path, work: Path) -> Arm:
    """Return the trainer as `finetune` builds it."""
    work.mkdir()
    job, rows = job_and_rows(shape, base, work)
    trainer = _trainer(job, rows, "cuda" if torch.cuda.is_available() else "cpu")
    trainer.args.save_strategy = "no"
    only_whole_steps(trainer, shape)
    trainer.add_callback(EventCallback(lambda message: None, _fix_order(trainer, job, 1)))
    return Arm(trainer)


def stock_trl(shape: Shape, base: Path, work: Path) -> Arm:
    """Return a stock `SFTTrainer` with the same rows, packing, attention, adapter and optimizer.

    Its precision on a GPU is TRL's default, autocast to bfloat16.
    """
    job, rows = job_and_rows(shape, base, work)
    optimizer = job.recipe.optimizer
    arguments = SFTConfig(
        output_dir=str(work),
        max_steps=optimizer.steps,
        per_device_train_batch_size=optimizer.batch_size,
        learning_rate=optimizer.learning_rate,
        max_length=optimizer.max_length,
        packing=True,
        completion_only_loss=True,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, shape.dtype), attn_implementation=ATTENTION
        ),
        args=arguments,
        train_dataset=Dataset.from_list(rows.training),
        processing_class=load_tokenizer(base),
        peft_config=to_config(job.recipe.spec),
    )
    only_whole_steps(trainer, shape)
    return Arm(trainer)


def linear_flop(model: nn.Module, tokens: int, answer_tokens: int) -> int:
    """Return the FLOP of the linear layers, forward and backward, for a number of tokens.

    A frozen weight has a product in the forward pass and one for the gradient of its inputs, a
    trained weight a third one. Logits are counted where there is a label. Attention and elementwise
    operations are not counted, so that the share of the peak is at least the one reported.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    flop = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            products = 3 if module.weight.requires_grad else 2
            rows = answer_tokens if module is head else tokens
            flop += 2 * products * module.weight.numel() * rows
    return flop


def matmul_peak(dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Return the highest measured FLOP/s of a square matrix product on the default device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b

    def once() -> float:
        started = clock()
        for _ in range(10):
            a @ b
        return clock() - started

    return 10 * 2 * size**3 / min(once() for _ in range(repeats))


Measure = Callable[[], float]


def mfu(arm: Arm, peak: float) -> Measure:
    """Return a function that trains and returns the share of the peak."""
    model: Any = arm.trainer.model
    flop = linear_flop(model, arm.tokens, arm.answer_tokens)
    return lambda: flop / (arm.run() * arm.tokens) / peak
