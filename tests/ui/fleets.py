"""Example fleets in memory: adapters with real verdicts on a few base versions, or very many."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from trans_peft.domain.adapter import AdapterVersion, ManualOverride
from trans_peft.domain.base import BaseVersion, Fingerprint, TensorSignature
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import (
    BARE,
    Evaluation,
    GatePolicy,
    ItemResult,
    Judgment,
    Suite,
    Verdict,
)
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.outcome import Compatibility, Effect, TransferOutcome
from trans_peft.domain.recipe import OptimizerSettings, Perturbation, TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.edges.memory import memory_platform
from trans_peft.ports import Platform
from trans_peft.validation.gate import judge

FAMILY = "smollm2"
ITEMS = 400
POLICY = GatePolicy(margin_points=5.0)
SUITES = {
    name: Suite(name, DataSource(f"s3://data/{name}.jsonl", content_sha256(name)), **more)
    for name, more in {
        "exceptions": {},
        "signatures": {},
        "routing": {"chance_points": 25.0},
    }.items()
}


_BARE_RIGHT = 40


def evaluation(
    suite: Suite, weights: str, base: BaseVersion, right: Sequence[bool], seconds: float = 40.0
) -> Evaluation:
    return Evaluation(
        suite=suite.name,
        weights_sha256=weights,
        base_fingerprint_sha256=base.fingerprint_sha256,
        suite_sha256=suite.suite_sha256,
        decoding_sha256=suite.decoding_sha256,
        items=tuple(
            ItemResult(f"{suite.name}-{n:03}", is_right) for n, is_right in enumerate(right)
        ),
        seconds=seconds,
    )


def answers(right: int, lost: int = 0, gained: int = 0) -> list[bool]:
    """Return which items are right: the first `right`, less the first `lost`, plus `gained`."""
    return [lost <= n < right or right <= n < right + gained for n in range(ITEMS)]


@cache
def judged(lost: int, gained: int, right: int, bare: int) -> Judgment:
    suite = SUITES["exceptions"]
    old, new = (
        BaseVersion(FAMILY, v, "m://", n, v * 32, ready=True) for n, v in ((1, "v1"), (2, "v2"))
    )
    return judge(
        POLICY,
        {suite.name: evaluation(suite, "w", old, answers(right))},
        {suite.name: evaluation(suite, "w", new, answers(right, lost, gained))},
        {suite.name: evaluation(suite, BARE, new, answers(bare))},
    )  # fmt: skip


class ExampleFleet:
    """A platform in memory that is filled by the methods below."""

    def __init__(self, work_dir: Path, family: str = FAMILY) -> None:
        self.work_dir = work_dir
        self.family = family
        self.platform: Platform = memory_platform(work_dir)
        self.folder = work_dir / "peft"
        self.folder.mkdir()
        (self.folder / "adapter_model.safetensors").write_bytes(b"w")
        self.bases: dict[str, BaseVersion] = {}

    def add_base(self, version: str, parent: str | None = None) -> BaseVersion:
        weight = TensorSignature((576, 576), "BF16", content_sha256(version))
        base = self.platform.catalog.make_ready(
            BaseVersion(
                self.family, version, f"s3://bases/{self.family}/{version}", 0,
                parent=parent, manifest_sha256=content_sha256(["manifest", version]),
                drift=f"from {parent}, estimated: FFN 12.50%" if parent else "",
            ),
            fingerprint=Fingerprint(
                "LlamaForCausalLM", 30, content_sha256("c"), {"model.embed_tokens.weight": weight},
                content_sha256("v"), content_sha256("t"),
            ),
            source="upload",
        )  # fmt: skip
        self.bases[version] = base
        return base

    def train(
        self, name: str, base: str, *, suites: Sequence[str] = ("exceptions",),
        method: str = "LORA", right: int = 300, masking: float = 0.1,
    ) -> AdapterVersion:  # fmt: skip
        """Register a trained version that serves on its base, with its evaluations."""
        on, its = self.bases[base], tuple(SUITES[suite] for suite in suites)
        recipe = TrainingRecipe(
            name, self.family, DataSource(f"s3://data/{name}.jsonl", "d" * 64), its,
            perturbation=Perturbation(masking_p=masking), optimizer=OptimizerSettings(1e-3, 120, 8),
        )  # fmt: skip
        version = self.platform.registry.register(
            AdapterVersion(
                name, 0, on.ref, on.ref, content_sha256([name, base]), method, its,
                recipe_sha256="r" * 64, run_id="0123456789abcdef0123456789abcdef", recipe=recipe,
            ),
            self.folder,
        )  # fmt: skip
        self.platform.registry.set_alias(name, on.alias, version.number)
        for suite in its:
            self.platform.evaluations.put(
                evaluation(suite, version.weights_sha256, on, answers(right))
            )
        return version

    def transfer(
        self, name: str, base: str, changes: Mapping[str, tuple[int, int]], *, right: int = 300,
        bare: int = _BARE_RIGHT, strategy: RecoveryStrategy = RecoveryStrategy.DIRECT,
        seconds: float = 95.0,
    ) -> TransferOutcome:  # fmt: skip
        """Judge an adapter on a base, with (lost, gained) items by suite, and apply the verdict."""
        on, registry = self.bases[base], self.platform.registry
        source = registry.adapter(name).source
        weights = source.weights_sha256
        if strategy is not RecoveryStrategy.DIRECT:
            weights = content_sha256([weights, strategy])
        old_base = next(b for b in self.bases.values() if b.ref == source.base)
        its = {suite.name: suite for suite in source.suites}
        before = {
            n: evaluation(s, source.weights_sha256, old_base, answers(right))
            for n, s in its.items()
        }
        after = {n: evaluation(s, weights, on, answers(right, *changes[n])) for n, s in its.items()}
        bares = {n: evaluation(s, BARE, on, answers(bare)) for n, s in its.items()}
        judgment = judge(POLICY, before, after, bares)
        for found in (*after.values(), *bares.values()):
            self.platform.evaluations.put(found)
        version = registry.register(
            replace(
                source, number=0, base=on.ref, weights_sha256=weights,
                transferred_from=source.number, made_by=strategy, run_id=None,
            ),
            self.folder,
        )  # fmt: skip
        tried = (
            (
                StrategyAttempt(
                    RecoveryStrategy.DIRECT, "needs-retuning", "lost at least 9.1 points", 41.0
                ),
                StrategyAttempt(strategy, judgment.verdict, judgment.reason, 160.0, "20 steps"),
            )
            if strategy is not RecoveryStrategy.DIRECT
            else ()
        )  # fmt: skip
        outcome = TransferOutcome(
            name, source.number, on.ref, source.weights_sha256, POLICY.sha256, judgment,
            compatibility=Compatibility(notes=("the chat template changed",)), effect=Effect(0.25),
            evaluations=(*after.values(), *bares.values()), new_number=version.number,
            seconds=seconds, strategy=strategy, tried=tried,
        )  # fmt: skip
        registry.record(outcome)
        if outcome.verdict is Verdict.PASSED:
            registry.set_alias(name, on.alias, version.number)
        return outcome

    def refuse(
        self, name: str, base: str, verdict: Verdict, reason: str, attempts: int = 1
    ) -> None:
        """Record an outcome without a version."""
        source = self.platform.registry.adapter(name).source
        for _ in range(attempts):
            self.platform.registry.record(
                TransferOutcome(
                    name, source.number, self.bases[base].ref, source.weights_sha256,
                    POLICY.sha256, Judgment(verdict, reason),
                    compatibility=Compatibility(mismatches=(reason,))
                    if verdict is Verdict.INCOMPATIBLE
                    else Compatibility(),
                )
            )  # fmt: skip

    def approve(self, name: str, base: str, by: str = "unknown") -> None:
        """Set the alias of an adapter as a person does; reconcile has recorded it."""
        registry, on = self.platform.registry, self.bases[base]
        number = next(v.number for v in registry.versions(name) if v.base == on.ref)
        registry.set_alias_manually(name, on.alias, number)
        registry.record_manual_override(
            name, on.alias,
            ManualOverride(number, None, "inconclusive", "2026-03-02T09:30:00+00:00", by),
        )  # fmt: skip

    def set_alias(self, alias: str, base: str) -> None:
        self.platform.catalog.set_alias_manually(self.family, alias, self.bases[base].number)


def example(work_dir: Path) -> ExampleFleet:
    """Return a fleet with every state of an adapter, in the middle of an upgrade to v3."""
    fleet = ExampleFleet(work_dir)
    for version, parent in (("v1", None), ("v2", "v1"), ("v3", "v2")):
        fleet.add_base(version, parent)
    fleet.platform.catalog.register_manually(FAMILY, "s3://bases/smollm2/v4")
    fleet.set_alias("champion", "v3")
    fleet.set_alias("serving", "v2")
    two = ("exceptions", "signatures")
    names = {
        "docstrings-de": two, "docstrings-en": two, "exceptions-plain": ("exceptions",),
        "exceptions-trans-peft": ("exceptions",), "release-notes": ("exceptions",),
        "sql-explain": ("exceptions", "routing"), "support-chat": ("routing",),
        "support-routing": ("routing",), "tests-pytest": two, "types-stubs": ("signatures",),
        "unit-conversion": ("signatures",), "summaries": ("exceptions",),
    }  # fmt: skip
    for number, (name, suites) in enumerate(names.items()):
        method = ("LORA", "LORA", "LOHA", "HOULSBY")[number % 4]
        fleet.train(name, "v1", suites=suites, method=method)
        fleet.platform.registry.set_owner_manually(name, ("search", "support")[number % 2])

    def move(name: str, base: str, lost: int, gained: int, **more) -> None:
        fleet.transfer(name, base, dict.fromkeys(names[name], (lost, gained)), **more)

    for name in names:
        move(name, "v2", 6, 8)
    move("docstrings-de", "v3", 6, 8)
    move("docstrings-en", "v3", 9, 6)
    move("exceptions-plain", "v3", 90, 4)
    move("exceptions-trans-peft", "v3", 12, 10, strategy=RecoveryStrategy.DISTILLED)
    move("release-notes", "v3", 40, 32)
    fleet.approve("release-notes", "v3", by="Mira <mira@example.com>")
    move("sql-explain", "v3", 36, 30)
    move("support-chat", "v3", 8, 8, bare=298)
    fleet.refuse(
        "support-routing",
        "v3",
        Verdict.INCOMPATIBLE,
        "lm_head: shape (49152, 576), found (50000, 576)",
    )
    fleet.refuse(
        "tests-pytest", "v3", Verdict.FAILED, "OutOfMemoryError: the process ran out of memory", 2
    )
    return fleet  # fmt: skip


_KINDS = (
    (Verdict.PASSED, (6, 8, 300, 40)), (Verdict.PASSED, (8, 4, 300, 40)),
    (Verdict.NEEDS_RETUNING, (90, 4, 300, 40)), (Verdict.INCONCLUSIVE, (40, 32, 300, 40)),
)  # fmt: skip


def large(work_dir: Path, adapters: int, bases: int = 3) -> Platform:
    """Return a platform with many adapters. Every fifth has no verdict on the last base."""
    fleet = ExampleFleet(work_dir)
    registry = fleet.platform.registry
    refs = [fleet.add_base(f"v{n}").ref for n in range(1, bases + 1)]
    fleet.set_alias("serving", "v1")
    fleet.set_alias("champion", f"v{bases}")
    suites = tuple(SUITES.values())
    for n in range(adapters):
        name = f"adapter-{n:05}"
        source = registry.register(
            AdapterVersion(
                name, 0, refs[0], refs[0], content_sha256(name), ("LORA", "LOHA", "IA3")[n % 3],
                suites[n % 3 : n % 3 + 1],
            ),
            fleet.folder,
        )  # fmt: skip
        registry.set_alias(name, refs[0].alias, 1)
        for position, ref in enumerate(refs[1:], 2):
            if position == bases and n % 5 == 0:
                continue
            verdict, figures = _KINDS[(n * 7 + position) % len(_KINDS)]
            lost, gained, right, bare = figures
            version = registry.register(
                replace(source, number=0, base=ref, transferred_from=source.number), fleet.folder
            )
            judgment = judged(lost, gained, right, bare)
            assert judgment.verdict is verdict
            registry.record(
                TransferOutcome(
                    name, source.number, ref, source.weights_sha256, POLICY.sha256, judgment,
                    new_number=version.number, seconds=60.0 + n % 30,
                )
            )  # fmt: skip
            if verdict is Verdict.PASSED:
                registry.set_alias(name, ref.alias, version.number)
    return fleet.platform


__all__ = ["FAMILY", "POLICY", "SUITES", "ExampleFleet", "example", "large"]
