"""Flow `train-adapter`: train an adapter by a recipe and register it."""

from prefect import flow

from tasks import training
from tasks.limits import gpu_slots
from tasks.worker import check_worker
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recipe import TrainingRecipe


@flow(name="train-adapter", flow_run_name="train {recipe.adapter}")
def train_adapter(
    recipe: TrainingRecipe, policy: GatePolicy | None = None
) -> AdapterVersion | TransferOutcome:
    """Train one adapter on a GPU, evaluate it on its base, and register it.

    Args:
        recipe: Training recipe.
        policy: Gate policy, if the recipe trains an existing adapter again on a new base. The
            result is then registered only if it passes the gate against the adapter's results on
            the old base. None: train a new adapter, or a new version of one.
    """
    check_worker()
    with gpu_slots(recipe.processes):
        if policy is not None:
            return training.retrain(recipe, policy)
        return training.train_adapter(recipe)
