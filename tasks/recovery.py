"""Tasks of the recovery strategies: check what they need, and start a retraining.

Reconcile imports this module, so it imports no machine-learning libraries.
"""

from collections.abc import Mapping
from typing import cast

from prefect import task
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from tasks.composition import platform
from tasks.origin import inherited_tags
from tasks.retries import RETRIES
from tasks.worker import code_tag
from trans_peft.domain.conventions import Deployment
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.fleet import Fleet
from trans_peft.domain.identity import content_sha256, json_value
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.lifecycle.reconcile import MAX_ATTEMPTS
from trans_peft.lifecycle.recovery import readiness

__all__ = ["start_training", "unprepared"]


@task(**RETRIES, task_run_name="prompts of {fleet.family}")
def unprepared(fleet: Fleet, policy: GatePolicy) -> Mapping[str, str]:
    """Return the adapters that no strategy without training rows can recover, with the reasons."""
    return readiness.unprepared(fleet, policy.recovery, platform().store)


@task(**RETRIES, task_run_name="start retraining of {recipe.adapter}")
def start_training(recipe: TrainingRecipe, policy: GatePolicy) -> bool:
    """Start the flow `train-adapter` for a recipe, unless a run of it is active.

    Reconcile calls this as long as the outcome of the adapter has an untried recipe. Each call
    starts a new run if the earlier ones have ended without success. Returns False after three runs.
    """
    key = content_sha256(["retrain", recipe, policy])
    for attempt in range(MAX_ATTEMPTS):
        run = cast(  # `run_deployment` returns a coroutine in asynchronous code only
            FlowRun,
            run_deployment(
                Deployment.TRAIN_ADAPTER,
                parameters={"recipe": json_value(recipe), "policy": json_value(policy)},
                idempotency_key=f"{key}:{attempt}",
                tags=[code_tag(), *inherited_tags()],
                timeout=0,
            ),
        )
        if run.state is None or not run.state.is_final():
            return True
    return False
