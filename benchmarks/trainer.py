"""Compares this project's trainer with TRL's and transformers': whole runs over the same rows.

`ours` is what `finetune` builds: TRL's preparation, logits only at labeled positions, rows of
similar length in one step, an event after each step. `trl` is a stock `SFTTrainer`. `hf` is a stock
`Trainer` with transformers' padding collator, on rows whose prompts are masked. All three train the
same LoRA on the same Llama of SmolLM2's size without perturbation, in fp32, with every row once per
run. The ratio is of the time per token, without padding. Activation checkpointing (TRL's default)
and saving are off for all, because they would favor `ours`.

    python benchmarks/trainer.py [--pairs 7] [--clock wall|process] [--rows 64] [--only NAME ...]
"""

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from perturbation import smollm2
from ratios import (
    Clock,
    keep_freed_memory,
    machine,
    middle,
    paired,
    parser,
    prepare,
    record,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from trans_peft.data import Example
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import Suite
from trans_peft.domain.recipe import OptimizerSettings, TrainingRecipe
from trans_peft.training.arguments import training_arguments
from trans_peft.training.finetune import _fix_order
from trans_peft.training.job import TrainingJob
from trans_peft.training.trainer import AnswerTrainer, EventCallback

BATCH, MAX_LENGTH, LAYERS = 8, 512, 30
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}
WORDS = [f"w{i}" for i in range(1000)]


def rows(count: int) -> tuple[Example, ...]:
    """Prompts of about 40 tokens and answers of about 15, with long tails as real ones have."""
    draw = random.Random(0)

    def text(median: float, spread: float, most: int) -> str:
        words = int(draw.lognormvariate(0, spread) * median)
        return " ".join(draw.choices(WORDS, k=min(max(words, 1), most)))

    return tuple(
        Example(str(i), text(40, 0.6, 300), " " + text(15, 0.9, 150)) for i in range(count)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)


class Stopwatch(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock, self.started, self.seconds = clock, 0.0, 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.started = self.clock()

    def on_train_end(self, *_: object, **__: object) -> None:
        self.seconds = self.clock() - self.started


class Arm:
    """One trainer that runs over all rows repeatedly, with counts of tokens and padding."""

    def __init__(self, trainer: Trainer, tokens: int, clock: Clock) -> None:
        self.trainer, self.tokens = trainer, tokens
        self.stopwatch = Stopwatch(clock)
        self.seconds: list[float] = []
        self.padded = 0
        self.collate = trainer.data_collator
        trainer.data_collator = self.counted
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.stopwatch)

    def counted(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(features)
        self.padded += batch["input_ids"].numel()
        return batch

    def run(self) -> float:
        """Train on every row once; return the seconds per token (without padding)."""
        self.padded = 0
        self.trainer.train()
        self.seconds.append(self.stopwatch.seconds)
        return self.stopwatch.seconds / self.tokens

    def speed(self) -> str:
        seconds = statistics.median(self.seconds[1:])
        return (
            f"{self.tokens / seconds:,.0f} tokens/s, {self.padded / seconds:,.0f} with padding "
            f"({self.padded / self.tokens - 1:.0%} of it)"
        )


def ours(job: TrainingJob, examples: tuple[Example, ...], layers: int, clock: Clock) -> Arm:
    """The trainer as `finetune` builds and runs it, without a perturbation."""
    arguments = training_arguments(job)
    arguments.save_strategy = "no"
    trainer = AnswerTrainer(
        model=smollm2(layers),
        args=arguments,
        train_dataset=dataset(examples),
        processing_class=tokenizer(),
    )
    tokens_per_step = _fix_order(trainer, job, 1)
    trainer.add_callback(EventCallback(lambda message: None, tokens_per_step))
    return Arm(trainer, sum(tokens_per_step), clock)


def stock(job: TrainingJob) -> dict[str, Any]:
    """The settings that must be equal for the work to be equal."""
    optimizer = job.recipe.optimizer
    return {
        "output_dir": str(job.checkpoint_folder),
        "max_steps": optimizer.steps,
        "per_device_train_batch_size": optimizer.batch_size,
        "learning_rate": optimizer.learning_rate,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def plain_trl(job: TrainingJob, examples: tuple[Example, ...], layers: int, clock: Clock) -> Arm:
    arguments = SFTConfig(**stock(job), max_length=MAX_LENGTH, completion_only_loss=True)
    trainer = SFTTrainer(
        model=smollm2(layers),
        args=arguments,
        train_dataset=dataset(examples),
        processing_class=tokenizer(),
    )
    return Arm(trainer, sum(map(len, trainer.train_dataset["input_ids"])), clock)


def plain_hf(job: TrainingJob, examples: tuple[Example, ...], layers: int, clock: Clock) -> Arm:
    words = tokenizer()
    prepared = []
    for example in examples:
        ids, prompt = example.full_ids(words), example.prompt_ids(words)
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        prepared.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    trainer = Trainer(
        model=smollm2(layers),
        args=TrainingArguments(**stock(job)),
        train_dataset=Dataset.from_list(prepared),
        data_collator=DataCollatorForSeq2Seq(words),
    )
    return Arm(trainer, sum(len(row["input_ids"]) for row in prepared), clock)


def dataset(examples: tuple[Example, ...]) -> Dataset:
    return Dataset.from_list([example.trl_row() for example in examples])


BASELINES: dict[str, Callable[..., Arm]] = {
    "trainer.ours_vs_trl": plain_trl,
    "trainer.ours_vs_hf": plain_hf,
}


def main() -> None:
    options_of = parser(__doc__, pairs=7)
    options_of.add_argument("--rows", type=int, default=64)
    options_of.add_argument("--layers", type=int, default=LAYERS, help="others are not recorded")
    options_of.add_argument("--only", nargs="*", choices=BASELINES, default=list(BASELINES))
    options = options_of.parse_args()
    clock = prepare(options)
    keep_freed_memory()
    disable_progress_bars()
    examples, source = rows(options.rows), DataSource("rows")
    recipe = TrainingRecipe(
        adapter="benchmark",
        family="smollm2",
        data=source,
        suites=(Suite("rows", source),),
        optimizer=OptimizerSettings(
            steps=options.rows // BATCH, batch_size=BATCH, max_length=MAX_LENGTH
        ),
    )
    facts = machine(
        options,
        f"SmolLM2 of {options.layers} layers, fp32, LoRA r 16 on q,k,v,o, {options.rows} rows in "
        f"batches of {BATCH}",
    )
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(recipe, Path(), "", "", Path(), Path(folder))
        us = ours(job, examples, options.layers, clock)
        for name in options.only:
            them = BASELINES[name](job, examples, options.layers, clock)
            assert us.tokens == them.tokens
            us.seconds.clear()
            entry = middle(paired(us.run, them.run, options.pairs))
            print(f"ours: {us.speed()}\n{name.rpartition('_')[2]}: {them.speed()}", flush=True)
            if options.layers == LAYERS:
                record(name, entry, facts)
            else:
                print(f"{name}: {entry}, not recorded")


if __name__ == "__main__":
    main()
