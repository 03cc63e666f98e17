"""The trainer's arguments and optimizer for a recipe whose number of steps is known."""

from collections.abc import Callable
from functools import partial

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, SFTConfig

from trans_peft.training.job import TrainingJob

__all__ = ["loraplus_optimizer", "training_arguments"]

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(job: TrainingJob) -> SFTConfig | DPOConfig:
    """Return the arguments of TRL's trainer. The recipe has `steps`, not `epochs`."""
    recipe = job.recipe
    optimizer = recipe.optimizer
    assert optimizer.steps is not None  # see OptimizerSettings.for_rows
    make: Callable[..., SFTConfig | DPOConfig] = partial(
        SFTConfig, packing=recipe.packing, completion_only_loss=True
    )
    if recipe.objective == "dpo":
        # The options of the adapter set its dropout, also for preferences.
        make = partial(DPOConfig, beta=recipe.dpo_beta, disable_dropout=False)
    return make(
        output_dir=str(job.checkpoint_folder),
        max_steps=optimizer.steps,
        per_device_train_batch_size=optimizer.batch_size,
        # A batch of a private training has all rows of a step, whose number varies.
        gradient_accumulation_steps=optimizer.gradient_accumulation if job.dp_sgd is None else 1,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=_SCHEDULES[optimizer.schedule],
        warmup_steps=optimizer.warmup_steps,
        optim=optimizer.name,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        neftune_noise_alpha=optimizer.neftune_alpha or None,
        max_length=optimizer.max_length,
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # training.batches defines the order
        bf16=False,  # no autocast: the base has the recipe's dtype, the adapter its own
        gradient_checkpointing=recipe.compute.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=recipe.checkpoint_steps,
        save_total_limit=2,  # the previous one is needed until the newest is complete
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # adapters of dropped sub-layers get zero gradients
    )


def loraplus_optimizer(model: PeftModel, arguments: TrainingArguments, ratio: float) -> Optimizer:
    """Return the arguments' optimizer with `ratio` times the learning rate for LoRA's B.

    PEFT puts all vectors into the groups of B. Those that are not of a B, such as the magnitudes of
    DoRA, get the rate of A here.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **options,
    )
    of_b = {id(weight) for name, weight in model.named_parameters() if ".lora_B." in name}
    for group in tuple(optimizer.param_groups):
        if group["lr"] <= arguments.learning_rate:
            continue
        weights = group["params"]
        group["params"] = [weight for weight in weights if id(weight) in of_b]
        if others := [weight for weight in weights if id(weight) not in of_b]:
            optimizer.add_param_group(group | {"params": others, "lr": arguments.learning_rate})
    return optimizer
