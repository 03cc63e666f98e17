"""Train one adapter on one base: the work of a training process, from rows to a PEFT folder.

The perturbation is attached after the adapter, so that it applies to the adapter's branch as well.
Rows are tokenized as in an evaluation. TRL masks the prompts and packs rows; transformers runs the
training loop. All random choices depend on the seed and the step only, so a resumed run ends in the
same weights as an uninterrupted one.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.integrations.liger import apply_liger_kernel

from trans_peft.errors import (
    AdapterError,
    InvalidSpecError,
    TrainingError,
    listed,
)
from trans_peft.methods.specs import attach
from trans_peft.models import (
    LoadedBase,
    adapter_weights_sha256,
    load_base,
    load_tokenizer,
    release_base,
)
from trans_peft.perturbation import perturbed
from trans_peft.text.chat import template_of
from trans_peft.text.saved_template import check_template, saved_template, write_template
from trans_peft.training.adapter_check import check_adapter_is_trainable, save_adapter
from trans_peft.training.arguments import loraplus_optimizer, training_arguments
from trans_peft.training.batches import WeightedRows, training_order
from trans_peft.training.compilation import compile_layers
from trans_peft.training.distillation import DistillationTrainer
from trans_peft.training.events import EventMessage, TrainingStarted
from trans_peft.training.held_out import ValidationCallback
from trans_peft.training.job import TrainingJob, TrainingResult
from trans_peft.training.job_rows import JobRows, read_job_rows, token_count
from trans_peft.training.machine_check import check_machine
from trans_peft.training.memory import check_memory
from trans_peft.training.preferences import PreferenceTrainer
from trans_peft.training.private_trainer import PrivateTrainer
from trans_peft.training.sharding import in_turns, shard_base
from trans_peft.training.trainer import (
    AnswerTrainer,
    EventCallback,
    device_seconds,
    last_checkpoint,
)
from trans_peft.transfer.peft_folder import WEIGHTS_NAME, read_peft_folder

__all__ = ["finetune"]


def finetune(job: TrainingJob, state: PartialState, send: Callable[[EventMessage], None]) -> None:
    """Train the job's adapter on this process's device, and save the adapter and the result.

    Every process of the job calls this function. The main process calls `send` with each event,
    saves the adapter, and writes the result last. DataError before a model is loaded;
    InvalidSpecError before the first step; TrainingError if the loss or a weight is not finite.
    """
    recipe = job.recipe
    check_machine(recipe)
    checkpoint = last_checkpoint(job.checkpoint_folder)
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    _check_processes(gather_object([(job.identity(), first_step)]))
    tokenizer = load_tokenizer(job.base_folder)
    template = _template(job, tokenizer)
    rows = read_job_rows(job, tokenizer, template)
    optimizer = recipe.optimizer.for_rows(rows.sequences, state.num_processes)
    job = replace(job, recipe=replace(recipe, optimizer=optimizer))
    if recipe.compute.memory_gib is not None:
        estimate = check_memory(recipe, job.base_folder, rows.largest_step(recipe))
        if state.is_main_process:
            send(estimate)
    trainer = _trainer(job, rows, str(state.device))
    if isinstance(trainer, PrivateTrainer):
        tokens_per_step = trainer.tokens_per_step
    else:
        tokens_per_step = _fix_order(trainer, job, state.num_processes, rows.sources)
    model = trainer.model.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs_per_step = optimizer.rows_per_step(state.num_processes) / rows.sequences
    if state.is_main_process:
        steps = len(tokens_per_step)
        send(
            TrainingStarted(
                step=first_step,
                total_steps=steps,
                trainable_parameters=trainable,
                device=str(state.device),
                processes=state.num_processes,
                epochs=steps * epochs_per_step,
            )
        )
    trainer.remove_callback(PrinterCallback)  # EventCallback reports the same metrics
    validation = None
    if recipe.validation is not None:
        best_folder = job.work_dir / "best"
        validation = ValidationCallback(
            trainer, rows.held_out, recipe.validation, best_folder, send
        )
        trainer.add_callback(validation)
    progress = EventCallback(send, tokens_per_step, device_seconds(checkpoint))
    trainer.add_callback(progress)  # last: it completes a checkpoint
    set_seed(recipe.seed, device_specific=True)  # each process draws its own dropout
    started_s = time.monotonic()
    with perturbed(
        model, recipe.perturbation, seed=recipe.seed, rank=state.process_index, step=first_step
    ):
        if recipe.compute.compile:
            compile_layers(model)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds, device_s = time.monotonic() - started_s, progress.device_seconds
    state.wait_for_everyone()
    if state.is_main_process:
        steps = trainer.state.global_step
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log][-10:]
        _check_weights(model, steps)
        kept_step, validation_loss = validation.kept() if validation else (None, None)
        if validation and (kept_folder := validation.kept_folder()) is not None:
            _load_weights(kept_folder, model)
        _save(model, job, template)
        TrainingResult(
            folder=job.adapter_folder,
            weights_sha256=adapter_weights_sha256(job.adapter_folder),
            steps=steps,
            final_loss=sum(losses) / len(losses),
            seconds=seconds,
            tokens_per_s=sum(tokens_per_step[first_step:steps]) / seconds,
            trainable_parameters=trainable,
            shortened_rows=rows.shortened,
            epochs=steps * epochs_per_step,
            validation_loss=validation_loss,
            kept_step=kept_step,
            device_seconds=device_s,
        ).write(job.result_file)
        shutil.rmtree(job.checkpoint_folder, ignore_errors=True)
        shutil.rmtree(job.work_dir / "best", ignore_errors=True)


def _check_processes(found: Sequence[tuple[str, int]]) -> None:
    """Raise if the processes, each with its job and first step, do not continue one training."""
    if len(jobs := {job for job, _ in found}) > 1:
        raise InvalidSpecError(
            "the processes of the training have different jobs",
            expected="one recipe, base and data on all machines",
            found=f"jobs with the hashes {', '.join(sorted(job[:12] for job in jobs))}",
            do="give `python -m trans_peft.training.join` the job.json of the training that "
            "machine 0 runs, and each training at the same time a TRANS_PEFT_MAIN_ADDRESS of its "
            "own",
        )
    if len(steps := {step for _, step in found}) > 1:
        raise TrainingError(
            "the processes of the training would resume from different checkpoints",
            expected="one work folder for all machines",
            found=f"checkpoints of the steps {', '.join(map(str, sorted(steps)))}",
            do="give all machines the same file system below the worker's state folder",
        )


def _template(job: TrainingJob, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template of the starting adapter, else that of the base; None without one."""
    template = saved_template(job.start) if job.start is not None else None
    if template is not None:
        check_template(template, f"the chat template of {job.start}")
    elif (template := template_of(tokenizer)) is not None:
        check_template(template, f"the chat template of {job.base_name}")
    return template


def _model(job: TrainingJob, device: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model to train, and its tokenizer. TRL attaches the adapter of preferences."""
    recipe = job.recipe
    if recipe.compute.sharding:
        mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
        return in_turns(partial(_sharded_model, job, mesh, device))
    base = _base(job, device)
    model = base.model if recipe.objective == "dpo" else attach(base.model, recipe.spec)
    return model, base.tokenizer


def _sharded_model(
    job: TrainingJob, mesh: DeviceMesh, device: str
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    base = _base(job, "cpu")  # a GPU may not hold it
    model = attach(base.model, job.recipe.spec)
    release_base()  # a sharded base cannot be used again
    shard_base(model, mesh, device)
    return model, base.tokenizer


def _base(job: TrainingJob, device: str) -> LoadedBase:
    """Load the base, check that the adapter can be trained on it, and seed its initial weights."""
    recipe = job.recipe
    base = load_base(job.base_folder, recipe.dtype, device, attention=recipe.compute.attention)
    if recipe.compute.liger:  # before perturbed(), which looks at the layers that are trained
        apply_liger_kernel(base.model, {"fused_linear_cross_entropy": False})
    check_adapter_is_trainable(base, recipe.spec, job.work_dir)
    set_seed(recipe.seed)
    return base


def _trainer(job: TrainingJob, rows: JobRows, device: str) -> Trainer:
    recipe = job.recipe
    model, tokenizer = _model(job, device)
    if recipe.objective == "dpo":
        make: Callable[..., Trainer] = partial(PreferenceTrainer, model, recipe.spec)
        trainable = []
    else:
        make = partial(AnswerTrainer, model=model)
        if rows.targets is not None:
            make = partial(DistillationTrainer, rows.targets, model=model)
        elif job.dp_sgd is not None:
            make = partial(PrivateTrainer, job.dp_sgd, model=model)
        trainable = [(p, p.dtype) for p in model.parameters() if p.requires_grad]
    try:
        trainer = make(
            args=training_arguments(job),
            train_dataset=Dataset.from_list(rows.training),
            processing_class=tokenizer,
        )
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InvalidSpecError(
            "TRL rejects the recipe",
            expected="a recipe that SFTTrainer or DPOTrainer accepts",
            found=error,
            do="change the adapter's options or the optimizer settings",
        ) from error
    for parameter, dtype in trainable:  # TRL casts them to bfloat16 on nf4, which loses updates
        parameter.data = parameter.data.to(dtype)
    if job.start is not None:
        _load_weights(job.start, trainer.model)
    if (ratio := recipe.optimizer.loraplus_lr_ratio) != 1:
        trainer.optimizer = loraplus_optimizer(trainer.model, trainer.args, ratio)
    return trainer


def _check_weights(model: PeftModel, steps: int) -> None:
    """Raise TrainingError if a trained weight is not finite.

    The loss is computed before the update, so its check does not cover the last update.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    broken = sorted(key for key, tensor in state.items() if not torch.isfinite(tensor).all())
    if broken:
        raise TrainingError(
            f"the adapter's weights are not finite after step {steps}",
            expected="finite weights",
            found=listed(broken),
            do="lower optimizer.learning_rate, raise warmup_steps, or train in float32",
        )


def _load_weights(folder: Path, model: PeftModel) -> None:
    """Load the weights of a PEFT folder. AdapterError unless names and shapes match exactly."""
    tensors = load_file(read_peft_folder(folder).path / WEIGHTS_NAME)
    expected = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}
    unlike = sorted(
        key
        for key in expected.keys() | tensors.keys()
        if key not in tensors or tensors[key].shape != expected.get(key)
    )
    if unlike:
        raise AdapterError(
            f"training cannot start from {folder}: its tensors do not match the recipe's spec",
            expected=f"{len(expected)} tensors",
            found=f"{len(tensors)} tensors; different or of another shape: {listed(unlike)}",
            do="start from an adapter that was trained with the same spec, or give the recipe the "
            "options in its adapter_config.json",
        )
    set_peft_model_state_dict(model, tensors)


def _fix_order(
    trainer: Trainer,
    job: TrainingJob,
    processes: int,
    sources: Sequence[WeightedRows] = (),
) -> list[int]:
    """Put the rows of the whole run in training order, and return the tokens of each step."""
    optimizer = job.recipe.optimizer
    assert optimizer.steps is not None  # see OptimizerSettings.for_rows
    rows_per_step = optimizer.rows_per_step(processes)
    lengths = [token_count(row) for row in trainer.train_dataset]
    seed = job.recipe.seed if job.recipe.data_seed is None else job.recipe.data_seed
    order = training_order(lengths, rows_per_step, optimizer.steps, seed, sources)
    trainer.train_dataset = trainer.train_dataset.select(order)
    return [
        sum(lengths[row] for row in order[first : first + rows_per_step])
        for first in range(0, len(order), rows_per_step)
    ]


def _save(model: PeftModel, job: TrainingJob, template: str | None) -> None:
    """Write a PEFT folder atomically, with the base's name and the chat template."""
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
