"""One adapter on one base: the work of a training process, from rows to stock PEFT files.

The order follows the method: the adapter is put on the base first, the perturbation is attached
after it, so that the adapter's branch feels what the base feels. Rows become token ids as in an
evaluation, TRL masks their prompts and packs them, and transformers runs the loop; what they would
draw while it runs is decided before, so that a resumed run ends in the weights of an unbroken one.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig

from trans_peft.data import Example, full_ids, parse_examples, prompt_ids, token_counts
from trans_peft.errors import AdapterError, DataError, listed, listed_lines
from trans_peft.methods.specs import attach
from trans_peft.models import adapter_weights_sha256, load_base, load_tokenizer
from trans_peft.perturbation import perturbed
from trans_peft.text.chat import template_of
from trans_peft.text.saved_template import check_template, saved_template, write_template
from trans_peft.training.batches import training_order
from trans_peft.training.events import EventMessage, TrainingStarted
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.rehearsal import rehearse, save_adapter
from trans_peft.training.trainer import AnswerTrainer, EventCallback, last_checkpoint
from trans_peft.transfer.peft_folder import WEIGHTS_NAME, read_peft_folder

__all__ = ["check_tokens", "finetune", "token_rows"]

_PROBLEMS_SHOWN = 20


def finetune(job: TrainingJob, state: PartialState, send: Callable[[EventMessage], None]) -> None:
    """Train the job's adapter on this process's device and save it with its result.

    Every process of the job calls it; the main one tells events, saves, and writes the result
    last. Raises DataError before a model is loaded.
    """
    recipe, steps = job.recipe, job.recipe.optimizer.steps
    read = parse_examples(job.data_file.read_bytes(), recipe.data.uri)
    # The places are those of the job's file, not of the user's.
    examples = tuple(replace(example, place="") for example in read)
    tokenizer = load_tokenizer(job.base_folder)
    template = _template(job, tokenizer)
    shortened_rows = check_tokens(examples, tokenizer, recipe.optimizer.max_length, template)
    trainer = _trainer(job, token_rows(examples, tokenizer, template), str(state.device))
    tokens_per_step = _fix_order(trainer, job, state.num_processes)
    model = trainer.model.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = last_checkpoint(job.checkpoint_folder)
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if state.is_main_process:
        send(TrainingStarted(first_step, steps, trainable, str(state.device), state.num_processes))
    trainer.remove_callback(PrinterCallback)  # it prints what Narrator tells
    trainer.add_callback(EventCallback(send, tokens_per_step))
    set_seed(recipe.seed, device_specific=True)  # dropout: its own draws in each process
    started_s = time.monotonic()
    with perturbed(
        model, recipe.perturbation, seed=recipe.seed, rank=state.process_index, step=first_step
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - started_s
    state.wait_for_everyone()
    if state.is_main_process:
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log][-10:]
        _save(model, job, template)
        TrainingResult(
            folder=job.adapter_folder,
            weights_sha256=adapter_weights_sha256(job.adapter_folder),
            steps=steps,
            final_loss=sum(losses) / len(losses),
            seconds=seconds,
            tokens_per_s=sum(tokens_per_step[first_step:]) / seconds,
            trainable_parameters=trainable,
            shortened_rows=shortened_rows,
        ).write(job.result_file)
        shutil.rmtree(job.checkpoint_folder, ignore_errors=True)


def check_tokens(
    examples: tuple[Example, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str | None = None,
) -> int:
    """Return how many rows are cut at `max_length`; DataError lists those that cannot be learned.

    Such are rows whose prompt alone fills `max_length`, and prompts whose last tokens become others
    once the answer follows: TRL would train on another prompt than an evaluation asks. In a chat
    the template decides on that, and is left to.
    """
    shortened, problems = 0, []
    counts = token_counts(examples, tokenizer, template)
    for example, (prompt, whole, starts) in zip(examples, counts, strict=True):
        shortened += whole > max_length
        if prompt >= max_length:
            problems.append(
                f"{example.location}: its prompt fills max_length={max_length}: {prompt} tokens"
            )
        elif example.messages is None and not starts:
            problems.append(
                f"{example.location}: with its answer the end of the prompt becomes other tokens"
            )
    if problems:
        raise DataError(
            f"{len(problems)} of {len(examples)} rows cannot be trained on\n    "
            + "\n    ".join(listed_lines(problems, _PROBLEMS_SHOWN)),
            do="raise optimizer.max_length or remove long rows; move white space from a prompt's "
            "end to its answer's start",
        )
    return shortened


def token_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> list[dict[str, list[int]]]:
    """Return the examples in TRL's format of token ids, the answers marked for the loss.

    TRL would give the same rows of the texts, but it would render chats itself, where no limits
    hold and the date is today's. In a chat the answer starts where prompt and whole part.
    """
    rows = []
    prompts = prompt_ids(examples, tokenizer, template)
    for prompt, whole in zip(prompts, full_ids(examples, tokenizer, template), strict=True):
        pairs = zip(prompt, whole, strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
        mask = [0] * start + [1] * (len(whole) - start)
        rows.append({"input_ids": whole, "completion_mask": mask})
    return rows


def _template(job: TrainingJob, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template to train with: that of the adapter to go on from, or the base's."""
    template = saved_template(job.start) if job.start is not None else None
    if template is not None:
        check_template(template, f"the chat template of {job.start}")
    elif (template := template_of(tokenizer)) is not None:
        check_template(template, f"the chat template of {job.base_name}")
    return template


def _trainer(job: TrainingJob, rows: list[dict[str, list[int]]], device: str) -> AnswerTrainer:
    base = load_base(job.base_folder, job.recipe.dtype, device)
    rehearse(base, job.recipe.spec, job.work_dir)
    set_seed(job.recipe.seed)  # the adapter's initial weights
    model = attach(base.model, job.recipe.spec)
    if job.start is not None:
        _go_on_from(job.start, model)
    trainable = [(p, p.dtype) for p in model.parameters() if p.requires_grad]
    trainer = AnswerTrainer(
        model=model,
        args=_arguments(job),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )
    for parameter, dtype in trainable:  # TRL makes them bfloat16 on nf4: small updates would vanish
        parameter.data = parameter.data.to(dtype)
    return trainer


def _go_on_from(folder: Path, model: PeftModel) -> None:
    """Give the adapter the weights in a PEFT folder. AdapterError unless they are its very own."""
    tensors = load_file(read_peft_folder(folder).path / WEIGHTS_NAME)
    wanted = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
    unlike = sorted(
        key
        for key in wanted.keys() | tensors.keys()
        if key not in tensors or tensors[key].shape != wanted.get(key)
    )
    if unlike:
        raise AdapterError(
            f"training cannot go on from {folder}: its tensors are not those of the recipe's spec",
            expected=f"{len(wanted)} tensors",
            found=f"{len(tensors)} tensors, other ones or of another shape: {listed(unlike)}",
            do="start from an adapter that was trained by the same spec",
        )
    set_peft_model_state_dict(model, tensors)


def _fix_order(trainer: AnswerTrainer, job: TrainingJob, processes: int) -> list[int]:
    """Lay out the rows of the whole run, step by step, and return the tokens of each step."""
    optimizer = job.recipe.optimizer
    rows_per_step = optimizer.batch_size * optimizer.gradient_accumulation * processes
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    order = training_order(lengths, rows_per_step, optimizer.steps, job.recipe.seed)
    trainer.train_dataset = trainer.train_dataset.select(order)
    return [
        sum(lengths[row] for row in order[first : first + rows_per_step])
        for first in range(0, len(order), rows_per_step)
    ]


def _arguments(job: TrainingJob) -> SFTConfig:
    recipe = job.recipe
    optimizer = recipe.optimizer
    return SFTConfig(
        output_dir=str(job.checkpoint_folder),
        max_steps=optimizer.steps,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        max_length=optimizer.max_length,
        packing=recipe.packing,
        completion_only_loss=True,
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # the order is decided in training.batches
        bf16=False,  # the base has the recipe's dtype and the adapter its own: nothing to cast
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=recipe.checkpoint_steps,
        save_total_limit=2,  # the one before is needed until the newest is complete
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # a dropped sub-layer's adapters have gradients of zero
    )


def _save(model: PeftModel, job: TrainingJob, template: str | None) -> None:
    """Write a PEFT folder, whole or not at all, with its base's name and its chat template."""
    partial = job.work_dir / "adapter.partial"
    for leftover in (partial, job.adapter_folder):
        shutil.rmtree(leftover, ignore_errors=True)
    save_adapter(model, partial)
    config_file = partial / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config |= {"base_model_name_or_path": job.base_name, "revision": job.base_revision}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if template is not None:
        write_template(partial, template)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    partial.rename(job.adapter_folder)
