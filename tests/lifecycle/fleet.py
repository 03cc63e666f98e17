"""A fleet without models: bases and adapters with names and hashes alone.

In memory, or on the registry of a real MLflow server (`on_mlflow`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion, AliasState
from trans_peft.domain.base import BaseVersion, Fingerprint
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import (
    Evaluation,
    GatePolicy,
    ItemResult,
    Judgment,
    Suite,
    Verdict,
)
from trans_peft.domain.fleet import Fleet, FleetChanges, RegisteredAdapter
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import TransferOutcome, TransferTask
from trans_peft.domain.promotion import PromotionPolicy
from trans_peft.edges.memory import memory_platform
from trans_peft.lifecycle.apply_verdicts import apply_verdicts
from trans_peft.lifecycle.promotion import describe_obstacle
from trans_peft.lifecycle.reconcile import is_still_needed, observe, observe_adapter, plan
from trans_peft.lifecycle.resolve import find_base

FAMILY = "small"
SUITE = Suite("exam", DataSource("exam.jsonl", sha256="e" * 64))
POLICY = GatePolicy(margin_points=5.0)
ANY = PromotionPolicy(min_serving_share=0.0)


@dataclass(frozen=True)
class Person:
    """Manual changes of aliases in MLflow: (model, alias, version number or None)."""

    sets_on_a_base: Callable[[str, str, int | None], None]
    sets_on_an_adapter: Callable[[str, str, int | None], None]


@dataclass
class MemoryFleet:
    work_dir: Path
    family: str = FAMILY

    def __post_init__(self):
        self.platform = memory_platform(self.work_dir)
        self.person = Person(
            self.platform.catalog.set_alias_manually, self.platform.registry.set_alias_manually
        )

    @classmethod
    def on_mlflow(cls, work_dir: Path, family: str, tracking_uri: str) -> "MemoryFleet":
        """Return a fleet whose registry is a real one; evaluations stay in memory."""
        from mlflow import MlflowClient

        from trans_peft.edges.mlflow_catalog import MlflowCatalog
        from trans_peft.edges.mlflow_registry import MlflowRegistry

        client = MlflowClient(tracking_uri)

        def click(model: str, alias: str, number: int | None) -> None:
            if number is None:
                client.delete_registered_model_alias(model, alias)
            else:
                client.set_registered_model_alias(model, alias, str(number))

        fleet = cls(work_dir, family)
        fleet.platform = replace(
            fleet.platform,
            catalog=MlflowCatalog(tracking_uri),
            registry=MlflowRegistry(tracking_uri),
        )
        fleet.person = Person(click, click)
        return fleet

    def add_base(self, version: str) -> BaseVersion:
        return self.platform.catalog.make_ready(
            BaseVersion(self.family, version, f"memory://bases/{version}", 0),
            fingerprint=Fingerprint("Llama", 2, version, {}, "v", "t"),
            source="upload",
        )

    def add_adapter(self, name: str, base: BaseVersion, weights: str = "w") -> AdapterVersion:
        folder = self.work_dir / "peft"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(weights.encode())
        version = self.platform.registry.register(
            AdapterVersion(
                adapter=name,
                number=0,
                base=base.ref,
                trained_on=base.ref,
                weights_sha256=content_sha256([name, weights]),
                method="LORA",
                suites=(SUITE,),
            ),
            folder,
        )
        self.platform.registry.set_alias(name, version.base.alias, version.number)
        return version

    def judge(
        self, task: TransferTask, verdict: Verdict = Verdict.PASSED, policy: GatePolicy = POLICY
    ) -> TransferOutcome:
        """Complete one task as a shard does, with a given verdict."""
        registry = self.platform.registry
        base = find_base(self.family, task.base.version, self.platform)
        source = next(v for v in registry.versions(task.adapter) if v.number == task.source_number)
        number = None
        if verdict not in (Verdict.FAILED, Verdict.INCOMPATIBLE):
            draft = replace(source, base=base.ref, transferred_from=source.number)
            number = registry.register(draft, self.work_dir / "peft").number
        outcome = TransferOutcome(
            adapter=task.adapter,
            source_number=source.number,
            base=base.ref,
            weights_sha256=source.weights_sha256,
            policy_sha256=policy.sha256,
            judgment=Judgment(verdict, "given by the test"),
            new_number=number,
            attempts=task.attempt,
        )
        registry.record(outcome)
        return outcome

    def tasks(self, policy: GatePolicy = POLICY) -> tuple[TransferTask, ...]:
        return plan(observe(self.family, self.platform), policy).tasks

    def needs(self, task: TransferTask, policy: GatePolicy = POLICY) -> bool:
        """Return what a shard finds when it reads the adapter before it starts the task."""
        seen = observe_adapter(task.adapter, self.family, self.platform)
        return is_still_needed(task, seen, policy)

    def complete_tasks(self, verdict: Verdict = Verdict.PASSED) -> None:
        for task in self.tasks():
            self.judge(task, verdict)

    def apply_verdicts(self, promotion: PromotionPolicy = ANY) -> FleetChanges:
        fleet = observe(self.family, self.platform)
        return apply_verdicts(fleet, POLICY, promotion, self.platform)[1]

    def promote(self, base: BaseVersion | None) -> None:
        """Move or remove `champion`, as a person does in MLflow."""
        number = base.number if base else None
        self.person.sets_on_a_base(self.family, "champion", number)

    @property
    def serving(self) -> int | None:
        return self.platform.catalog.alias(self.family, "serving")


def obstacle_text(changes: FleetChanges) -> str:
    """Return the text about a promotion that did not take place; empty without an obstacle."""
    return "" if changes.obstacle is None else describe_obstacle(changes.obstacle)


def evaluation(
    weights: str, base: BaseVersion, right: int, of: int, seconds: float = 0.0
) -> Evaluation:
    return Evaluation(
        suite=SUITE.name,
        weights_sha256=weights,
        base_fingerprint_sha256=base.fingerprint_sha256,
        suite_sha256=SUITE.suite_sha256,
        decoding_sha256=SUITE.decoding_sha256,
        items=tuple(ItemResult(f"q{i}", i < right) for i in range(of)),
        seconds=seconds,
    )


def judged_fleet(live: int, passing: int) -> tuple[Fleet, BaseVersion]:
    """Return a fleet that was observed with so many live adapters, `passing` of them on v2."""
    v1, v2 = (
        BaseVersion(FAMILY, name, f"memory://{name}", number, name * 32, ready=True)
        for number, name in ((1, "v1"), (2, "v2"))
    )
    adapters = tuple(
        RegisteredAdapter(
            f"a{i}",
            FAMILY,
            tuple(
                AdapterVersion(
                    f"a{i}", base.number, base.ref, v1.ref, f"w{i}", "LORA", (SUITE,),
                )
                for base in (v1, v2)
            ),
            (),
            aliases={v2.alias: AliasState(2)} if i < passing else {},
        )
        for i in range(live)
    )  # fmt: skip
    return Fleet(FAMILY, (v1, v2), serving=1, champion=2, adapters=adapters), v2
