"""A recipe becomes a live adapter."""

from prefect import flow

from tasks import training
from tasks.limits import gpu_slot
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.recipe import TrainingRecipe


@flow(name="train-adapter", flow_run_name="train {recipe.adapter}")
def train_adapter(recipe: TrainingRecipe) -> AdapterVersion:
    """Train one adapter on a GPU, evaluate it on its base, register it."""
    with gpu_slot():
        return training.train_adapter(recipe)
