"""The child process: one adapter on one base, from a job file to stock PEFT files.

Started by `trans_peft.training.launch` through `accelerate launch`, once per process. The order
follows the method: the adapter is put on the base first, the perturbation is attached after it, so
that the adapter's branch feels what the base feels.
"""

import fcntl
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trans_peft.errors import DataError, InvalidSpecError, TrainingError, TransPeftError
from trans_peft.training.events import Failed, Finished, ProcessStarted, TrainingStarted
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.lifeline import EventStream, hold_lifeline

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from trans_peft.data import Example

_LOCK_WAIT_S = 20
_TRACEBACK_CHARACTERS = 3000


def main() -> None:
    """Run the job whose file is the only argument. A failure is sent as an event."""
    events = EventStream()
    hold_lifeline()
    events.send(ProcessStarted(os.getpgid(0)))
    try:
        _train(TrainingJob.read(Path(sys.argv[1])), events)
    except Exception as error:
        traceback.print_exc()
        events.send(_failure(error))
        sys.exit(3)


def _failure(error: Exception) -> Failed:
    if isinstance(error, TransPeftError):
        return Failed(type(error).__name__, str(error))
    # torch has a class for a full GPU, none for a full host.
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        return Failed("OutOfMemoryError", str(error) or type(error).__name__)
    text = "".join(traceback.format_exception(error))
    return Failed("TrainingError", f"the training process crashed\n{text[-_TRACEBACK_CHARACTERS:]}")


def _train(job: TrainingJob, events: EventStream) -> None:
    import torch
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from transformers.utils import logging

    from trans_peft.data import parse_examples
    from trans_peft.methods.specs import attach
    from trans_peft.models import adapter_weights_sha256, load_base, load_tokenizer
    from trans_peft.perturbation import perturbed
    from trans_peft.training.batches import training_order
    from trans_peft.training.trainer import AnswerTrainer, Narrator, last_checkpoint

    disable_progress_bars()
    logging.disable_progress_bar()
    recipe = job.recipe
    steps = recipe.optimizer.steps
    gpus = torch.cuda.device_count()
    if 0 < gpus < recipe.processes:
        raise InvalidSpecError(
            "there are fewer GPUs than processes", expected=recipe.processes, found=gpus
        )
    # Without a GPU, processes find each other only if accelerate is told that they are on CPUs.
    state = PartialState(cpu=gpus == 0)
    if state.num_processes != recipe.processes:
        raise TrainingError(
            "accelerate did not start the processes that were asked for",
            expected=recipe.processes,
            found=state.num_processes,
        )
    with sole_owner(job.work_dir, held=state.is_main_process):
        examples = parse_examples(job.data_file.read_bytes(), str(job.data_file))
        shortened = check_lengths(
            examples, load_tokenizer(job.base_folder), recipe.optimizer.max_length
        )
        base = load_base(job.base_folder, recipe.dtype, str(state.device))
        set_seed(recipe.seed)  # the adapter's initial weights
        model = attach(base.model, recipe.spec)
        trainer = AnswerTrainer(
            model=model,
            args=_arguments(job),
            train_dataset=Dataset.from_list([example.trl_row() for example in examples]),
            processing_class=base.tokenizer,
        )
        lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        rows_per_step = (
            recipe.optimizer.batch_size
            * recipe.optimizer.gradient_accumulation
            * state.num_processes
        )
        order = training_order(lengths, rows_per_step, steps, recipe.seed)
        trainer.train_dataset = trainer.train_dataset.select(order)
        tokens_per_step = [
            sum(lengths[row] for row in order[i : i + rows_per_step])
            for i in range(0, len(order), rows_per_step)
        ]
        checkpoint = last_checkpoint(job.checkpoint_folder)
        first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if state.is_main_process:
            events.send(
                TrainingStarted(first_step, steps, trainable, str(state.device), recipe.processes)
            )
        set_seed(recipe.seed, device_specific=True)  # dropout: its own draws in each process
        trainer.remove_callback(PrinterCallback)  # it prints what Narrator tells
        trainer.add_callback(Narrator(events.send, tokens_per_step))
        model.train()
        started_s = time.monotonic()
        with perturbed(
            model,
            recipe.perturbation,
            seed=recipe.seed,
            rank=state.process_index,
            step=first_step,
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.monotonic() - started_s
        state.wait_for_everyone()
        if state.is_main_process:
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            _save(model, job)
            result = TrainingResult(
                folder=job.adapter_folder,
                weights_sha256=adapter_weights_sha256(job.adapter_folder),
                steps=steps,
                final_loss=sum(losses[-10:]) / len(losses[-10:]),
                seconds=seconds,
                tokens_per_s=sum(tokens_per_step[first_step:]) / seconds,
                trainable_parameters=trainable,
                shortened_rows=shortened,
            )
            result.write(job.result_file)
            shutil.rmtree(job.checkpoint_folder, ignore_errors=True)
            events.send(Finished())


def _arguments(job: TrainingJob) -> Any:
    import torch
    from trl import SFTConfig

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


def check_lengths(
    examples: tuple["Example", ...], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> int:
    """Return how many rows are cut at `max_length`. DataError if one keeps nothing to learn."""
    long = [e for e in examples if len(e.full_ids(tokenizer)) > max_length]
    lost = [e.id for e in long if len(e.prompt_ids(tokenizer)) >= max_length]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(examples)} rows have a prompt that fills max_length={max_length}",
            found=f"ids {', '.join(lost[:10])}{', ...' if len(lost) > 10 else ''}",
            do="raise optimizer.max_length, or remove these rows: nothing of their answers is left",
        )
    return len(long)


def _save(model: "PeftModel", job: TrainingJob) -> None:
    """Write the two files of a PEFT folder, whole or not at all, with the base they belong to."""
    partial = job.work_dir / "adapter.partial"
    for leftover in (partial, job.adapter_folder):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(str(partial))
    config_file = partial / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config |= {"base_model_name_or_path": job.base_name, "revision": job.base_revision}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    partial.rename(job.adapter_folder)


@contextmanager
def sole_owner(work_dir: Path, *, held: bool) -> Iterator[None]:
    """Keep a second training out of a work folder (`held`: only one process of ours has to).

    The lock goes with the process: one that is just being killed is waited for.
    """
    if not held:
        yield
        return
    with (work_dir / "lock").open("w") as file:
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise TrainingError(
                        f"another training process works in {work_dir}",
                        do="wait until it has ended, or choose another work folder",
                    ) from None
                time.sleep(0.2)
        yield


if __name__ == "__main__":
    main()
