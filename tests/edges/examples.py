"""Examples of the domain objects for tests of the ports: small, with every field used."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from trans_peft.domain.adapter import AdapterVersion
from trans_peft.domain.base import BaseRef, Fingerprint, TensorSignature
from trans_peft.domain.data import DataSource
from trans_peft.domain.evaluation import (
    Comparison,
    Evaluation,
    ItemResult,
    Judgment,
    NegativeFlips,
    SliceJudgment,
    Suite,
    SuiteJudgment,
    Verdict,
)
from trans_peft.domain.identity import content_sha256
from trans_peft.domain.leakage import SuiteLeakage
from trans_peft.domain.outcome import Compatibility, Effect, TransferOutcome
from trans_peft.domain.recipe import TrainingRecipe
from trans_peft.domain.recovery import RecoveryStrategy, StrategyAttempt
from trans_peft.domain.spec import AdapterSpec
from trans_peft.models import adapter_weights_sha256

SUITE = Suite("exceptions", DataSource("s3://data/x.jsonl", "ab" * 32), threshold=0.5, limit=7)


def fingerprint(seed: int = 0) -> Fingerprint:
    weight = TensorSignature((2, 3), "F32", content_sha256(seed), (0.5, -1e-7, 3.25))
    return Fingerprint(
        architecture="LlamaForCausalLM",
        layer_count=2,
        config_sha256="c" * 64,
        tensors={"model.embed_tokens.weight": weight},
        vocabulary_sha256="d" * 64,
        tokenizer_sha256="e" * 64,
    )


def peft_folder(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "s3://bases/smol/v1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    save_file({"base_model.model.q.lora_A.weight": weights}, folder / "adapter_model.safetensors")
    return folder


def draft(adapter: str, family: str, folder: Path, base: str = "1" * 64) -> AdapterVersion:
    return AdapterVersion(
        adapter=adapter,
        number=0,
        base=BaseRef(family, "v1", base),
        trained_on=BaseRef(family, "v1", "1" * 64),
        weights_sha256=adapter_weights_sha256(folder),
        method="LORA",
        suites=(SUITE,),
        recipe_sha256="5" * 64,
        recipe=TrainingRecipe(
            adapter, family, SUITE.data, (SUITE,), spec=AdapterSpec("LORA", {"r": 2})
        ),
        made_by=RecoveryStrategy.RETRAINED,
        leakage=(SuiteLeakage("exceptions", 3, 100, 2, 7),),
    )


def transferred(version: AdapterVersion, base: str = "2" * 64) -> AdapterVersion:
    return replace(
        version,
        number=0,
        base=BaseRef(version.base.family, "v2", base),
        transferred_from=version.number,
    )


def evaluation(key: str, right: int = 3) -> Evaluation:
    items = tuple(ItemResult(f"item-{i}", i < right, "f" * 64) for i in range(4))
    return Evaluation("exceptions", key, "2" * 64, "3" * 64, "4" * 64, items, seconds=1.5)


def outcome(
    source: AdapterVersion,
    verdict: Verdict = Verdict.PASSED,
    *,
    new_number: int | None = None,
    policy: str = "6" * 64,
    base: str = "2" * 64,
) -> TransferOutcome:
    change = Comparison(
        reference_score=80.0,
        items=4,
        discordant=3,
        difference=-1.0,
        lower=-4.5,
        upper=float("inf"),
        inferiority_bound=float("inf"),
        non_inferior=True,
        inferior=False,
        superior=False,
        reference_non_inferior=False,
    )
    suite = SuiteJudgment(
        "exceptions",
        79.0,
        change,
        power=0.8,
        items_needed=9,
        clusters=2,
        design_effect=1.5,
        negative_flips=NegativeFlips(1, 25.0, 1.5, 60.5, below_limit=True),
        slices=(SliceJudgment("German", 75.0, change, required=True, clusters=1),),
    )
    return TransferOutcome(
        adapter=source.adapter,
        source_number=source.number,
        base=BaseRef(source.base.family, "v2", base),
        weights_sha256=source.weights_sha256,
        policy_sha256=policy,
        judgment=Judgment(
            verdict,
            "because",
            (suite,),
            margin_points=5.0,
            alpha=0.05,
            leakage=source.leakage,
        ),
        compatibility=Compatibility(notes=("the chat template changed",)),
        effect=Effect(0.25),
        evaluations=(evaluation(source.weights_sha256),),
        new_number=new_number,
        seconds=12.5,
        strategy=RecoveryStrategy.RESCALED,
        tried=(
            StrategyAttempt(RecoveryStrategy.RESCALED, "passed", "because", 3.5, "scale x 0.5"),
        ),
        training=source.recipe,
    )
