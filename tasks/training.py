"""Tasks that train and adopt adapters."""

from prefect import task

from tasks import lineage, metrics
from tasks.composition import platform
from tasks.limits import adapter_lock
from tasks.progress import training_progress, work_progress
from tasks.retries import RETRIES
from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.names import check_names
from trans_peft.domain.outcome import TransferOutcome
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.lifecycle.adopt import adopt
from trans_peft.lifecycle.recovery import retraining
from trans_peft.lifecycle.train import train

__all__ = ["adopt_adapter", "retrain", "train_adapter"]


@task(**RETRIES, task_run_name="train {recipe.adapter}")
def train_adapter(recipe: TrainingRecipe) -> AdapterVersion:
    """Train, evaluate and register one adapter."""
    with adapter_lock(recipe.adapter):
        version = train(
            recipe,
            platform(),
            on_event=training_progress(recipe.adapter),
            on_progress=work_progress(),
        )
    lineage.adapter_trained(version)
    return version


@task(**RETRIES, task_run_name="retrain {recipe.adapter}")
def retrain(recipe: TrainingRecipe, policy: GatePolicy) -> TransferOutcome:
    """Train an adapter again on a new base on which transfer did not pass, and apply the gate."""
    with adapter_lock(recipe.adapter):
        outcome = retraining.retrain(
            recipe,
            policy,
            platform(),
            on_event=training_progress(recipe.adapter),
            on_progress=work_progress(),
        )
    metrics.adapter_judged(outcome)
    lineage.adapter_transferred(outcome)
    return outcome


@task(**RETRIES, task_run_name="adopt {adapter}")
def adopt_adapter(
    adapter: str, folder_uri: str, family: str, suites: tuple[Suite, ...], base_version: str | None
) -> AdapterVersion:
    """Check, evaluate and register an existing PEFT folder."""
    check_names("the adapter", adapter=adapter, family=family)  # the lock contains the name
    with adapter_lock(adapter):
        version = adopt(
            adapter,
            folder_uri,
            family,
            suites,
            platform(),
            base_version=base_version,
            on_progress=work_progress(),
        )
    lineage.adapter_trained(version)
    return version
