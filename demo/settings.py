"""Settings of the demo: tasks, training, gate policy and update.

They were fixed before the demo's own data were scored, on another split and another update
(docs/decisions/0070-demo-settings.md). Do not change them because of the demo's results: the
results would no longer be valid.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from demo import functions
from demo.base import FAMILY
from demo.exceptions import examples as exceptions
from demo.tasks import Task
from demo.update import UpdateSettings
from trans_peft.domain.adapter import AdapterSpec
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import GatePolicy, Suite
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.domain.recipe import OptimizerSettings, Perturbation, TrainingRecipe
from trans_peft.domain.recovery import CompensationPolicy, RecoveryPolicy

__all__ = [
    "ARMS",
    "COMPENSATION",
    "FULL",
    "POLICY",
    "PROMOTION",
    "QUICK",
    "UPDATE",
    "DemoTask",
    "recipes",
]

DATA_SEED = 0
"""Selects the files for evaluation. The settings below were chosen on the split of seed 2."""

COMPENSATION = CompensationPolicy(prompts_uri="s3://data/demo/traffic/{adapter}.jsonl")
"""The library's defaults. The file has prompts of the task that are no training or evaluation rows,
as recent traffic is none."""

POLICY = GatePolicy(
    margin_points=5.0,
    alpha=0.05,
    must_beat_bare=True,
    recovery=RecoveryPolicy(compensation=COMPENSATION),
)
"""The library's defaults, and compensation for adapters that do not pass unchanged. The table shows
the power at the observed discordance."""

PROMOTION = PromotionPolicy(min_serving_share=0.0)
"""Promotes the new base whatever the verdicts are, to show what happens to each adapter."""

UPDATE = UpdateSettings(steps=20, learning_rate=1e-3, rows=2, seed=0, weights="ffn")

SPEC = AdapterSpec(
    "LORA",
    {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),  # the paper's
    },
)

ARMS = {
    "plain": Perturbation(),
    "trans-peft": Perturbation(masking_p=0.1, granularity="element", spared_layers=(0,)),
}


@dataclass(frozen=True)
class DemoTask:
    """A task with the settings of its adapters and its suite."""

    task: Task
    optimizer: OptimizerSettings
    scoring: str = "exact_match"
    threshold: float | None = None
    max_new_tokens: int = 8
    stop: tuple[str, ...] = ("\n",)

    @property
    def folder_uri(self) -> str:
        """Prefix to which the rows of the task are uploaded."""
        return f"s3://data/demo/{self.task.name}"

    @property
    def suite(self) -> Suite:
        """The suite by which the adapters of the task are judged."""
        return Suite(
            name=self.task.name,
            data=DataSource(f"{self.folder_uri}/eval.jsonl"),
            scoring=self.scoring,
            threshold=self.threshold,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
        )


EXCEPTIONS = DemoTask(
    Task("exceptions", exceptions, train_per_label=400, evaluation_per_label=64),
    OptimizerSettings(learning_rate=1e-3, steps=64, batch_size=16, warmup_steps=10, max_length=128),
    stop=("\n", "("),  # a bare base continues with the call: its class still counts
)
SIGNATURES = DemoTask(
    Task("signatures", functions.signatures, 400, 48, files_share=0.3),
    OptimizerSettings(learning_rate=1e-3, steps=40, batch_size=16, warmup_steps=4, max_length=128),
)
RETURNS = DemoTask(
    Task("returns", functions.returns, 400, 80, files_share=0.3),
    OptimizerSettings(
        learning_rate=1e-3, steps=300, batch_size=16, warmup_steps=10, max_length=256
    ),
)
DOCSTRINGS = DemoTask(
    Task("docstrings", functions.docstrings, 4_000, 512, files_share=0.3),
    OptimizerSettings(
        learning_rate=1e-3, steps=300, batch_size=16, warmup_steps=10, max_length=256
    ),
    scoring="chrf",
    threshold=40.0,  # fixed before any scoring: about the score of a paraphrase
    max_new_tokens=24,
)

QUICK = (SIGNATURES,)
FULL = (SIGNATURES, EXCEPTIONS, RETURNS, DOCSTRINGS)


def recipes(demo_task: DemoTask) -> Iterator[TrainingRecipe]:
    """Yield one recipe per arm. They differ only in the perturbation."""
    for arm, perturbation in ARMS.items():
        yield TrainingRecipe(
            adapter=f"{demo_task.task.name}-{arm}",
            family=FAMILY,
            base_version="v1",
            data=DataSource(f"{demo_task.folder_uri}/train.jsonl"),
            suites=(demo_task.suite,),
            spec=SPEC,
            perturbation=perturbation,
            optimizer=demo_task.optimizer,
            dtype="float32",  # faster than bfloat16 on processors that do not support it
        )
