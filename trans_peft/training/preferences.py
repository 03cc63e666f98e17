"""TRL's DPO trainer on rows of token ids, with masks on the policy and none on the reference.

The reference is the base without the adapter. Its passes run in evaluation mode, so that they have
no masks, no dropout and no training position. One policy pass has the chosen and the rejected
answers of its pairs in one batch. All rows of a batch share a draw, so both answers of a pair do.
"""

from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers import PreTrainedModel
from trl import DPOTrainer

from trans_peft.domain.adapter import AdapterSpec
from trans_peft.methods.specs import to_config
from trans_peft.training.trainer import with_all_gradients

__all__ = ["PreferenceTrainer"]


class PreferenceTrainer(DPOTrainer):
    """A `DPOTrainer` whose rows have `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def __init__(self, model: PreTrainedModel, spec: AdapterSpec, **arguments: Any) -> None:
        # TRL would add a copy of a given adapter as the reference. An adapter that it attaches
        # itself, after seeding as for `attach`, is disabled instead.
        super().__init__(model=model, peft_config=to_config(spec), **arguments)
        cast_adapter_dtype(self.model, "default")  # TRL casts to bfloat16 on nf4, as for answers
        self.precompute_ref_logps = True  # `compute_loss` adds the reference's to the batch

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean DPO loss over the pairs of the batch."""
        was_training = self.model.training
        self.model.eval()
        try:
            chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        finally:
            self.model.train(was_training)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if return_outputs else with_all_gradients(loss, self)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card, because checkpoints are not published."""
