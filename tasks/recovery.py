"""The remedy that takes a flow run of its own: training anew. Light, for reconcile starts it."""

from typing import cast

from prefect import task
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from tasks.origin import inherited_tags
from tasks.policy import RETRIES
from trans_peft.domain.conventions import Deployment
from trans_peft.domain.evaluation import GatePolicy
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.lifecycle.reconcile import MAX_ATTEMPTS

__all__ = ["start_training"]


@task(**RETRIES, task_run_name="start training {recipe.adapter} anew")
def start_training(recipe: TrainingRecipe, policy: GatePolicy) -> bool:
    """Start the flow `train-adapter` for a recipe that is left to try, unless it is under way.

    Asked at every look for as long as the recipe is left: a run that is over did not do it. False
    after three of them, which leave it to a person.
    """
    key = content_sha256(["train anew", recipe, policy])
    for take in range(MAX_ATTEMPTS):
        run = cast(  # a coroutine only in asynchronous code
            FlowRun,
            run_deployment(
                Deployment.TRAIN_ADAPTER,
                parameters={"recipe": recipe, "policy": policy},
                idempotency_key=f"{key}:{take}",
                tags=inherited_tags(),
                timeout=0,
            ),
        )
        if run.state is None or not run.state.is_final():
            return True
    return False
