"""A recipe becomes a live adapter."""

from prefect import flow

from tasks import training
from tasks.limits import gpu_slot
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recipe import TrainingRecipe


@flow(name="train-adapter", flow_run_name="train {recipe.adapter}")
def train_adapter(
    recipe: TrainingRecipe, policy: GatePolicy | None = None
) -> AdapterVersion | TransferOutcome:
    """Train one adapter on a GPU, evaluate it on its base, register it.

    With a policy it is a remedy for an adapter that did not pass on that base: registered only if
    it passes the gate against the results on the old one.
    """
    with gpu_slot():
        if policy is not None:
            return training.retrain(recipe, policy)
        return training.train_adapter(recipe)
